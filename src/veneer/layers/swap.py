"""Change what a module is, and change it back: swap its class for one made on the fly in front of it.

`front` is what is placed there, `base` what the module was: `class LoraLinear(Adapted, Linear)`.
"""

from collections.abc import Iterator
from threading import Lock
from types import MethodType
from typing import Any, ClassVar

from torch import nn

from veneer.errors import AttachError
from veneer.layers.kinds import Layer
from veneer.layers.offered import kept_names
from veneer.layers.route import Route


class Front(nn.Module):
    """Placed in front of a module's class. Never made by itself.

    word     what the made class's name begins with
    by_rows  whether adapters on such a module can serve the rows of a batch one by one
    whole    whether it goes before a whole model, and away with the model's last adapter
    """

    word: ClassVar[str] = ""
    by_rows: ClassVar[bool] = False
    whole: ClassVar[bool] = False

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A class made on the fly has no importable name: make it again from its two halves.
        made, front = type(self), front_of(self)
        assert front is not None
        if made is not made_class(front, base_class(self)):
            raise AttachError(f"{made.__name__} cannot be copied: its class was changed again after the adapter's.")
        return _rebuild, (front, base_class(self)), self.__dict__


_MADE: dict[tuple[type[Front], type[nn.Module]], type[nn.Module]] = {}
_MAKING = Lock()


def made_class(front: type[Front], base: type[nn.Module]) -> type[nn.Module]:
    """`class <word><Base>(front, Base)`, the same object each time, in every thread."""
    with _MAKING:
        made = _MADE.get((front, base))
        if made is None:
            members = {"__module__": base.__module__, "__doc__": base.__doc__, "_veneer_front": front}
            members |= kept_names(front, base)
            made = _MADE[front, base] = _class(f"{front.word}{base.__name__}", front, base, members)
        return made


def _class(name: str, front: type[Front], base: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    """`class name(front, base)`, laid out in memory as `base`, which alone lets an instance change between the two.

    A class is laid out as its first base. Where that of `base` is no module (quanto's layers have a mixin there), the
    bases are turned round, and the order in which attributes are looked up stays.
    """
    made = type(name, (front, base), members)
    if nn.Module in _layouts(base):
        return made
    order, turned, meta = made.__mro__[1:], (base, front), type(made)

    class InFront(meta):  # type: ignore[misc]
        def mro(cls) -> list[type]:
            return [cls, *order] if cls.__bases__ == turned else super().mro()

    make: Any = InFront
    return make(name, turned, members)


def _layouts(cls: type) -> Iterator[type]:
    """The class and those it is laid out as."""
    while cls is not object:
        yield cls
        cls = cls.__base__  # type: ignore[assignment]


def _rebuild(front: type[Front], base: type[nn.Module]) -> nn.Module:
    cls = made_class(front, base)
    return cls.__new__(cls)


def front_of(module: nn.Module) -> type[Front] | None:
    """What is placed in front of the module's class, or None."""
    return getattr(type(module), "_veneer_front", None)


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class the module had before anything was placed in front; its own if nothing was."""
    mro = type(module).__mro__
    return mro[mro.index(Front) + 1] if Front in mro else type(module)


def place(module: Layer, front: type[Front]) -> None:
    """Place `front` before the module's class."""
    _change_class(module, made_class(front, type(module)))


def take_away(module: Layer) -> None:
    """Give the module its own class back. Raises AttachError if something else changed its class since."""
    front, base = front_of(module), base_class(module)
    assert front is not None
    if type(module) is not made_class(front, base):
        raise AttachError(
            f"{type(module).__name__} was wrapped after the adapter was attached (by FSDP?); detach before sharding."
        )
    _change_class(module, base)


def lay_over(module: Layer, front: type[Front], child: str, table: nn.ModuleDict, route: Route) -> None:
    """Place `front` before the module's class, with what it reads: a child that holds something by adapter name.

    Raises AttachError as `check_forward` does.
    """
    check_forward(module)
    module._modules[child] = table
    vars(module)["_veneer_route"] = route
    place(module, front)


def forget(module: Layer, child: str, name: str) -> None:
    """Drop what an adapter has in the child, if anything. With the last one the module is what it was before."""
    table = getattr(module, child)
    if name not in table:
        return
    if len(table) > 1:
        del table[name]
        return
    take_away(module)
    delattr(module, child)
    del module._veneer_route


def check_forward(module: nn.Module) -> None:
    """Raise AttachError if an instance-level forward would hide the one placed in front.

    accelerate puts its hook there and calls `_old_forward`, and leaves the class's own there when it is removed. Both
    are bound anew at each swap.
    """
    held = vars(module)
    replaced = held.get("_old_forward", held.get("forward"))
    if replaced is not None and not _is_own(module, replaced):
        raise AttachError(
            f"The forward method of this {type(module).__name__} was replaced on the instance, so an adapter would be "
            "ignored. Attach the adapter first, then patch forward."
        )


def _is_own(module: nn.Module, method: Any) -> bool:
    """Whether a bound method is what the module's class has as its forward."""
    return isinstance(method, MethodType) and method.__self__ is module and method.__func__ is type(module).forward


def _change_class(module: Layer, cls: type[nn.Module]) -> None:
    """Swap the class, and bind the forward anew wherever the instance keeps the old class's."""
    held = vars(module)
    own = [name for name in ("forward", "_old_forward") if name in held and _is_own(module, held[name])]
    object.__setattr__(module, "__class__", cls)  # torch's own looks whether it is a parameter
    for name in own:
        held[name] = MethodType(cls.forward, module)
