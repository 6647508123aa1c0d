"""A Flux pipeline, whose model is a transformer: an adapter trained, saved with its config, loaded, weighed and fused.

Written for PEFT. Prints numbers of latents; what must equal what is asserted here.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

FOLDER = Path(sys.argv[1])
found = {}


def pipeline():
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    vae = AutoencoderKL(
        sample_size=32,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def latents(pipe, name=None, **kwargs):
    generator = torch.Generator().manual_seed(0)
    made = pipe(
        prompt_embeds=torch.randn(1, 4, 32, generator=generator),
        pooled_prompt_embeds=torch.randn(1, 32, generator=generator),
        num_inference_steps=2,
        guidance_scale=0.0,
        height=8,
        width=8,
        generator=generator,
        output_type="latent",
        **kwargs,
    ).images
    if name:
        found[name] = made.flatten().tolist()
    return made


def same(one, other):
    return torch.allclose(one, other, atol=1e-5)


def train_and_save(folder, seed, **fields):
    """One step, and the file that training scripts write, with the config in its header."""
    pipe = pipeline()
    pipe.transformer.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "ff.net.0.proj"]
    pipe.transformer.add_adapter(LoraConfig(target_modules=targets, **fields))
    generator = torch.Generator().manual_seed(seed)
    state = get_peft_model_state_dict(pipe.transformer)
    state = {key: 0.2 * torch.randn(state[key].shape, generator=generator) for key in sorted(state)}
    set_peft_model_state_dict(pipe.transformer, state)
    trained = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    pipe.transformer.enable_gradient_checkpointing()
    pipe.transformer.train()
    out = pipe.transformer(
        hidden_states=torch.ones(1, 16, 4),
        encoder_hidden_states=torch.ones(1, 4, 32),
        pooled_projections=torch.ones(1, 32),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(4, 3),
    ).sample
    out.square().mean().backward()
    found.setdefault("gradients", []).append(float(sum(p.grad.square().sum() for p in trained)))
    optimizer.step()
    pipe.transformer.eval()
    FluxPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )
    return latents(pipe, folder.name)


pipe = pipeline()
base = latents(pipe, "base")
one = train_and_save(FOLDER / "one", 1, r=4, lora_alpha=8, use_rslora=True)
two = train_and_save(FOLDER / "two", 2, r=2, lora_alpha=2, lora_bias=True)
pipe.load_lora_weights(FOLDER / "one", adapter_name="one")
assert same(latents(pipe), one)
config = pipe.transformer.peft_config["one"]
found["config"] = [config.r, config.lora_alpha, config.use_rslora]
pipe.load_lora_weights(FOLDER / "two", adapter_name="two")
pipe.set_adapters(["one", "two"], [0.3, 0.8])
both = latents(pipe, "0.3 and 0.8")
halved = latents(pipe, "halved", joint_attention_kwargs={"scale": 0.5})
assert not same(halved, both)
assert same(latents(pipe), both)
pipe.disable_lora()
assert torch.equal(latents(pipe), base)
pipe.enable_lora()
pipe.fuse_lora(components=["transformer"], adapter_names=["one", "two"])
assert same(latents(pipe), both)
assert pipe.num_fused_loras == 2
pipe.unfuse_lora(components=["transformer"])
assert same(latents(pipe), both)
pipe.set_adapters("two")
assert same(latents(pipe), two)
pipe.fuse_lora(components=["transformer"])
pipe.unload_lora_weights()
assert same(latents(pipe), two)
pipe.load_lora_weights(FOLDER / "one", adapter_name="one")
latents(pipe, "one over two")
found["lists"] = [pipe.get_list_adapters(), pipe.get_active_adapters()]

before = latents(pipe)
good = load_file(FOLDER / "two" / "pytorch_lora_weights.safetensors")
short = next(name for name in sorted(good) if "lora_B.weight" in name)
bad = {
    "misshapen": {**good, short: torch.ones(5, 2)},
    "nowhere": {f"transformer.nowhere.lora_{part}.weight": torch.ones(2, 2) for part in "AB"},
}
for what, state in bad.items():
    try:
        pipe.load_lora_weights(state, adapter_name=what)
    except (ValueError, RuntimeError) as error:
        found[what] = short.partition(".")[2] in str(error).replace(f".{what}.", ".") or "nowhere" in str(error)
    assert same(latents(pipe), before)
    found["lists"].append(pipe.get_list_adapters())
print(json.dumps(found))
