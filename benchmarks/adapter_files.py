"""Figure 4, half: save, load, hotswap, merge and unmerge an adapter, against PEFT and the bare file.

"file alone" is `safetensors.torch`: every tensor read into memory of its own, or written without a flush to disk.
Veneer flushes what it saves, reads it back, and checks a file before it changes a model; PEFT does none of
these.
"""

import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.hotswap import hotswap_adapter as peft_hotswap
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import veneer
from benchmarks.harness import Aim, Contender, Figure, Options, Table, main, measure

WEIGHTS = "adapter_model.safetensors"
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
AIMS = {"load": 0.15, "load a second": 0.15, "hotswap": 0.5, "save": 0.5, "merge": 1.0, "unmerge": 1.0, "fold in": 1.0}


class Experts(nn.Module):
    """A layer whose experts are linear layers, as before transformers fused them."""

    def __init__(self, hidden: int, inner: int, experts: int) -> None:
        super().__init__()
        for name in LAYERS[:4]:
            setattr(self, name, nn.Linear(hidden, hidden, bias=False))
        self.experts = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(hidden, inner, bias=False) for name in LAYERS[4:]}) for _ in range(experts)
        )


def llama(hidden: int, inner: int, layers: int, heads: int) -> nn.Module:
    """A Llama of this shape with a small vocabulary."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=256,
    )
    return LlamaForCausalLM(config)


def mixtral(hidden: int, inner: int, layers: int, experts: int) -> nn.Module:
    """A Mixtral of this shape: each layer's experts are two parameters."""
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=experts,
        vocab_size=256,
    )
    return MixtralForCausalLM(config)


def mixture(layers: int, experts: int) -> nn.Module:
    """Experts of three linear layers each: with 4 × 64 of them, 784 adapted layers with attention."""
    return nn.ModuleDict({"layers": nn.ModuleList(Experts(256, 128, experts) for _ in range(layers))})


SHAPES: Mapping[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "SmolLM2's 210 layers": (lambda: llama(576, 1536, 30, 9), {"r": 16, "target_modules": LAYERS}),
    "Llama-7B's 224 layers, narrow": (lambda: llama(64, 176, 32, 4), {"r": 8, "target_modules": LAYERS}),
    "a layer of Llama-7B's size": (lambda: llama(4096, 11008, 1, 32), {"r": 64, "target_modules": LAYERS}),
    "4 × 64 experts as linear layers": (lambda: mixture(4, 64), {"r": 16, "target_modules": LAYERS}),
    "8 × 64 experts in 16 parameters": (
        lambda: mixtral(256, 128, 8, 64),
        {"r": 16, "target_modules": LAYERS[:4], "target_parameters": EXPERTS},
    ),
}
FILES_ALONE = {"SmolLM2's 210 layers"}  # of merges the shapes below say as much, in a tenth of the time
QUICK: Mapping[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "two narrow layers": (lambda: llama(64, 176, 2, 4), {"r": 8, "target_modules": LAYERS}),
    "2 × 4 experts as linear layers": (lambda: mixture(2, 4), {"r": 4, "target_modules": LAYERS}),
}


class Library:
    """A base under one library, and what is asked of it. Methods that end in `_ready` prepare and are not timed."""

    def __init__(self, library: Any, base: nn.Module, source: Path, folder: Path) -> None:
        self.library, self.base, self.source, self.folder = library, base, source, folder
        self.model: Any = None
        self.saved, self.merged = 0, False

    def bare_ready(self) -> nn.Module:
        """The base without adapters."""
        if self.model is not None:
            self.base, self.model = self.model.unload(), None
        return self.base

    def loaded_ready(self) -> Any:
        """The model with the one adapter `default`."""
        self.model = self.library.PeftModel.from_pretrained(self.bare_ready(), str(self.source))
        return self.model

    def place_ready(self) -> tuple[Any, str]:
        """The model, and a folder that is not there."""
        self.saved += 1
        return self.alone_ready(), str(self.folder / f"{self.library.__name__}{self.saved}")

    def alone_ready(self) -> Any:
        """The model with just `default`, not merged."""
        if self.model is None:
            return self.loaded_ready()
        if "second" in self.model.peft_config:
            self.model.delete_adapter("second")
        if self.merged:
            self.unmerge(self.model)
        return self.model

    def merged_ready(self) -> Any:
        """The model with its adapter merged."""
        model = self.alone_ready()
        self.merge(model)
        return model

    def merge(self, model: Any) -> None:
        """The adapter into the weights for a while."""
        model.merge_adapter()
        self.merged = True

    def unmerge(self, model: Any) -> None:
        """And out of them."""
        model.unmerge_adapter()
        self.merged = False

    def load(self, base: nn.Module) -> None:
        """An adapter onto a bare base."""
        self.model = self.library.PeftModel.from_pretrained(base, str(self.source))

    def second(self, model: Any, name: str = "second") -> None:
        """One more adapter."""
        model.load_adapter(str(self.source), name)

    def hotswap(self, model: Any) -> None:
        """Other values for the adapter that is there."""
        swap = veneer.hotswap_adapter if self.library is veneer else peft_hotswap
        swap(model, str(self.source), "default")

    def save(self, given: tuple[Any, str]) -> None:
        """The adapter into a new folder."""
        model, place = given
        model.save_pretrained(place, selected_adapters=["default"])

    def fold(self, model: Any) -> None:
        """The adapter into the base for good."""
        self.base, self.model = model.merge_and_unload(), None


