"""Figure 5: a batch whose rows have adapters of their own, in prefill and decode, against PEFT's `adapter_names`.

A Llama of SmolLM2-135M's widths with a few of its layers, and as much less vocabulary, so that the output head has the
share of the work that it has there. 64 rows; adapters of rank 16 on all seven projections; row i has adapter i mod k.
PEFT serves no DoRA row by row, so that is compared with the bare base alone.
"""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import veneer
from benchmarks.harness import Aim, Figure, Options, Table, main, measure

ROWS, RANK = 64, 16
COUNTS = (1, 4, 16, 64)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS_OF_SMOLLM2, VOCABULARY_OF_SMOLLM2 = 30, 49_152
FASTER = {16: 3, 64: 5}  # than PEFT, by the number of adapters

Run = Callable[..., object]


def figure(options: Options) -> Figure:
    """Both kinds of adapters, each with prompts and token by token."""
    layers = 1 if options.quick else 4
    counts = (1, 4) if options.quick else COUNTS
    prompt, new = (4, 2) if options.quick else (32, 16)
    base = llama(layers, options.device)
    runs: dict[str, tuple[str, Run]] = {
        "prefill": (f"prompts of {prompt} tokens", lambda model, **given: prefill(model, prompt, **given)),
        "decode": (f"{new} tokens by generate, from one", lambda model, **given: decode(model, new, **given)),
    }
    with_peft, ours = peft_model(base, counts[-1]), veneer_model(base, counts[-1], use_dora=False)
    same_factors(with_peft, ours)
    same_outputs(with_peft, ours, counts[-1])
    setting = {"rows": ROWS, "rank": RANK, "layers": layers, "dtype": "fp32"}
    tables: list[Table] = []
    for method in ("LoRA", "DoRA"):
        dora = method == "DoRA"
        models = (
            {"Veneer": veneer_model(base, counts[-1], use_dora=True)} if dora else {"PEFT": with_peft, "Veneer": ours}
        )
        aims = {f"Veneer, {k}": Aim(at_most=1 / FASTER[k], against=f"PEFT, {k}") for k in counts if k in FASTER}
        for kind, (what, run) in runs.items():
            tables.append(
                measure(
                    f"{method}, {kind}: {what}",
                    {"base": partial(run, base), **contenders(models, counts, run)},
                    options,
                    reference="base",
                    rounds=5,
                    warmup=1,
                    aims=None if dora else aims,
                    setting=setting,
                )
            )
    about = "64 rows in one batch, each with its own of 1, 4, 16 or 64 adapters; time against the bare base model."
    return Figure("mixed_batch", "Mixed-adapter inference", about, tables)


def contenders(models: dict[str, Any], counts: tuple[int, ...], run: Run) -> dict[str, Callable[[], object]]:
    """Each model with each number of adapters."""
    return {
        f"{who}, {k}": partial(run, model, adapter_names=[f"a{row % k}" for row in range(ROWS)])
        for k in counts
        for who, model in models.items()
    }


def llama(layers: int, device: str) -> nn.Module:
    """A random Llama with SmolLM2-135M's widths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY_OF_SMOLLM2 * layers // LAYERS_OF_SMOLLM2,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(device).eval()


def peft_model(base: nn.Module, count: int) -> Any:
    """PEFT's model with `count` adapters, of random factors."""
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=RANK, target_modules=PROJECTIONS, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), config, "a0")
        for i in range(1, count):
            model.add_adapter(f"a{i}", config)
    return model.eval()


def veneer_model(base: nn.Module, count: int, *, use_dora: bool) -> veneer.PeftModel:
    """The same of ours."""
    config = veneer.LoraConfig(r=RANK, target_modules=PROJECTIONS, init_lora_weights=False, use_dora=use_dora)
    generator = torch.Generator().manual_seed(1)
    model = veneer.get_peft_model(copy.deepcopy(base), config, "a0", generator=generator)
    for i in range(1, count):
        model.add_adapter(f"a{i}", config, generator=generator)
    return model.eval()


def same_factors(theirs: nn.Module, ours: nn.Module) -> None:
    """Give our adapters the values of PEFT's."""
    values = {name.replace(".base_layer.", "."): value for name, value in theirs.named_parameters()}
    with torch.no_grad():
        for name, value in ours.named_parameters():
            if ".adapters." in name:
                path, own = name.split(".adapters.")
                adapter, factor = own.split(".")
                value.copy_(values[f"{path}.{factor}.{adapter}.weight"])


def same_outputs(theirs: nn.Module, ours: nn.Module, count: int) -> None:
    """Assert that both compute the same, before their times are compared."""
    names = [f"a{row % count}" for row in range(ROWS)]
    one, two = (prefill(model, 4, adapter_names=names).logits for model in (theirs, ours))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def ids(model: nn.Module, tokens: int) -> torch.Tensor:
    """Random tokens, the same each time."""
    device = next(model.parameters()).device
    return torch.randint(1, 1000, (ROWS, tokens), generator=torch.Generator().manual_seed(2)).to(device)


@torch.no_grad()
def prefill(model: Any, tokens: int, **given: Any) -> Any:
    """One forward pass over the prompts."""
    return model(input_ids=ids(model, tokens), logits_to_keep=1, **given)


def decode(model: Any, new: int, **given: Any) -> Any:
    """Token after token, from a prompt of one."""
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    prompts = ids(model, 1)
    return model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **options, **given)


if __name__ == "__main__":
    main(figure, __doc__)
