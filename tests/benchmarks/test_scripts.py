"""Every figure's script runs, on tiny models; that its numbers are what they claim, the counts below hold."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.activation_memory import OneLayer, one_layer, saved_bytes
from benchmarks.adapted import SMOLLM2, SMOLLM2_LAYERS, TINY, Work, adapted, base, sharing, step
from benchmarks.peak import peak_of
from benchmarks.record import Figure
from benchmarks.render import FIGURES
from benchmarks.scaling import exponent, operations

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
HOME = Path(__file__).parents[2]
SCRIPTS = [name for name in FIGURES if (HOME / "benchmarks" / f"{name}.py").exists()]


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def test_every_script_is_on_the_page() -> None:
    made = set()
    for file in (HOME / "benchmarks").glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "figure" for node in tree.body):
            made.add(file.stem)
    assert made == set(SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=HOME, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Figure.load(tmp_path / f"{name}.json").quick


def test_copies_of_a_model_share_its_memory_and_not_its_gradients() -> None:
    model = base(TINY)
    shared = sharing(model).requires_grad_(True)
    pairs = list(zip(model.parameters(), shared.parameters(), strict=True))
    assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)
    assert not any(one.requires_grad for one, _ in pairs)


def test_both_libraries_take_the_same_step_with_the_same_adapter() -> None:
    work, model = Work(TINY, 2, 8), base(TINY)
    x = work.input()
    theirs, ours = (adapted(library, sharing(model)) for library in ("PEFT", "Veneer"))
    pairs = list(zip(factors(theirs), factors(ours), strict=True))
    assert len(pairs) == 2 * 7 * TINY.layers
    with torch.no_grad():
        for p, q in pairs:
            assert p.shape == q.shape
            q.copy_(p)
    outputs = [made(inputs_embeds=x).last_hidden_state for made in (theirs, ours)]
    torch.testing.assert_close(*outputs)


def test_nothing_is_left_of_a_step_in_the_next() -> None:
    work, model = Work(TINY, 1, 4), adapted("Veneer", base(TINY))
    contender = step(model, work)
    assert contender.prepare is not None
    versions = []
    for _ in range(2):
        x = contender.prepare()
        assert isinstance(x, torch.Tensor)
        assert x.grad is None
        assert all(p.grad is None for p in model.parameters())
        versions.append([p._version for p in model.parameters() if p.requires_grad])
        contender.run(x)
        assert x.grad is not None
    assert all(first < second for first, second in zip(*versions, strict=True))  # so a cached norm is computed again


def test_the_sizes_are_those_of_the_models() -> None:
    assert SMOLLM2.layers * SMOLLM2.linear == 106_168_320
    adapters = sum(factor.numel() for factor in factors(adapted("Veneer", base(SMOLLM2_LAYERS), rank=8)))
    assert SMOLLM2_LAYERS.layers * SMOLLM2_LAYERS.adapter(8) == adapters


def test_the_products_of_adapters_are_a_twentieth_of_the_limit() -> None:
    assert operations(SMOLLM2, 4, 256, 16) / operations(SMOLLM2, 4, 256) == pytest.approx(1.06, abs=0.02)


def test_an_exponent_is_the_slope_in_logarithms() -> None:
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert exponent([1, 2, 4], [-1, 2, 4]) == pytest.approx(1)


def test_saved_bytes_counts_each_storage_once_and_no_parameter() -> None:
    layer = OneLayer(8)
    x = torch.randn(4, 8, requires_grad=True)
    layer.requires_grad_(False)
    assert saved_bytes(layer, lambda: layer(x)) == 0
    layer.requires_grad_(True)
    assert saved_bytes(layer, lambda: layer(x) + layer(x)) == 4 * 8 * 4


def test_plain_lora_keeps_x_and_x_a_in_peft_and_no_more_in_veneer() -> None:
    table = one_layer(32, 64, 4, torch.float32)
    assert table.ratio("PEFT LoRA") == 1
    assert table.ratio("Veneer LoRA") <= 1


@pytest.mark.slow
def test_a_peak_is_that_of_one_step_alone() -> None:
    size = {"shape": vars(SMOLLM2_LAYERS), "batch": 1, "tokens": 16, "method": "LoRA", "dropout": 0.0}
    frozen, full = (peak_of("benchmarks.activation_memory:step_of", model=model, **size) for model in ("limit", "full"))
    gradients = 4 * SMOLLM2_LAYERS.layers * SMOLLM2_LAYERS.linear
    assert full.step - frozen.step > 0.5 * gradients
    assert frozen.step < frozen.most
