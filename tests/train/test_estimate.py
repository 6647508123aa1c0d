"""The arithmetic of memory and traffic, against what tensors of a tiny model take and against known sizes."""

import weakref
from pathlib import Path

import pytest
import torch

from benchmarks.quantised_memory import PARTS, TINY, counted, run_of, step_parts
from benchmarks.record import RESULTS, Figure
from veneer.train.estimate import (
    LLAMA_8B,
    LLAMA_70B,
    LLAMA_405B,
    PROFILES,
    Run,
    activation_bytes,
    kept_by_a_layer,
    logit_bytes,
    memory,
    total,
    traffic,
    weight_bytes,
)


@pytest.mark.parametrize(
    ("shape", "numbers"), [(LLAMA_8B, 8_030_261_248), (LLAMA_70B, 70_553_706_496), (LLAMA_405B, 405_853_388_800)]
)
def test_the_models_have_the_sizes_that_their_files_have(shape, numbers: int) -> None:
    assert shape.parameters == numbers
    assert weight_bytes(shape, "bfloat16") == 2 * numbers


def test_adapters_are_as_many_as_veneer_lays_over_a_model_of_the_shape() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from veneer import LoraConfig, get_peft_model

    config = LlamaConfig(**LLAMA_8B.llama_config)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == LLAMA_8B.parameters
    trained, _ = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")).get_nb_trainable_parameters()
    assert trained == LLAMA_8B.adapters(16)


@pytest.mark.parametrize("keeping", ["float32", "bfloat16", "int8", "nf4"])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts what Linux says of a process")
def test_a_tiny_model_takes_what_is_computed(keeping) -> None:
    found, said = step_parts(keeping, quick=True), memory(run_of(keeping, quick=True))
    for part in ("weights", "adapters", "gradients", "optimizer"):
        assert found[part] == said[part], part
    assert found["activations"] == pytest.approx(said["activations"], rel=0.03)


def test_the_record_of_the_small_model_is_what_is_computed() -> None:
    made = Figure.load(RESULTS / "quantised_memory.json")
    assert not made.quick
    for table in made.tables:
        said = memory(run_of(table.title.removeprefix("A base in ")))  # type: ignore
        for part in PARTS:
            assert table[part].median * 2**20 == pytest.approx(said[part], rel=0.01), (table.title, part)


def test_shared_memory_counts_once() -> None:
    base = torch.zeros(10)
    assert counted(iter([base, base[:5], torch.zeros(1)])) == 44


def test_checkpointing_keeps_one_layer_and_the_inputs_of_all() -> None:
    plain, saved = (Run(TINY, rows=2, tokens=8, computes=4, checkpointing=on) for on in (False, True))
    ends = activation_bytes(plain) - TINY.layers * kept_by_a_layer(plain)
    assert activation_bytes(saved) == TINY.layers * 2 * 8 * TINY.width * 4 + kept_by_a_layer(plain) + ends


def test_logits_are_a_chunk() -> None:
    run = Run(LLAMA_8B, rows=1, tokens=8192)
    assert logit_bytes(run) <= 1.5 * 256 * 2**20
    assert logit_bytes(Run(TINY, rows=1, tokens=4)) == 4 * 512 * 6


@pytest.mark.parametrize(("dtype", "computes"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_logits_of_all_tokens_are_what_transformers_loss_takes(dtype: torch.dtype, computes: int) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers.loss.loss_utils import ForCausalLMLoss

    class Held(TorchDispatchMode):
        """The most bytes of tensors of the logits' size that were there at once."""

        def __init__(self, least: int) -> None:
            super().__init__()
            self.least, self.now, self.most, self.seen = least, 0, 0, set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            for one in made if isinstance(made, tuple) else [made]:
                if isinstance(one, torch.Tensor) and one.numel() >= self.least:
                    self.hold(one.untyped_storage())
            return made

        def hold(self, storage: torch.UntypedStorage) -> None:
            if storage._cdata in self.seen:
                return
            self.seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.let_go, storage._cdata, storage.nbytes())

        def let_go(self, cdata: int, count: int) -> None:
            self.seen.discard(cdata)
            self.now -= count

    run = Run(TINY, rows=1, tokens=200, computes=computes)
    hidden = torch.randn(1, 200, 8, dtype=dtype, requires_grad=True)
    head = torch.randn(512, 8, dtype=dtype)
    with Held(200 * 512) as held:
        logits = hidden @ head.T
        ForCausalLMLoss(logits=logits, labels=torch.randint(0, 512, (1, 200)), vocab_size=512).backward()
    assert held.most == logit_bytes(run, all_at_once=True)


@pytest.mark.parametrize("profile", PROFILES)
def test_one_device_sends_nothing_and_holds_all(profile) -> None:
    run = Run(LLAMA_8B)
    assert traffic(run, profile, 1) == 0
    alone = memory(run)
    assert {part: memory(run, profile, 1)[part] for part in ("weights", "adapters", "gradients")} == {
        part: alone[part] for part in ("weights", "adapters", "gradients")
    }


@pytest.mark.parametrize("profile", PROFILES)
def test_more_devices_hold_no_more_each(profile) -> None:
    run = Run(LLAMA_70B, tokens=2048, checkpointing=True)
    sizes = [total(memory(run, profile, devices)) for devices in (2, 8, 64, 1024)]
    assert sizes == sorted(sizes, reverse=True)
    assert traffic(run, profile, 8) < traffic(run, profile, 64) < 3 * weight_bytes(LLAMA_70B, "bfloat16")


def test_ddp_sends_adapters_alone_and_shards_the_base() -> None:
    run = Run(LLAMA_405B)
    trained = 4 * run.adapters
    assert traffic(run, "ddp", 2) == trained
    assert traffic(run, "fsdp2", 2) == (2 * (weight_bytes(LLAMA_405B, "bfloat16") + trained) + trained) // 2
