"""The alias' tables, without putting it in place: what it answers, and what the libraries around it ask for."""

import ast
import sys
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec
from pathlib import Path

import pytest

import veneer
from veneer.errors import AliasError
from veneer.integrations.as_peft import install_as_peft, names
from veneer.integrations.as_peft.metadata import Finder
from veneer.integrations.as_peft.modules import made

LIBRARIES = ("transformers", "trl", "accelerate", "diffusers", "sentence_transformers")
# What these libraries import in functions that Veneer does not need or replaces, and for methods other than LoRA.
NOT_NEEDED = {
    ("peft.utils.transformers_weight_conversion", "build_peft_weight_mapping"),  # load_adapter is Veneer's
    ("peft.helpers", "disable_input_dtype_casting"),  # diffusers' layerwise casting passes adapters by
    ("peft", "LoKrConfig"),
    ("peft.tuners.lokr.layer", "factorization"),
}


def asked_for(library: str) -> Iterator[tuple[str, str]]:
    """(module, name) of each `from peft… import name` in a library's source."""
    spec = find_spec(library)
    assert spec is not None
    assert spec.origin is not None
    for file in Path(spec.origin).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "peft" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "peft" and not node.level:
                yield from ((str(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_a_library_imports_from_peft_is_there(library):
    wanted = set(asked_for(library)) - NOT_NEEDED
    assert wanted, "the library does not import peft at all any more"
    assert [pair for pair in wanted if pair[1] not in names.MODULES.get(pair[0], ())] == []


def test_every_name_is_answered():
    modules = made()
    for module, mine in names.MODULES.items():
        for name in mine:
            assert getattr(modules[module], name) is not None


def test_a_public_name_is_veneers_own():
    modules = made()
    assert modules["peft"].LoraConfig is veneer.LoraConfig
    assert modules["peft.tuners.lora"].LoraConfig is veneer.LoraConfig
    assert modules["peft"].utils is modules["peft.utils"]
    assert modules["peft"].__version__ == "0.21.2"
    assert modules["peft"].__veneer__ == veneer.__version__
    assert "LoraConfig" in dir(modules["peft"])
    assert modules["peft"].__all__ == list(names.MODULES["peft"])


def test_the_finder_answers_with_the_modules_of_the_alias_and_no_other():
    modules = made()
    finder = Finder(modules)
    spec = finder.find_spec("peft.tuners.lora")
    assert spec is not None
    assert module_from_spec(spec) is modules["peft.tuners.lora"]
    assert finder.find_spec("peft.tuners.vera") is None
    assert finder.find_spec("torch") is None


@pytest.mark.parametrize(
    ("module", "name", "says"),
    [
        ("peft", "IA3Config", "has no attribute 'IA3Config': this is Veneer under PEFT's name .*no other method"),
        ("peft", "PromptTuningConfig", "no other method"),
        ("peft", "AdaLoraConfig", "rank_pattern"),
        ("peft", "LoraConfg", "did you mean .LoraConfig"),
        ("peft.utils", "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "target_modules=None"),
    ],
)
def test_what_is_absent_says_so(module, name, says):
    with pytest.raises(AttributeError, match=says):
        getattr(made()[module], name)


@pytest.mark.parametrize("name", ["PrefixTuningConfig", "PeftMixedModel", "PromptLearningConfig"])
def test_a_name_that_is_only_asked_about_cannot_be_made(name):
    with pytest.raises(TypeError, match=f"peft.{name} is not part of Veneer"):
        getattr(made()["peft"], name)()


def test_it_refuses_where_something_has_looked_for_peft_already(monkeypatch):
    before = list(sys.meta_path)
    monkeypatch.setitem(sys.modules, "peft", sys)
    with pytest.raises(AliasError, match="real PEFT"):
        install_as_peft()
    monkeypatch.delitem(sys.modules, "peft")
    monkeypatch.setitem(sys.modules, "trl", sys)
    with pytest.raises(AliasError, match="trl looked for PEFT already"):
        install_as_peft()
    assert "peft" not in sys.modules
    assert sys.meta_path == before
