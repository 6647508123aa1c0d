"""Which adapters act. One `Route` is shared by all layers of a model and is all they look at."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Route:
    """The adapters that act in the next forward pass, in order.

    active   the adapters that were chosen
    enabled  False while adapters are disabled
    merged   the adapters that are part of the weights just now, and so must not be added again
    acting   what follows: the adapters whose effect the output has, added or merged
    plan     and those of them that layers must add
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.merged: tuple[str, ...] = ()
        self.acting: tuple[str, ...] = ()
        self.plan: tuple[str, ...] = ()

    def set(
        self,
        *,
        active: tuple[str, ...] | None = None,
        enabled: bool | None = None,
        merged: tuple[str, ...] | None = None,
    ) -> None:
        """Change what is chosen, enabled or merged; what layers read follows."""
        self.active = self.active if active is None else active
        self.enabled = self.enabled if enabled is None else enabled
        self.merged = self.merged if merged is None else merged
        self.acting = (self.merged or self.active) if self.enabled else ()
        self.plan = () if self.merged else self.acting

    @contextmanager
    def following(self, acting: tuple[str, ...], plan: tuple[str, ...]) -> Iterator[None]:
        """Within the block, layers read these, whatever is chosen outside."""
        outside = self.acting, self.plan
        self.acting, self.plan = acting, plan
        try:
            yield
        finally:
            self.acting, self.plan = outside


class RoutedCheckpoint:
    """A gradient-checkpointing function that recomputes with the adapters of forward time.

    Without it, an adapter switched between forward and backward would be recomputed in place of the one whose
    output was used, and gradients would be silently wrong.
    """

    def __init__(self, checkpoint: Callable[..., Any], route: Route) -> None:
        self.checkpoint = checkpoint
        self.route = route

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `function` under the wrapped checkpointing, now and at recompute on the route of now."""
        acting, plan = self.route.acting, self.route.plan

        def run(*inputs: Any, **named: Any) -> Any:
            with self.route.following(acting, plan):
                return function(*inputs, **named)

        return self.checkpoint(run, *args, **kwargs)
