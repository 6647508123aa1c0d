"""Gradient checkpointing that recomputes on the route of forward time."""

from collections.abc import Callable
from typing import Any

from veneer.errors import MergeError
from veneer.layers.route import Route


class RoutedCheckpoint:
    """A gradient-checkpointing function that recomputes with the adapters of forward time.

    Without it, an adapter switched between forward and backward would be recomputed in place of the one whose
    output was used, and gradients would be silently wrong.
    """

    def __init__(self, checkpoint: Callable[..., Any], route: Route) -> None:
        self.checkpoint = checkpoint
        self.route = route

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `function` under the wrapped checkpointing, now and at recompute on the route of now.

        Raises MergeError at recompute if the weights of the base are others by then.
        """
        acting, plan, weights = self.route.acting, self.route.plan, (self.route.merged, self.route.standing)

        def run(*inputs: Any, **named: Any) -> Any:
            if weights != (self.route.merged, self.route.standing):
                raise MergeError(
                    "Between forward and backward, adapters were merged or unmerged, or one was switched that replaces "
                    "biases or weights of the base, so gradient checkpointing cannot compute the forward again: call "
                    "backward before that, or put things back first."
                )
            if (self.route.acting, self.route.plan) == (acting, plan):  # at forward time, so in the threads it has
                return function(*inputs, **named)
            with self.route.following(acting, plan):
                return function(*inputs, **named)

        return self.checkpoint(run, *args, **kwargs)
