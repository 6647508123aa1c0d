"""What it costs to attach an adapter, to switch, disable and delete, with more and more adapters there; and to import.

Nothing computes: the models have every module of a real one, and weights that take no memory (one number, expanded).
The adapters are allocated and initialised in full.
"""

import compileall
import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import veneer
from benchmarks.harness import Aim, Contender, Figure, Options, Table, main, measure

LIBRARIES: dict[str, ModuleType] = {"PEFT": peft, "Veneer": veneer}
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["gate_proj", "up_proj", "down_proj"]
FUSED = ["experts.gate_up_proj", "experts.down_proj"]


def weightless(model: nn.Module) -> nn.Module:
    """The model with one number in place of each parameter's values."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(torch.zeros(1).expand(weight.shape))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return model


def llama(layers: int = 32) -> nn.Module:
    """A Llama of 7B's shape, or of fewer layers."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, vocab_size=32000)
    with torch.device("meta"):
        return weightless(LlamaForCausalLM(config))


class Expert(nn.Module):
    """One expert as modules, as models have them that do not fuse."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)


def experts(layers: int = 8, count: int = 64) -> nn.Module:
    """A mixture of experts, each with three linear layers of its own."""
    with torch.device("meta"):
        blocks = (
            nn.ModuleDict({"experts": nn.ModuleList(Expert(2048, 1024) for _ in range(count))}) for _ in range(layers)
        )
        return weightless(nn.Sequential(*blocks))


def fused_experts(layers: int = 8, count: int = 64) -> nn.Module:
    """The same with the experts of a layer in two parameters, as transformers has them."""
    config = Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=1024,
        num_experts=count,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    with torch.device("meta"):
        return weightless(Qwen3MoeForCausalLM(config))


def attaching(title: str, build: Callable[[], nn.Module], fields: dict[str, Any], options: Options) -> Table:
    """The first adapter of a model."""

    def attach(library: ModuleType, model: nn.Module) -> Any:
        return library.get_peft_model(model, library.LoraConfig(**fields))

    contenders = {name: Contender(partial(attach, one), prepare=build) for name, one in LIBRARIES.items()}
    return measure(title, contenders, options, reference="PEFT", rounds=7, aims={"Veneer": Aim(0.3)}, setting=fields)


class Laden:
    """A model with adapters on it, and one operation after the other on them."""

    def __init__(self, library: ModuleType, layers: int, count: int) -> None:
        self._config = lambda: library.LoraConfig(r=2, target_modules=LLAMA)
        self.model = library.get_peft_model(llama(layers), self._config())
        for number in range(1, count):
            self.model.add_adapter(f"number{number}", self._config())
        self._turns: Iterator[str] = itertools.cycle(["number1", "default"])

    def operation(self, name: str) -> Contender:
        """Attach one more, switch to another, disable (and enable again), or delete one."""
        return {
            "attach": Contender(lambda _: self._add(), prepare=self._without),
            "switch": Contender(lambda: self.model.set_adapter(next(self._turns))),
            "disable": Contender(self._disable),
            "delete": Contender(lambda _: self._delete(), prepare=self._with),
        }[name]

    def _add(self) -> None:
        self.model.add_adapter("more", self._config())

    def _delete(self) -> None:
        self.model.delete_adapter("more")

    def _without(self) -> None:
        if "more" in self.model.peft_config:
            self._delete()

    def _with(self) -> None:
        if "more" not in self.model.peft_config:
            self._add()

    def _disable(self) -> None:
        with self.model.disable_adapter():
            pass


def operations(layers: int, counts: list[int], options: Options) -> list[Table]:
    """One table an operation, with more and more adapters on the model."""
    laden = {(name, n): Laden(one, layers, n) for n in counts for name, one in LIBRARIES.items()}
    tables = []
    for what, most in (("attach", 0.3), ("switch", 0.2), ("disable", 0.2), ("delete", None)):
        contenders = {f"{name}, {n} adapters": one.operation(what) for (name, n), one in laden.items()}
        aims = {f"Veneer, {n} adapters": Aim(most, against=f"PEFT, {n} adapters") for n in counts if most}
        setting = {"layers": layers * len(LLAMA), "rank": 2}
        reference = f"Veneer, {counts[0]} adapters"
        title = f"{what.capitalize()}, by the number of adapters there"
        tables.append(measure(title, contenders, options, reference=reference, rounds=7, aims=aims, setting=setting))
    return tables


def imports(options: Options) -> Table:
    """A fresh process each time; the start of Python itself is in all of them.

    Veneer is compiled to bytecode first, as pip does with what it installs, torch and PEFT among them.
    """
    compileall.compile_dir(Path(veneer.__file__).parent, quiet=1)
    lines = {
        "import torch": "import torch",
        "import veneer": "import veneer",
        "from veneer import LoraConfig, get_peft_model": "from veneer import LoraConfig, get_peft_model",
        "from peft import LoraConfig, get_peft_model": "from peft import LoraConfig, get_peft_model",
    }
    contenders = {name: partial(_in_new_process, line) for name, line in lines.items()}
    aims = {name: Aim(1.1) for name in lines if "veneer" in name}
    return measure("Import", contenders, options, reference="import torch", rounds=5, warmup=1, aims=aims)


def _in_new_process(line: str) -> None:
    subprocess.run([sys.executable, "-c", line], check=True, capture_output=True)


def figure(options: Options) -> Figure:
    """All the tables."""
    quick = options.quick
    with warnings.catch_warnings(action="ignore"):
        tables = [
            attaching(
                "Attach to a Llama of 7B's shape, 32 layers of 7",
                partial(llama, 1 if quick else 32),
                {"r": 16, "target_modules": LLAMA},
                options,
            ),
            attaching(
                "Attach to 8 layers of 64 experts, each of 3 linear layers",
                partial(experts, 1, 4) if quick else experts,
                {"r": 8, "target_modules": EXPERTS},
                options,
            ),
            attaching(
                "Attach to 8 layers of 64 fused experts",
                partial(fused_experts, 1, 4) if quick else fused_experts,
                {"r": 8, "target_modules": [], "target_parameters": FUSED},
                options,
            ),
            *operations(1 if quick else 4, [2, 3] if quick else [2, 10, 100], options),
            imports(options),
        ]
    return Figure("attach", "Attaching and switching", __doc__ or "", tables)


if __name__ == "__main__":
    main(figure, __doc__)
