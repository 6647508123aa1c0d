"""Several adapters on one layer, each on its own rows of the batch, in as few products and copies as possible.

One after the other, each would copy the layer's output and wait for its own small products. So those on linear layers
are multiplied together: one batched product serves all adapters of about one rank, whatever else they are.
"""

import torch
from torch import Tensor, nn

from veneer.layers import swap
from veneer.layers.kinds import Layer
from veneer.layers.lineup import Plan, keeping_of, lineup_of
from veneer.layers.stacked import add_stack


def serves_rows(plan: Plan) -> bool:
    """Whether the adapters of a plan serve rows of a batch: then all of them do."""
    return bool(plan) and plan[0].part is not None and plan[0].part.rows is not None


def serve_rows(plan: Plan, x: Tensor, y: Tensor, layer: Layer) -> Tensor:
    """The layer's output y with each adapter of the plan on its part, which names rows. No row is in two parts."""
    keeping = keeping_of(plan)
    lineup = lineup_of(layer, plan, keeping)
    own = not torch.is_grad_enabled() and _makes_its_output(layer)
    for team in lineup.teams:
        groups, stack = lineup.stack(team, layer, x, keeping)
        y = add_stack(stack, groups, x, y, batch=team.parts[0].batch, p=team.p, own=own)
    if not lineup.alone:
        return y
    changed = [part.changed(lambda x, y, adapter=adapter: adapter(x, y, layer), x, y) for adapter, part in lineup.alone]
    rows, new = zip(*changed, strict=True)
    return y.index_copy(0, torch.cat(rows), torch.cat(new))


def _makes_its_output(layer: Layer) -> bool:
    """Whether what the layer returns is a tensor of its own, which nobody else has."""
    return swap.base_class(layer).forward is nn.Linear.forward
