"""Ways through a model whose cost is that of the model, however many adapters lie on it."""

from collections.abc import Callable, Iterator

from torch import nn

from veneer.layers.attach import Adapters


def modules_outside(
    model: nn.Module, tables: tuple[type[nn.Module], ...] = (Adapters,)
) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) in the order of `named_modules`, each module once, without these classes and what is in them."""
    seen: set[nn.Module] = set()
    ahead: list[tuple[str, nn.Module]] = [("", model)]
    while ahead:
        path, module = ahead.pop()
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        if module._modules:
            prefix = f"{path}." if path else ""
            children = reversed(module._modules.items())
            ahead += [
                (prefix + name, child)
                for name, child in children
                if child is not None and not isinstance(child, tables)
            ]


def finder(model: nn.Module) -> Callable[[str], nn.Module]:
    """The model's `get_submodule` for many paths: it goes down to each module once, so no module may be replaced since.

    Raises AttributeError as that does.
    """
    return _Finder(model)


class _Finder:
    # no closure: one that calls itself is a cycle, which would keep the model until the next garbage collection
    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found = {"": model}

    def __call__(self, path: str) -> nn.Module:
        module = self._found.get(path)
        if module is None:
            parent, _, name = path.rpartition(".")
            module = self(parent)._modules.get(name)
            if module is None:  # reached by an attribute, or not there
                module = self._model.get_submodule(path)
            self._found[path] = module
        return module
