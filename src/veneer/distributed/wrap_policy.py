"""What torch's older FullyShardedDataParallel should put apart, so that what trains does not mix with what does not."""

import os

from torch import nn

from veneer.errors import AttachError
from veneer.layers.swap import base_class
from veneer.model.sharded import read_by_owners

_SETTING = "FSDP_TRANSFORMER_CLS_TO_WRAP"  # accelerate's


class WrapPolicy:
    """Says of a module whether FullyShardedDataParallel should flatten it by itself.

    blocks  classes of which each module is one
    read    modules that their owner reads instead of calling them: they stay with it

    So is what trains as a whole and holds nothing else: an adapter on a layer, a copy trained in full.
    """

    def __init__(self, blocks: tuple[type[nn.Module], ...], read: list[nn.Module]) -> None:
        self.blocks, self.read = blocks, {id(module) for module in read}

    def __call__(self, module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        """Whether to look into the module (recurse), or to wrap it."""
        return recurse or isinstance(module, self.blocks) or (id(module) not in self.read and _trains_alone(module))


def fsdp_auto_wrap_policy(model: nn.Module) -> WrapPolicy:
    """For `FullyShardedDataParallel(model, auto_wrap_policy=fsdp_auto_wrap_policy(model))`, FSDP of torch's first kind.

    That flattens the parameters of a module into one, which trains or does not (`use_orig_params=False`). Wrapped are
    the blocks that transformers must not split, or those of the classes in the environment's
    FSDP_TRANSFORMER_CLS_TO_WRAP (comma between them), and every adapter and trained copy by itself.

    Where an adapter is read and not called (`target_parameters`, `trainable_token_indices`, MultiheadAttention), or
    trains in part (LoRA-FA), FSDP needs `use_orig_params=True`, or says so. `veneer.shard` has none of these limits.

    Raises AttachError if the model has no module of a class that is named.
    """
    classes = {base_class(module).__name__: base_class(module) for module in model.modules()}
    unsplit = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    named = os.environ.get(_SETTING)
    names = unsplit if named is None else {name.strip() for name in named.split(",") if name.strip()}
    if named is not None and (missing := sorted(names - classes.keys())):
        raise AttachError(
            f"{_SETTING} names {', '.join(missing)}, and {type(model).__name__} has no module of that class."
        )
    blocks = tuple(classes[name] for name in sorted(names & classes.keys()))
    return WrapPolicy(blocks, [inner for _, part in read_by_owners(model) for inner in part.modules()])


def _trains_alone(module: nn.Module) -> bool:
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    return bool(own) and all(p.requires_grad for p in own) and len(list(module.parameters())) == len(own)
