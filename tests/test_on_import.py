"""Changes to a module of another library: made when it is there, never lost, never made twice, and undone by a test."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from veneer import on_import
from veneer.errors import VeneerWarning
from veneer.on_import import stand_before, when_imported

NAME = "a_library_of_the_test"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The source of a module that is not imported yet; nothing of it, nor of what waits for it, stays."""
    file = tmp_path / f"{NAME}.py"
    file.write_text("def answer():\n    return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    plain = [finder for finder in sys.meta_path if type(finder).__name__ != "AssertionRewritingHook"]
    monkeypatch.setattr(sys, "meta_path", plain)
    monkeypatch.setattr(on_import, "_WAITING", {})
    monkeypatch.setattr(on_import, "_ASKED", set())
    monkeypatch.setitem(sys.modules, NAME, sys)  # so that it is put back to what it was: absent
    monkeypatch.delitem(sys.modules, NAME)
    return file


def count_up(module: Any) -> None:
    module.changes = getattr(module, "changes", 0) + 1


def test_a_module_that_is_there_is_changed_at_once(library):
    module = importlib.import_module(NAME)
    when_imported(NAME, count_up)
    assert module.changes == 1


def test_a_module_is_changed_right_after_its_first_import(library):
    when_imported(NAME, count_up)
    assert NAME not in sys.modules
    assert importlib.import_module(NAME).changes == 1


def test_a_change_is_made_once_however_often_it_is_asked_for(library):
    when_imported(NAME, count_up)
    when_imported(NAME, count_up)
    module = importlib.import_module(NAME)
    when_imported(NAME, count_up)
    assert module.changes == 1


def test_asking_where_a_module_is_does_not_lose_the_change(library):
    when_imported(NAME, count_up)
    assert importlib.util.find_spec(NAME) is not None
    assert importlib.import_module(NAME).changes == 1


def test_an_import_that_fails_does_not_lose_the_change(library):
    whole = library.read_text()
    library.write_text("raise ImportError('a part of it is missing')")
    when_imported(NAME, count_up)
    with pytest.raises(ImportError, match="a part of it"):
        importlib.import_module(NAME)
    library.write_text(whole)
    importlib.invalidate_caches()
    assert importlib.import_module(NAME).changes == 1


def test_a_module_that_is_not_installed_is_not_found(library):
    when_imported("not_there_at_all", count_up)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("not_there_at_all")


def test_a_module_being_imported_is_changed_when_it_is_asked_for_again(library):
    library.write_text(
        f"import test_on_import as test\ntest.when_imported({NAME!r}, test.count_up)\nearly = 'changes' in globals()\n"
    )
    sys.modules["test_on_import"] = sys.modules[__name__]
    module = importlib.import_module(NAME)
    assert not module.early
    when_imported(NAME, count_up)
    assert module.changes == 1


def test_the_source_of_a_watched_module_can_be_read(library):
    when_imported(NAME, count_up)
    loader: Any = importlib.import_module(NAME).__spec__.loader
    assert "return 1" in loader.get_source(NAME)


def test_a_function_stands_before_another_once_and_keeps_its_name(library):
    module: Any = importlib.import_module(NAME)
    for _ in range(2):
        stand_before(module, "answer", lambda theirs: lambda: theirs() + 1)
    assert module.answer() == 2
    assert module.answer.__name__ == "answer"
    assert module.answer.__wrapped__() == 1


def test_a_library_that_lacks_the_function_is_warned_of_and_left_alone(library):
    module: Any = importlib.import_module(NAME)
    with pytest.warns(VeneerWarning, match=rf"{NAME} has no _is_it.*may not know"):
        stand_before(module, "_is_it", lambda theirs: theirs)
    assert not hasattr(module, "_is_it")
