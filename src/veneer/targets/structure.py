"""What a model is made of, as the matcher needs it: paths and modules, seen without any adapter on them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from veneer.layers.adapter import Adapter
from veneer.layers.attach import Adapters
from veneer.layers.kinds import ATTENTION, KINDS, PACKED, class_names, kind_of
from veneer.layers.saved_module import Copies
from veneer.layers.sharded import shape_of, size_of
from veneer.layers.swap import base_class
from veneer.layers.token_rows import RowsByAdapter
from veneer.layers.walk import modules_outside
from veneer.targets.readers import READERS

_GETTERS = ("get_input_embeddings", "get_output_embeddings")


@dataclass(frozen=True)
class Structure:
    """A model's modules by path, without adapters and copies.

    model_name     the class of the model
    modules        every module but the root, in the model's order
    layers         those that can be adapted
    linear_layers  those that "all-linear" means: linear, and neither the output head nor a part of an attention module
    readers        why a module cannot be adapted whose weight its owner reads, by path
    parameters     full names of all parameters, those of the model itself included
    """

    model_name: str
    modules: dict[str, nn.Module]
    layers: list[str]
    linear_layers: list[str]
    readers: dict[str, str]
    parameters: list[str]

    def refusal(self, path: str) -> str | None:
        """Why the module at `path` cannot be adapted, or None if it can."""
        module = self.modules[path]
        kind = kind_of(module)
        if kind is None:
            inside = dict.fromkeys(p.rpartition(".")[2] for p in self.layers if p.startswith(f"{path}."))
            known = ", ".join(sorted(name.rpartition(".")[2] for name, kind in KINDS.items() if kind is not PACKED))
            hint = f"it holds {', '.join(inside)}; name those" if inside else f"{known} are"
            own = [
                name
                for name, weight in module._parameters.items()
                if weight is not None and len(shape_of(weight)) in (2, 3)
            ]
            if own and not inside:
                hint = f"name its parameters in target_parameters: {', '.join(own)}"
            return f"{base_class(module).__name__} is not a kind of layer that can be adapted ({hint})"
        return self.readers.get(path) or kind.refuse(module)

    @property
    def adaptable_parameters(self) -> list[str]:
        """Full names of the parameters that target_parameters may name: matrices, or stacks of them, of no layer."""
        found = []
        for name in self.parameters:
            path, _, own = name.rpartition(".")
            weight = self.modules[path]._parameters[own] if path else None
            if weight is not None and len(shape_of(weight)) in (2, 3) and kind_of(self.modules[path]) is None:
                found.append(name)
        return found

    @property
    def size(self) -> int:
        """How many numbers the parameters below the model hold; one that is in several places counts once."""
        own = (weight for module in self.modules.values() for weight in module._parameters.values())
        return sum({id(weight): size_of(weight) for weight in own if weight is not None}.values())

    def has_bias(self, path: str) -> bool:
        """Whether the module at `path` has a bias parameter of its own."""
        return self.modules[path]._parameters.get("bias") is not None


def structure_of(model: nn.Module) -> Structure:
    """Look at a model. A module reached by several paths counts once, under the first."""
    modules = dict(_bare_modules(model))
    layers = [path for path, module in modules.items() if kind_of(module) is not None]
    head = _output_head(model)
    parts = {f"{path}.out_proj" for path in layers if kind_of(modules[path]) is ATTENTION}
    linear = [path for path in layers if modules[path] is not head and is_linear(modules[path]) and path not in parts]
    readers = {
        path: f"{owner} reads its weight without calling it, so it would be ignored; {_instead(owner)}"
        for path, owner in _readers(model, modules).items()
    }
    parameters = [
        f"{path}.{name}" if path else name
        for path, module in {"": model, **modules}.items()
        for name, value in module._parameters.items()
        if value is not None
    ]
    return Structure(base_class(model).__name__, modules, layers, linear, readers, parameters)


def _bare_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    found = modules_outside(model, (Adapters, Adapter, Copies, RowsByAdapter))
    return ((path, module) for path, module in found if path)


def _readers(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, str]:
    """The class that reads the weights of a module, or of one that it is in, by the module's path."""
    found: dict[str, str] = {}
    reading: dict[type, list[tuple[str, tuple[str, ...] | None]]] = {}  # of a class: (class it derives from, children)
    for path in modules:
        parent, _, name = path.rpartition(".")
        owner = type(modules.get(parent, model))
        if owner not in reading:
            named = zip(owner.__mro__, class_names(owner), strict=True)
            reading[owner] = [(cls.__name__, READERS[known]) for cls, known in named if known in READERS]
        for word, children in reading[owner]:
            if children is None or name in children:
                found[path] = word
                break
        else:
            if parent in found:
                found[path] = found[parent]
    return found


def _instead(owner: str) -> str:
    if owner == "MultiheadAttention":
        return "name the attention module, of which it is a part, in target_modules"
    return "use exclude_modules"


def embeddings(model: nn.Module) -> list[str]:
    """Paths of the input embedding and the output head, where the model says which they are."""
    found = [named_by(model, getter) for getter in _GETTERS]
    return [path for path, module in _bare_modules(model) if any(module is one for one in found)]


def named_by(model: nn.Module, getter: str) -> nn.Module | None:
    """The module that a getter of the model answers; None if it has none, or says that there is no such module."""
    ask: Callable[[], nn.Module | None] | None = getattr(model, getter, None)
    try:
        return None if ask is None else ask()
    except (NotImplementedError, AttributeError):  # transformers' ways to say so: a Wav2Vec2 reads no tokens
        return None


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" includes layers of this kind."""
    kind = kind_of(module)
    return kind is not None and kind.linear


def _output_head(model: nn.Module) -> nn.Module | None:
    """The layer that turns the last hidden state into logits, where the model says which it is."""
    return named_by(model, "get_output_embeddings")
