"""Run by torchrun: runs on several ranks equal those of one process. Prints a line for each case that does.

torchrun --nproc-per-node N parity.py [CASE …]
"""

import copy
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

import families
import tiny
import veneer
from veneer.distributed import wait_for_gloo

STEPS = 6
LORA = {"r": 4, "target_modules": "all-linear"}


@dataclass(frozen=True)
class Case:
    """One run, on several ranks and alone: a model, its adapter, and how it is trained and spread."""

    config: dict[str, Any]
    build: Callable[[], nn.Module] = tiny.llama
    spread: str = "fsdp2"
    bound: float = 1e-5  # relative L2, in float32
    optimizer: str = "adamw"
    options: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False


def half() -> nn.Module:
    return tiny.llama(dtype=torch.bfloat16)


def tied() -> nn.Module:
    return tiny.llama(tied=True)


def three_layers() -> nn.Module:
    return tiny.llama(layers=3)


def mixtral() -> nn.Module:
    return families.FAMILIES["mixtral"].model()


def nf4() -> nn.Module:
    """In 4 bits with doubly quantised scales, never reordered for a CPU, which happens in evaluation."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))
    for path, linear in [(path, m) for path, m in model.model.layers.named_modules() if isinstance(m, nn.Linear)]:
        how = {"compress_statistics": True, "quant_type": "nf4", "quant_storage": torch.float32}
        layer = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, **how)
        layer.weight = Params4bit(linear.weight.data, requires_grad=False, module=layer, **how)
        layer.support_avx512bf16_for_cpu = False
        model.model.layers.set_submodule(path, layer.to("cpu"))
    return model


TARGETS = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
EXPERTS = {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
CASES = {
    "ddp": Case(LORA, spread="ddp"),
    "ddp dora": Case({**LORA, "use_dora": True}, spread="ddp"),
    "ddp saved modules": Case({**TARGETS, "modules_to_save": ["lm_head", "norm"]}, spread="ddp"),
    "ddp tied": Case({**TARGETS, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, tied, spread="ddp"),
    "ddp lorafa": Case(LORA, spread="ddp", optimizer="lorafa"),
    "lora": Case(LORA),
    "lora, blocks kept": Case(LORA, options={"reshard_after_forward": False}),
    "copies of shards": Case(LORA),
    "checkpointing": Case(LORA, checkpointing=True),
    "dora": Case({**LORA, "use_dora": True}),
    "rslora, patterns": Case({**TARGETS, "use_rslora": True, "rank_pattern": {"q_proj": 3}, "use_dora": True}),
    "saved modules": Case({**TARGETS, "modules_to_save": ["lm_head", "norm"]}),
    "tied": Case({"r": 4, "target_modules": ["embed_tokens", "q_proj"]}, tied),
    "tied saved": Case({**TARGETS, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, tied),
    "tokens": Case({**TARGETS, "trainable_token_indices": [3, 5, 9]}, tied),
    "biases": Case({"r": 4, "target_modules": ["mlp.c_fc", "mlp.c_proj"], "bias": "lora_only"}, tiny.gpt2),
    "lora_bias": Case({**LORA, "lora_bias": True}),
    "pissa": Case({**TARGETS, "init_lora_weights": "pissa"}),
    "experts": Case(EXPERTS, mixtral),
    "replicated layers": Case({**TARGETS, "layer_replication": [(0, 2), (1, 3)]}, three_layers),
    "bfloat16 base": Case(TARGETS, half, bound=0.05),
    "bfloat16 copies": Case({**TARGETS, "modules_to_save": ["lm_head", "input_layernorm"]}, half, bound=0.05),
    "nf4": Case({**LORA, "use_dora": True}, nf4),
    "lorafa": Case(TARGETS, optimizer="lorafa"),
    "lorafa dora saved": Case({**TARGETS, "use_dora": True, "modules_to_save": ["norm"]}, optimizer="lorafa"),
    "lora+": Case(TARGETS, optimizer="lora+"),
}


def built(case: Case) -> nn.Module:
    return case.build() if case.build in (half, nf4) else case.build().float()


def made(case: Case) -> nn.Module:
    model = built(case)
    torch.manual_seed(1)
    model = veneer.get_peft_model(model, veneer.LoraConfig(lora_dropout=0.0, **case.config))
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def optimizer_of(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    if case.optimizer == "lorafa":
        return veneer.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    if case.optimizer == "lora+":
        return veneer.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def run(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Tensor) -> list[float]:
    """The loss of each step: the mean over this process's rows."""
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def averaged(losses: list[float]) -> Tensor:
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total)
    return total / dist.get_world_size()


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The relative L2 distance of two adapters."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    apart = sum((found[key].double() - expected[key].double()).square().sum() for key in expected)
    return float((apart / sum(value.double().square().sum() for value in expected.values())).sqrt())


