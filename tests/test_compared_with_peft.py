"""The tables of docs/compared-with-peft.md, held against PEFT and against what is here."""

import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.tuners.lora import LoraModel
from torch import nn

import veneer
from veneer.config.lora_config import NOT_YET, NOTES
from veneer.errors import UnknownFieldError

PAGE = (Path(__file__).parent.parent / "docs" / "compared-with-peft.md").read_text(encoding="utf-8")
HERE = {"same", "stricter", "more"}
WORDS = HERE | {"refused", "absent", "note"}
# A parameter of PEFT that means nothing here, by the name of the row.
LEFT_OUT = {
    "kwargs",  # each of ours is named
    "args",
}


def table(title: str) -> dict[str, str]:
    """{name: word} of the table under a heading."""
    section = PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| `([\w.]+)` \| (\w+) \|", section, flags=re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a name has two rows"
    return dict(rows)


FIELDS = table("Fields of LoraConfig")
METHODS = {"PeftModel": table("Methods of PeftModel"), "LoraModel": table("Methods of LoraModel")}
FUNCTIONS = table("Functions and classes")
DEEPER = table("Functions of PEFT's submodules")


def public(cls: type, beyond: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_") and name not in dir(beyond)}


def of_lora(name: str) -> bool:
    """Whether a name that PEFT exports belongs to LoRA, or to no single method."""
    value = getattr(peft, name)
    home = getattr(value, "__module__", "") or ""
    if name.startswith("_") or inspect.ismodule(value) or not callable(value):
        return False
    return not home.startswith("peft.tuners") or home.startswith("peft.tuners.lora")


def test_every_name_of_peft_has_a_row():
    assert set(FIELDS) == {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert set(METHODS["PeftModel"]) == public(peft.PeftModel, nn.Module)
    assert set(METHODS["LoraModel"]) == public(LoraModel, nn.Module)
    assert set(FUNCTIONS) == {name for name in dir(peft) if of_lora(name)}


def test_every_word_is_one_of_the_legend():
    used = {*FIELDS.values(), *METHODS["PeftModel"].values(), *METHODS["LoraModel"].values(), *FUNCTIONS.values()}
    assert used | set(DEEPER.values()) == WORDS


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_what_its_row_says(name):
    word = FIELDS[name]
    ours = {field.name for field in dataclasses.fields(veneer.LoraConfig)} | {"peft_type"}
    assert (word in HERE) == (name in ours)
    if word == "note":
        assert name in NOTES
        veneer.LoraConfig(**{name: "anything"})
    if word == "refused":
        assert name in NOT_YET
        with pytest.raises(UnknownFieldError, match=name):
            veneer.LoraConfig(**{name: {"set": 1}})


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def check(name: str, word: str, ours: Any, theirs: Any) -> None:
    assert word != "absent", f"{name} is here; say so"
    if not inspect.isfunction(theirs) and not inspect.ismethod(theirs):
        return
    needed = {
        parameter.name
        for parameter in parameters(theirs).values()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    have = parameters(ours)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in have.values()):
        return
    assert needed <= set(have), f"{name} lacks {sorted(needed - set(have))}"


METHOD_ROWS = [(cls, name) for cls, rows in METHODS.items() for name in rows]


@pytest.mark.parametrize(("cls", "name"), METHOD_ROWS)
def test_a_method_is_what_its_row_says(cls, name):
    word = METHODS[cls][name]
    ours, theirs = getattr(veneer, cls), {"PeftModel": peft.PeftModel, "LoraModel": LoraModel}[cls]
    if word == "absent":
        assert name not in dir(ours)
    else:
        assert name in dir(ours), f"{cls}.{name} is not here"
        check(f"{cls}.{name}", word, inspect.getattr_static(ours, name), inspect.getattr_static(theirs, name))


@pytest.mark.parametrize("name", [*FUNCTIONS, *DEEPER])
def test_a_function_is_what_its_row_says(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "attr", dataclasses)  # PEFT's corda.py imports it without declaring it
    word = FUNCTIONS.get(name) or DEEPER[name]
    home, _, short = f"peft.{name}".rpartition(".") if name in FUNCTIONS else name.rpartition(".")
    theirs = getattr(importlib.import_module(home), short)
    if word == "absent":
        assert short not in dir(veneer)
    else:
        assert short in dir(veneer), f"veneer.{short} is not here"
        check(name, word, getattr(veneer, short), theirs)
