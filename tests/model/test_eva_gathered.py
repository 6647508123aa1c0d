"""EVA in two processes, each with its own part of the data, finds what one process finds in all of them."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

import veneer


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(23, 6, generator=generator) * 0.6 ** torch.arange(6) for _ in range(6)]


def found_in(data: list[Tensor], **more: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    config = veneer.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights="eva", eva_config={"tau": 0.8})
    free = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    return veneer.get_eva_state_dict(base, data, config, lambda model, x: model(x), **free, **more)


def one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    part = slice(0, 10) if rank == 0 else slice(10, None)  # of unequal sizes
    save_file(found_in([x[part] for x in batches()]), f"{folder}/{rank}.safetensors")
    save_file(found_in(batches(), gather_distributed_inputs=False), f"{folder}/alone{rank}.safetensors")
    dist.destroy_process_group()


def test_two_processes_are_as_one(tmp_path: Path):
    processes.spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
    expected = found_in(batches())
    for name in ("0", "1", "alone0", "alone1"):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert found.keys() == expected.keys()
        for layer, A in expected.items():
            assert_close(found[layer], A, rtol=1e-5, atol=1e-5)
