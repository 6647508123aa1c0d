"""recipes/README.md tells of every recipe, and every recipe keeps to what they promise together."""

import ast
from pathlib import Path

import pytest

from veneer.integrations.as_peft.names import MODULES

RECIPES = Path(__file__).parent.parent / "recipes"
PAGE = (RECIPES / "README.md").read_text(encoding="utf-8")
SHARED = {"addresses", "tiny_data", "tiny_models"}
SCRIPTS = sorted(file for file in RECIPES.glob("*.py") if file.stem not in SHARED)
LINES = 100


@pytest.mark.parametrize("file", [*SCRIPTS, *sorted(RECIPES.glob("*.yaml"))], ids=lambda file: file.name)
def test_the_page_links_it(file: Path) -> None:
    assert f"[`{file.name}`]({file.name})" in PAGE


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_it_is_short_and_says_its_model_and_time(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES
    told = ast.get_docstring(ast.parse(text)) or ""
    assert "\nModel  " in told
    assert "\nTime   " in told
    assert '"--tiny"' in text


@pytest.mark.parametrize("file", [file for file in SCRIPTS if file.stem != "in_place"], ids=lambda file: file.stem)
def test_it_uses_names_that_peft_has(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    of_veneer = [node for node in imports if (node.module or "").split(".")[0] == "veneer"]
    assert [node.module for node in of_veneer] == ["veneer"]
    assert {name.name for node in of_veneer for name in node.names} <= set(MODULES["peft"])


def test_the_page_names_no_other_script() -> None:
    linked = {part.partition(")")[0] for part in PAGE.split("](")[1:]}
    assert linked == {file.name for file in RECIPES.iterdir() if file.suffix in {".py", ".yaml"}} - {
        f"{name}.py" for name in SHARED
    }
