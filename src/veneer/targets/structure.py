"""What a model is made of, as the matcher needs it: paths and modules, seen without any adapter on them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from veneer.layers.adapter import Adapter
from veneer.layers.attach import Adapters, base_class
from veneer.layers.kinds import kind_of
from veneer.layers.saved_module import Copies


@dataclass(frozen=True)
class Structure:
    """A model's modules by path, without adapters and copies.

    modules        every module but the root, in the model's order
    layers         those that can be adapted
    linear_layers  those that "all-linear" means: linear, and not the output head
    """

    model_name: str
    modules: dict[str, nn.Module]
    layers: list[str]
    linear_layers: list[str]
    readers: dict[str, str]

    def refusal(self, path: str) -> str | None:
        """Why the module at `path` cannot be adapted, or None if it can."""
        module = self.modules[path]
        kind = kind_of(module)
        if kind is None:
            inside = dict.fromkeys(p.rpartition(".")[2] for p in self.layers if p.startswith(f"{path}."))
            hint = f"it holds {', '.join(inside)}; name those" if inside else "Linear, Conv1D and Embedding are"
            return f"{base_class(module).__name__} is not a kind of layer that can be adapted ({hint})"
        return self.readers.get(path) or kind.refuse(module)

    def has_bias(self, path: str) -> bool:
        """Whether the module at `path` has a bias parameter of its own."""
        return self.modules[path]._parameters.get("bias") is not None


def structure_of(model: nn.Module) -> Structure:
    """Look at a model. A module reached by several paths counts once, under the first."""
    modules = dict(_bare_modules(model))
    layers = [path for path, module in modules.items() if kind_of(module) is not None]
    head = _output_head(model)
    linear = [path for path in layers if modules[path] is not head and is_linear(modules[path])]
    readers = {
        path: "its MultiheadAttention reads its weight without calling it, so an adapter there would be ignored; "
        "exclude it with exclude_modules"
        for path, module in modules.items()
        if isinstance(modules.get(path.rpartition(".")[0], model), nn.MultiheadAttention)
    }
    return Structure(base_class(model).__name__, modules, layers, linear, readers)


def _bare_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    skipped: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, Adapters | Adapter | Copies):
            skipped.append(f"{path}.")
        elif path and not path.startswith(tuple(skipped)):
            yield path, module


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" includes layers of this kind."""
    kind = kind_of(module)
    return kind is not None and kind.linear


def _output_head(model: nn.Module) -> nn.Module | None:
    """The layer that turns the last hidden state into logits, where the model says which it is."""
    getter: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return None if getter is None else getter()