def saved_adapter(build: Callable[[], nn.Module], fields: dict[str, Any], folder: Path) -> Path:
    """A folder with an adapter that changes what the model does, written by PEFT."""
    torch.manual_seed(0)
    model = peft.get_peft_model(build(), peft.LoraConfig(**fields))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.01)
    model.save_pretrained(str(folder))
    return folder


def tables_of(name: str, options: Options, folder: Path) -> list[Table]:
    """Every operation on one shape."""
    build, fields = (QUICK if options.quick else SHAPES)[name]
    source = saved_adapter(build, fields, folder / "source")
    ours, theirs = (Library(library, build(), source, folder) for library in (veneer, peft))
    values = load_file(source / WEIGHTS)
    file = folder / "alone.safetensors"
    alone = {
        "load": lambda: {key: value.clone() for key, value in load_file(source / WEIGHTS).items()},
        "save": lambda: save_file(values, file),
    }
    alone["load a second"] = alone["hotswap"] = alone["load"]
    pairs: dict[str, tuple[str, str]] = {
        "load": ("load", "bare_ready"),
        "load a second": ("second", "alone_ready"),
        "hotswap": ("hotswap", "alone_ready"),
        "save": ("save", "place_ready"),
        "merge": ("merge", "alone_ready"),
        "unmerge": ("unmerge", "merged_ready"),
        "fold in": ("fold", "alone_ready"),
    }
    runs = {
        step: {
            "PEFT": Contender(getattr(theirs, run), getattr(theirs, ready)),
            "Veneer": Contender(getattr(ours, run), getattr(ours, ready)),
        }
        for step, (run, ready) in pairs.items()
    }
    if "target_parameters" in fields:  # which peft's hotswap does not take
        del runs["hotswap"]
    if name in FILES_ALONE:
        runs = {step: both for step, both in runs.items() if step in alone}
    size = round(sum(value.nbytes for value in values.values()) / 2**20, 1)
    return [
        measure(
            f"{step}: {name}",
            {**({"file alone": alone[step]} if step in alone else {}), **contenders},
            options,
            reference="PEFT",
            rounds=3,
            warmup=1,
            aims={"Veneer": Aim(at_most=AIMS[step])},
            setting={"tensors": len(values), "MiB": size, "rank": fields["r"], "dtype": "fp32"},
        )
        for step, contenders in runs.items()
    ]


def among_others(options: Options, folder: Path) -> list[Table]:
    """Loading, saving and swapping while 1, 10 or 50 adapters are there: four layers of 7 projections."""
    build, fields = partial(llama, 64, 176, 4, 4), {"r": 8, "target_modules": LAYERS}
    source = saved_adapter(build, fields, folder / "source")
    counts = (1, 3) if options.quick else (1, 10, 50)
    tables = []
    steps = {"load one more": ("second", "alone_ready"), "hotswap": ("hotswap", ""), "save": ("save", "place_ready")}
    crowds = {
        (word, count): Crowd(library, build(), source, folder, count)
        for word, library in (("PEFT", peft), ("Veneer", veneer))
        for count in counts
    }
    for step, (run, ready) in steps.items():
        contenders = {
            f"{word}, {count} there": Contender(getattr(crowd, run), getattr(crowd, ready or "crowd_ready"))
            for (word, count), crowd in crowds.items()
        }
        tables.append(
            measure(
                f"{step} among others",
                contenders,
                options,
                reference="PEFT, 1 there",
                rounds=3,
                warmup=1,
                aims={f"Veneer, {counts[-1]} there": Aim(at_most=1.5, against="Veneer, 1 there")},
                setting={"layers": 28, "rank": 8},
            )
        )
    return tables


class Crowd(Library):
    """A model with many adapters."""

    def __init__(self, library: Any, base: nn.Module, source: Path, folder: Path, count: int) -> None:
        super().__init__(library, base, source, folder)
        self.loaded_ready()
        for index in range(count - 1):
            self.second(self.model, f"other{index}")

    def crowd_ready(self) -> Any:
        """The model as it is."""
        return self.model


def figure(options: Options) -> Figure:
    """All shapes, then many adapters."""
    tables: list[Table] = []
    for name in QUICK if options.quick else SHAPES:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tables += tables_of(name, options, Path(folder))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tables += among_others(options, Path(folder))
    about = (
        "Files and weights of adapters: the same operations in both libraries, and the file alone. Veneer's save "
        "flushes to disk and reads back; its sums are made in float64 and rounded once, and unmerging is exact."
    )
    return Figure("adapter_files", "Save, load, swap, merge", about, tables)


if __name__ == "__main__":
    main(figure, __doc__)
