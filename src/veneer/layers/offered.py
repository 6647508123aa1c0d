"""Names that a front offers to other libraries, and that give way to what the base calls by the same name.

A base layer may have an attribute `scaling`, a child `merge` or a method `set_scale` that its own forward uses. On such
a layer the name goes on meaning that.
"""

from collections.abc import Callable
from inspect import getattr_static
from types import MethodType
from typing import Any

_NOWHERE = object()
_TABLES = ("_parameters", "_buffers", "_modules")


class Offered:
    """A method or property on a front's class, behind everything the module itself has by that name.

    assign  what to use instead of assigning to the name; "" where an instance may be given an attribute of that name
    """

    def __init__(self, function: Callable[..., Any], *, method: bool, assign: str = "") -> None:
        self.function = function
        self.method = method
        self.assign = assign
        self.name = function.__name__
        self.__doc__ = function.__doc__

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return self.function if self.method else self
        own = vars(module)
        if self.name in own:
            return own[self.name]
        for table in _TABLES:
            if self.name in own.get(table, ()):
                return own[table][self.name]
        return MethodType(self.function, module) if self.method else self.function(module)

    def __set__(self, module: Any, value: Any) -> None:
        if self.assign and self.name not in vars(module):
            raise AttributeError(f"{self.name} cannot be assigned: use {self.assign}.")
        vars(module)[self.name] = value

    def __delete__(self, module: Any) -> None:
        if self.name not in vars(module):
            raise AttributeError(f"{self.name} is no attribute of this {type(module).__name__} itself.")
        del vars(module)[self.name]


def offered_method(function: Callable[..., Any]) -> Any:
    """Decorate a method that gives way to a name of the base's."""
    return Offered(function, method=True)


def offered(function: Callable[..., Any]) -> Any:
    """Decorate a property that gives way to a name of the base's."""
    return Offered(function, method=False)


def offered_state(assign: str) -> Callable[[Callable[..., Any]], Any]:
    """The same for what is changed by calling something: assigning to it raises AttributeError, which says so."""
    return lambda function: Offered(function, method=False, assign=assign)


def kept_names(front: type, base: type) -> dict[str, Any]:
    """What the base's class itself has under names that the front offers, to be put before the front."""
    names = {name for cls in front.__mro__ for name, value in vars(cls).items() if isinstance(value, Offered)}
    found = {name: getattr_static(base, name, _NOWHERE) for name in sorted(names)}
    return {name: value for name, value in found.items() if value is not _NOWHERE}
