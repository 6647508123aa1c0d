import builtins
import inspect
import re

import pytest

from veneer import errors

DRAWN = re.compile(r"^ {4}(?P<lead>[│├└─ ]*)(?P<name>\w+) \((?P<bases>[\w, ]+)\)")


def drawn_tree():
    """{class: its base, the built-ins it also is}, as the docstring of the module draws it."""
    tree, parents = {}, {0: "VeneerError"}
    for line in errors.__doc__.splitlines():
        found = DRAWN.match(line)
        if not found:
            continue
        depth = len(found["lead"]) // 4
        tree[found["name"]] = (parents.get(depth - 1) if depth else None, found["bases"].split(", "))
        parents[depth] = found["name"]
    return tree


def defined():
    return {
        name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and cls.__module__ == errors.__name__
    }


def test_the_drawing_names_every_class():
    assert {"VeneerError", *drawn_tree()} == set(defined())


@pytest.mark.parametrize(("name", "drawn"), drawn_tree().items())
def test_bases_are_as_drawn(name, drawn):
    parent, built_ins = drawn
    expected = {*(getattr(builtins, name) for name in built_ins), *([defined()[parent]] if parent else [])}
    if name != "VeneerWarning":
        expected |= {errors.VeneerError} if parent in (None, "VeneerError") else set()
    assert set(defined()[name].__bases__) == expected


def test_a_misspelt_argument_is_a_type_error_as_in_python():
    assert issubclass(errors.UnknownFieldError, TypeError)
    assert issubclass(errors.UnknownFieldError, errors.ConfigError)


def test_bullet_list_has_a_line_for_each_problem():
    assert errors.bullet_list("Two things:", ["one", "two"]) == "Two things:\n  one\n  two"