def check(name: str, case: Case, folder: Path) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    batches = torch.randint(1, 64, (STEPS, 2 * ranks, 12), generator=torch.Generator().manual_seed(2))
    whole = made(case)
    spread = copy.deepcopy(whole)
    start = {key: value.clone() for key, value in veneer.get_peft_model_state_dict(whole).items()}
    alone = optimizer_of(case, whole)
    expected = run(case, whole, alone, batches)
    if case.spread == "ddp":
        optimizer = optimizer_of(case, spread)
        called = nn.parallel.DistributedDataParallel(spread)
    else:
        mesh = (
            init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("copy", "shard"))
            if name == "copies of shards"
            else None
        )
        called = veneer.shard(spread, mesh, **case.options)
        optimizer = optimizer_of(case, spread)
    losses = averaged(run(case, called, optimizer, batches[:, 2 * rank : 2 * rank + 2]))
    found, wanted = veneer.get_peft_model_state_dict(spread), veneer.get_peft_model_state_dict(whole)
    apart, moved = distance(found, wanted), distance(wanted, start)
    assert moved > 1e-2, f"{name}: nothing was learned ({moved})"
    assert apart <= case.bound, f"{name}: adapters differ by {apart:.1e}"
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=case.bound, atol=case.bound)
    check_use(name, case, whole, called, batches[0], folder)
    mine = batches[:1, 2 * rank : 2 * rank + 2]
    again = averaged(run(case, called.train(), optimizer, mine)), run(case, whole.train(), alone, batches[:1])
    torch.testing.assert_close(*map(torch.as_tensor, again), check_dtype=False, rtol=case.bound, atol=case.bound)
    check_use(
        name, case, whole, called, batches[1], folder
    )  # what evaluation keeps (DoRA's norms) is not kept too long
    if rank == 0:
        print(f"{name}: {apart:.1e}", flush=True)


def check_use(name: str, case: Case, whole: Any, called: Any, ids: Tensor, folder: Path) -> None:
    """In evaluation, too, both answer the same; so does a plain model with what the sharded one has saved."""
    with torch.no_grad():
        expected = whole.eval()(input_ids=ids).logits
        torch.testing.assert_close(called.eval()(input_ids=ids).logits, expected, rtol=case.bound, atol=20 * case.bound)
    if case.spread == "ddp":
        return
    place = folder / name.replace(" ", "-")
    called.save_pretrained(place)
    again = veneer.PeftModel.from_pretrained(built(case), place)
    with torch.no_grad():
        loaded = again(input_ids=ids).logits
    torch.testing.assert_close(loaded, expected, rtol=case.bound, atol=20 * case.bound)


def main(*names: str) -> None:
    dist.init_process_group("gloo")
    shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    for name in names or CASES:
        check(name, CASES[name], Path(str(shared[0])))
    dist.destroy_process_group()
    wait_for_gloo()


if __name__ == "__main__":
    main(*sys.argv[1:])
