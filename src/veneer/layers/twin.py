"""An adapted layer as it would be without adapters: an object of its base class over the same parameters."""

from functools import partial, update_wrapper
from types import MethodType

from veneer.errors import AttachError
from veneer.layers import swap
from veneer.layers.kinds import Layer


def bare_twin(layer: Layer, child: str) -> Layer:
    """A layer of the base's class that shares the parameters, buffers and hooks of an adapted one, but no adapter.

    child  the name of what the front reads, which the twin does without

    What is assigned to a parameter of either is seen by the other. A weight that adapters are merged into is shared
    as it is. Raises AttachError if forward was replaced on the layer by something other than accelerate.
    """
    base = swap.base_class(layer)
    twin = base.__new__(base)
    fields = {name: value for name, value in vars(layer).items() if not name.startswith("_veneer_")}
    modules = {name: module for name, module in layer._modules.items() if name != child}
    vars(twin).update(fields, _modules=modules)
    if "forward" not in fields:
        return twin
    hooked = fields["forward"]
    if "_old_forward" not in fields or not isinstance(hooked, partial) or hooked.args != (layer,):
        raise AttachError(
            f"The forward method of this {base.__name__} was replaced on the instance after its adapter was attached, "
            "so there is no base layer apart from it. Undo that first."
        )
    own = MethodType(base.forward, twin)
    vars(twin).update(_old_forward=own, forward=update_wrapper(partial(hooked.func, twin), own))
    return twin
