"""Which adapters act."""

import pytest

from veneer.layers.part import parts_of
from veneer.layers.route import Route


def planned(route: Route) -> tuple[str, ...]:
    return tuple(step.name for step in route.plan)


def test_what_follows_from_what_is_chosen():
    route = Route()
    route.set(active=("a", "b"))
    assert (route.acting, planned(route)) == (("a", "b"), ("a", "b"))
    route.set(merged=("a",))
    assert (route.acting, planned(route)) == (("a",), ())
    route.set(enabled=False)
    assert (route.acting, planned(route)) == ((), ())
    route.set(enabled=True, merged=())
    assert planned(route) == ("a", "b")


def test_following_ends_with_its_block_even_by_an_error():
    route = Route()
    route.set(active=("a",))
    with pytest.raises(ZeroDivisionError), route.following((), ()):
        _ = 1 / len(route.plan)
    assert planned(route) == ("a",)


def test_serving_ends_with_its_block():
    route = Route()
    route.set(active=("c",))
    with route.serving(parts_of(["a", "b", None, "a"])):
        assert (route.acting, planned(route)) == (("a", "b"), ("a", "b"))
    assert (route.acting, planned(route)) == (("c",), ("c",))
