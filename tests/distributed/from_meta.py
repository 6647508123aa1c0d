"""Run by torchrun: a base that is loaded shard by shard, and its adapters, are those of a base that was loaded whole.

torchrun --nproc-per-node N from_meta.py
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import veneer
from distributed.parity import distance
from veneer.distributed import load_base, wait_for_gloo
from veneer.errors import AdapterFileError, AttachError, ConfigError
from veneer.layers.sharded import is_sharded, local

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]},
    "tied": {"target_modules": ["embed_tokens", "v_proj"], "init_lora_weights": "gaussian"},
}


class Largest(TorchDispatchMode):
    """The most bytes that a real tensor had which was made within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor) and not is_sharded(one) and not one.is_meta:
                self.nbytes = max(self.nbytes, one.untyped_storage().nbytes())
        return result


def on_meta(source: nn.Module, config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(source.config)
    return veneer.get_peft_model(base, veneer.LoraConfig(r=4, **config))


def check(name: str, config: dict[str, Any], folder: Path) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    source = tiny.llama(tied="tied" in name)
    if rank == 0:
        source.save_pretrained(folder, max_shard_size="20kB")  # several files
    dist.barrier()
    torch.manual_seed(7)
    whole = veneer.get_peft_model(tiny_again(source), veneer.LoraConfig(r=4, **config))

    model = veneer.shard(on_meta(source, config))
    assert all(parameter.is_meta for parameter in model.parameters())
    generator = torch.Generator().manual_seed(7 if rank == 0 else 100 + rank)  # the others follow the first
    with Largest() as largest:
        load_base(model, folder, generator=generator)
    sizes = [p.numel() * p.element_size() for p in source.parameters()]
    mine = sum(local(p).untyped_storage().nbytes() for p in model.get_base_model().parameters())
    total = sum(p.numel() * p.element_size() for p in whole.parameters())
    assert mine <= total / ranks * 1.2, f"{mine} bytes on rank {rank}, of {total}"
    if name == "lora":
        assert largest.nbytes <= max(sizes) / ranks, (largest.nbytes, max(sizes))
    assert largest.nbytes <= max(sizes), "more than a layer was gathered"

    found = veneer.get_peft_model_state_dict(model)
    apart = distance(found, veneer.get_peft_model_state_dict(whole))
    assert apart == 0 or (config.get("use_dora") and apart < 1e-6), f"{name}: adapters start {apart:.1e} apart"
    with torch.no_grad():
        expected = whole.eval()(input_ids=tiny.ids()).logits
        torch.testing.assert_close(model.eval()(input_ids=tiny.ids()).logits, expected, rtol=1e-5, atol=1e-5)
    if rank == 0:
        print(f"{name}: {apart:.1e}, {mine} of {total} bytes, largest tensor {largest.nbytes}", flush=True)


def tiny_again(source: nn.Module) -> nn.Module:
    """The model anew: what attaching does to the source must not reach it."""
    again = type(source)(source.config).eval()
    again.load_state_dict(source.state_dict())
    torch.manual_seed(7)
    return again


def check_refusals(folder: Path) -> None:
    config = CONFIGS["lora"]
    with pytest.raises(ConfigError, match="starts from the values of the weights"):
        on_meta(tiny.llama(), {**config, "init_lora_weights": "pissa"})
    model = veneer.shard(on_meta(tiny.llama(layers=3), config))
    with pytest.raises(AdapterFileError, match="There is no"):
        load_base(model, folder / "nothing")
    with pytest.raises(AdapterFileError, match=r"missing +model\.layers\.2"):
        load_base(model, folder)
    assert all(parameter.is_meta for parameter in model.parameters())
    plain = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(r=4, **config))
    with pytest.raises(AttachError, match="not sharded"):
        load_base(plain, folder)
    with pytest.raises(AttachError, match="has values already"):
        load_base(veneer.shard(plain), folder)
    plain.save_pretrained(folder / "saved")
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(tiny.llama().config)
    with pytest.raises(AttachError, match="on the meta device, without values"):
        veneer.PeftModel.from_pretrained(base, folder / "saved")


def main() -> None:
    dist.init_process_group("gloo")
    shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    for name, config in CONFIGS.items():
        check(name, config, Path(str(shared[0])) / name.replace(" ", "-"))
    check_refusals(Path(str(shared[0])) / "lora")
    if dist.get_rank() == 0:
        print("refusals are clear", flush=True)
    dist.destroy_process_group()
    wait_for_gloo()


if __name__ == "__main__":
    main()
