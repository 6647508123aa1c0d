"""A Stable Diffusion pipeline: adapters trained, saved, loaded, weighed, fused, swapped and taken off.

Written for PEFT. Prints pictures (some of their numbers) and lists; what must equal what is asserted here.
"""

import json
import sys
from pathlib import Path

import numpy as np
import peft
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

FOLDER = Path(sys.argv[1])
IDS = torch.tensor([[0, 5, 9, 3, 7, 1]])
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
found = {}


def pipeline():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        block_out_channels=[4, 8],
        norm_num_groups=2,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )
    text = CLIPTextConfig(
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=32,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    pipe = StableDiffusionPipeline(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def picture(pipe, **kwargs):
    embeds = pipe.text_encoder(IDS)[0]
    return pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=torch.zeros_like(embeds),
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **kwargs,
    ).images


def keep(name, image):
    found[name] = [float(value) for value in image.flatten()[:: image.size // 24]]
    return image


def same(one, other):
    return np.allclose(one, other, atol=1e-4) or print("differ by", np.abs(one - other).max(), file=sys.stderr)


def is_kept(image, name):
    return same(image.flatten()[:: image.size // 24], np.array(found[name]))


def is_base(image, base):
    """The base again: bit for bit on Veneer, which keeps the weights that others add to and subtract from."""
    return (image == base).all() if hasattr(peft, "__veneer__") else same(image, base)


def values(model, seed, name):
    """The same values whoever made the adapter, by their names in sorted order."""
    generator = torch.Generator().manual_seed(seed)
    state = get_peft_model_state_dict(model, adapter_name=name)
    state = {key: 0.4 * torch.randn(state[key].shape, generator=generator) for key in sorted(state)}
    set_peft_model_state_dict(model, state, name)


def train_and_save(folder, seed, *, text=True, **fields):
    """One step, and the files that training scripts write."""
    pipe = pipeline()
    pipe.unet.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(target_modules=UNET_TARGETS, init_lora_weights="gaussian", **fields))
    values(pipe.unet, seed, "default")
    models = [pipe.unet]
    if text:
        pipe.text_encoder.add_adapter(LoraConfig(target_modules=TEXT_TARGETS, **fields))
        values(pipe.text_encoder, seed + 1, "default")
        models.append(pipe.text_encoder)
    trained = [p for model in models for p in model.parameters() if p.requires_grad]
    assert all("lora_" in n for model in models for n, p in model.named_parameters() if p.requires_grad)
    optimizer = torch.optim.SGD(trained, lr=0.05)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    embeds = pipe.text_encoder(IDS)[0].expand(2, -1, -1)
    loss = (pipe.unet(noise, torch.tensor([3, 5]), embeds).sample - noise).square().mean()
    loss.backward()
    found.setdefault("losses", []).append(float(loss.detach()))
    found.setdefault("gradients", []).append(float(sum(p.grad.square().sum() for p in trained)))
    optimizer.step()
    states = [convert_state_dict_to_diffusers(get_peft_model_state_dict(model)) for model in models]
    found.setdefault("keys", []).append([sorted(state)[:3] for state in states])
    StableDiffusionPipeline.save_lora_weights(folder, *states)
    return picture(pipe)


def loading():
    pipe = pipeline()
    base = keep("base", picture(pipe))
    one = keep("one", train_and_save(FOLDER / "one", 10, r=4, lora_alpha=4))
    two = keep("two", train_and_save(FOLDER / "two", 20, r=2, lora_alpha=2, text=False))
    pipe.load_lora_weights(FOLDER / "one", adapter_name="one")
    assert same(picture(pipe), one)
    pipe.load_lora_weights(FOLDER / "two", adapter_name="two")
    found["lists"] = [pipe.get_list_adapters(), pipe.get_active_adapters(), pipe.unet.active_adapters()]
    keep("after loading two", picture(pipe))
    pipe.set_adapters("two")
    assert same(picture(pipe), two)
    found["lists"].append(pipe.get_active_adapters())
    pipe.set_adapters("one")
    assert same(picture(pipe), one)
    weighed(pipe, base)
    fused(pipe, base)
    pipe.set_adapters(["one", "two"])
    both = picture(pipe)
    pipe.delete_adapters("two")
    found["lists"] += [pipe.get_list_adapters(), pipe.get_active_adapters()]
    assert same(picture(pipe), one)
    pipe.load_lora_weights(FOLDER / "two", adapter_name="two")
    pipe.set_adapters(["one", "two"])
    assert same(picture(pipe), both)
    pipe.set_lora_device(["one", "two"], "cpu")
    assert same(picture(pipe), both)
    pipe.delete_adapters(["one", "two"])
    assert is_base(picture(pipe), base)
    pipe.load_lora_weights(FOLDER / "one", adapter_name="one")
    pipe.set_adapters("one")
    assert same(picture(pipe), one)
    pipe.unload_lora_weights()
    assert is_base(picture(pipe), base)
    found["lists"] += [pipe.get_list_adapters(), sorted(pipe.unet.state_dict()) == sorted(pipeline().unet.state_dict())]
    pipe.load_lora_weights(FOLDER / "two", adapter_name="one")
    assert same(picture(pipe), two)


def weighed(pipe, base):
    pipe.set_adapters(["one", "two"], [0.7, 0.4])
    found["lists"].append(pipe.get_active_adapters())
    keep("0.7 and 0.4", picture(pipe))
    pipe.set_adapters(
        ["one", "two"], [{"unet": {"down": 0.2, "mid": 0.5, "up": {"block_0": 0.9}}, "text_encoder": 2}, 1]
    )
    by_block = keep("by block", picture(pipe))
    pipe.disable_lora()
    assert is_base(picture(pipe), base)
    pipe.enable_lora()
    assert same(picture(pipe), by_block)
    pipe.set_adapters("one")
    halved = keep("halved", picture(pipe, cross_attention_kwargs={"scale": 0.5}))
    assert not same(halved, picture(pipe))
    off = picture(pipe, cross_attention_kwargs={"scale": 0.0})
    keep("unet off", off)


def fused(pipe, base):
    weights = {name: value.clone() for name, value in pipeline().unet.state_dict().items()}
    pipe.set_adapters(["one", "two"])
    pipe.fuse_lora(components=["unet", "text_encoder"], adapter_names=["one"])
    assert pipe.num_fused_loras == 1
    keep("one fused", picture(pipe))
    pipe.unfuse_lora(components=["unet", "text_encoder"])
    assert pipe.num_fused_loras == 0
    both = keep("both", picture(pipe))
    pipe.fuse_lora(components=["unet", "text_encoder"])
    found["fused"] = sorted(pipe.fused_loras)
    assert same(picture(pipe), both)
    assert same(picture(pipe, cross_attention_kwargs={"scale": 0.5}), both)
    pipe.unfuse_lora(components=["unet", "text_encoder"])
    assert same(picture(pipe), both)
    pipe.set_adapters(["one"])
    pipe.fuse_lora(components=["unet"], lora_scale=0.6)
    scaled = keep("fused at 0.6", picture(pipe))
    pipe.unfuse_lora(components=["unet"])
    assert same(picture(pipe), scaled)
    pipe.set_adapters(["one"])
    after = {key.replace(".base_layer", ""): value for key, value in pipe.unet.state_dict().items()}
    assert all(torch.allclose(after[name], value, atol=1e-6) for name, value in weights.items())
    kept = pipeline()
    kept.load_lora_weights(FOLDER / "two", adapter_name="two")
    kept.fuse_lora(components=["unet"])
    kept.unload_lora_weights()
    assert list(kept.unet.state_dict()) == list(weights)
    assert is_kept(picture(kept), "two")
    kept.load_lora_weights(FOLDER / "one", adapter_name="one")
    assert same(picture(kept), both)


def hotswapped():
    pipe = pipeline()
    pipe.enable_lora_hotswap(target_rank=4)
    train_and_save(FOLDER / "three", 30, r=4, lora_alpha=2, text=False)
    pipe.load_lora_weights(FOLDER / "two", adapter_name="a")
    assert is_kept(keep("before the swap", picture(pipe)), "two")
    pipe.load_lora_weights(FOLDER / "three", adapter_name="a", hotswap=True)
    keep("after the swap", picture(pipe))
    pipe.load_lora_weights(FOLDER / "two", adapter_name="a", hotswap=True)
    keep("swapped back", picture(pipe))


def kohya(name, alpha_of_k):
    """The format of sd-scripts, with an alpha for each layer and keys of the text encoder."""
    generator = torch.Generator().manual_seed(3)
    state = {}
    pipe = pipeline()
    for model, prefix, inner, targets in (
        (pipe.unet, "lora_unet_", "", UNET_TARGETS),
        (pipe.text_encoder, "lora_te_", "text_model_", TEXT_TARGETS),
    ):
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and path.endswith(tuple(targets)):
                key = prefix + inner + path.removeprefix("text_model.").replace(".", "_")
                rank = 2 if "to_q" in path else 4
                state[f"{key}.lora_down.weight"] = 0.4 * torch.randn(rank, module.in_features, generator=generator)
                state[f"{key}.lora_up.weight"] = 0.4 * torch.randn(module.out_features, rank, generator=generator)
                state[f"{key}.alpha"] = torch.tensor(alpha_of_k if "to_k" in path else 1.0)
    save_file(state, FOLDER / "kohya.safetensors")
    pipe.load_lora_weights(FOLDER, weight_name="kohya.safetensors")
    image = keep(name, picture(pipe)) if alpha_of_k == 1 else picture(pipe)
    lists = found[f"{name} lists"] = pipe.get_list_adapters()
    layer = next(module for path, module in pipe.unet.named_modules() if path.endswith("attn1.to_k"))
    # diffusers 0.42 gives PEFT an alpha_pattern that matches nothing there
    assert layer.scaling[lists["unet"][0]] == (alpha_of_k if hasattr(peft, "__veneer__") else 1) / 4
    pipe.fuse_lora(components=["unet", "text_encoder"])
    assert same(picture(pipe), image)


def of_one_model():
    """`save_lora_adapter` and `load_lora_adapter`, with DoRA."""
    pipe = pipeline()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=UNET_TARGETS, use_dora=True), "d")
    values(pipe.unet, 40, "d")
    dora = keep("dora", picture(pipe))
    pipe.unet.save_lora_adapter(FOLDER / "dora", adapter_name="d")
    other = pipeline()
    other.unet.load_lora_adapter(FOLDER / "dora", prefix=None, adapter_name="e", use_safetensors=True)
    assert same(picture(other), dora)
    other.unet.fuse_lora()
    assert same(picture(other), dora)
    other.unet.unfuse_lora()
    assert same(picture(other), dora)
    other.set_lora_device(["e"], "cpu")
    other.unet.disable_adapters()
    assert is_kept(picture(other), "base")
    other.unet.enable_adapters()
    assert same(picture(other), dora)
    other.unet.add_adapter(LoraConfig(r=2, target_modules=["conv1", "to_q"]), "f")
    other.unet.set_adapter(["e", "f"])
    found["one model"] = other.unet.active_adapters()
    try:
        other.unet.load_lora_adapter(FOLDER / "dora", prefix=None, adapter_name="e", use_safetensors=True)
    except ValueError as error:
        found["taken"] = "already in use" in str(error)


loading()
hotswapped()
kohya("kohya", 1.0)
kohya("kohya with another alpha", 3.0)
of_one_model()
print(json.dumps(found))
