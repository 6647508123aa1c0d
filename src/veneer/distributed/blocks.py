"""Which parts of a model are gathered together: the blocks that it repeats, each by itself, and the rest as one."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from veneer.errors import AttachError, bullet_list, shortened
from veneer.layers.attach import Adapters
from veneer.layers.saved_module import Copies
from veneer.layers.swap import base_class
from veneer.layers.token_rows import RowsByAdapter
from veneer.layers.walk import modules_outside

_OURS = (Adapters, Copies, RowsByAdapter)


@dataclass(frozen=True)
class Group:
    """What is gathered at once: modules that are called, with all that is in them and in no group before.

    path  of the first of them, for a person
    """

    path: str
    modules: list[nn.Module]


def groups_of(model: nn.Module) -> list[Group]:
    """The groups of a model in the order in which they must be made: what is inside comes first, the model last.

    Blocks are those that transformers must not split (`_no_split_modules`); in other models the modules of one class
    that a list has. One that shares a parameter with the rest of the model goes with the rest.

    Raises AttachError if what trains in one group has several dtypes.
    """
    blocks = list(_apart(model, _unsplit(model) or list(_repeated(model))))
    groups = [*reversed(blocks), ("", model)]  # children stand after their parents
    taken: set[int] = set()
    found: list[Group] = []
    for path, module in groups:
        found += _by_dtype(path, module, taken)
        taken |= {id(part) for part in module.modules()}
    return found


def _unsplit(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of the modules of classes that some part of the model says must not be split."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [(path, module) for path, module in modules_outside(model, _OURS) if base_class(module).__name__ in names]


def _repeated(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of what the outermost lists hold, where they hold several modules of one class."""
    inside: set[int] = set()
    for path, module in modules_outside(model, _OURS):
        children = list(module.children())
        classes = Counter(map(base_class, children))
        if id(module) in inside or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        of_one_class = [child for child in children if classes[base_class(child)] > 1]
        for name, child in module.named_children():
            if child in of_one_class:
                yield f"{path}.{name}".lstrip("."), child
                inside |= {id(part) for part in child.modules()}


def _apart(model: nn.Module, blocks: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """Those blocks that have parameters, and share none with what is outside of them."""
    holders: Counter[int] = Counter(_holdings(model))
    for path, block in blocks:
        own = Counter(_holdings(block))
        if own and all(holders[parameter] == times for parameter, times in own.items()) and block is not model:
            yield path, block


def _holdings(module: nn.Module) -> Iterator[int]:
    """The id of each parameter, once for each module that has it."""
    return (id(p) for part in module.modules() for p in part._parameters.values() if p is not None)


def _by_dtype(path: str, module: nn.Module, taken: set[int]) -> Iterator[Group]:
    """The group of a module; before it, of copies trained in full in another dtype, one for each dtype.

    FSDP reduces the gradients of a group in one dtype.
    """
    parts = [(name, part) for name, part in module.named_modules() if id(part) not in taken]
    copies = {
        id(copy): (f"{path}.{name}.{adapter}".lstrip("."), copy)
        for name, part in parts
        if isinstance(part, Copies)
        for adapter, copy in part.named_children()
    }
    inside = {id(part) for _, copy in copies.values() for part in copy.modules()}
    dtypes = _trained_dtypes(part for _, part in parts if id(part) not in inside)
    if len(dtypes) > 1:
        of = [f"{dtype}: {name}" for dtype, name in _first_of_each(module, parts)]
        headline = f"What trains in {path or type(module).__name__} has several dtypes, and FSDP takes one:"
        advice = "Bring the trained parameters to one dtype before sharding: parameter.data = parameter.data.float()."
        raise AttachError(bullet_list(headline, [*shortened(of), advice]))
    apart: dict[torch.dtype, list[tuple[str, nn.Module]]] = {}
    for name, copy in copies.values():
        own = {parameter.dtype for parameter in copy.parameters()}
        if len(own) > 1:
            raise AttachError(f"{name}, a copy trained in full, has several dtypes. Bring it to one before sharding.")
        dtypes = dtypes or own
        if own and own != dtypes:
            apart.setdefault(next(iter(own)), []).append((name, copy))
    for found in apart.values():
        yield Group(found[0][0], [copy for _, copy in found])
    yield Group(path, [module])


def _trained_dtypes(modules: Iterator[nn.Module]) -> set[torch.dtype]:
    return {p.dtype for part in modules for p in part._parameters.values() if p is not None and p.requires_grad}


def _first_of_each(module: nn.Module, parts: list[tuple[str, nn.Module]]) -> Iterator[tuple[torch.dtype, str]]:
    seen: set[torch.dtype] = set()
    for name, part in parts:
        for own, parameter in part._parameters.items():
            if parameter is not None and parameter.requires_grad and parameter.dtype not in seen:
                seen.add(parameter.dtype)
                yield parameter.dtype, f"{name}.{own}".lstrip(".")
