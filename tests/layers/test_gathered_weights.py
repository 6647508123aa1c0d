"""Adapters over weights that FullyShardedDataParallel gathers for the time of a forward: as without it."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint

from veneer import LoraConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch")


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Model(nn.Module):
    def __init__(self, *, recompute: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(8, 8)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        if not self.recompute:
            return self.linear(self.attend(x))
        return checkpoint(self.linear, checkpoint(self.attend, x, use_reentrant=False), use_reentrant=False)

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def stepped(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of what trains."""
    y = model(x)
    y.square().sum().backward()
    return y.detach(), [p.grad.flatten() for p in model.parameters() if p.grad is not None]


def adapted(targets: list[str], *, dora: bool, recompute: bool) -> PeftModel:
    config = LoraConfig(r=2, target_modules=targets, use_dora=dora, init_lora_weights=False)
    return get_peft_model(Model(recompute=recompute), config)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("targets", "dora"), [(["attention"], False), (["linear"], True)])
def test_outputs_and_gradients_are_those_without_it(targets: list[str], dora: bool, recompute: bool) -> None:
    model = adapted(targets, dora=dora, recompute=recompute)
    x = torch.randn(3, 5, 8)
    with torch.no_grad(), model.disable_adapter():
        base = model(x)
    y, gradients = stepped(model, x)
    model.zero_grad()
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    y_sharded, gradients_sharded = stepped(sharded, x)
    assert not torch.allclose(y, base)
    assert torch.allclose(y_sharded, y)
    assert len(gradients) == len(gradients_sharded) > 0
    assert all(torch.allclose(a, b) for a, b in zip(gradients, gradients_sharded, strict=True))
