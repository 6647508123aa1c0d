"""The direction of imports, and what no source file may do. Read from the syntax trees, so nothing is run."""

import ast
from pathlib import Path

import pytest

import veneer

HOUSE = Path(veneer.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))
# Top to bottom: a room imports only rooms above it. Storage stands above config: it needs nothing but errors.
# Optimizers stand below model: they ask a model for its adapters and configs, and no model asks for an optimizer.
# They stand above the edge, for they work in any training loop and know no trainer.
ROOMS = (
    ("errors", "suggest", "_version"),
    ("on_import",),
    ("functional",),
    ("storage",),
    ("config",),
    ("init",),
    ("layers",),
    ("targets",),
    ("model",),
    ("optimizers",),
    ("distributed",),
    ("integrations",),
    ("as_peft",),
    ("train",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
EDGE = ("integrations", "train", "cli")
HEAVY = ("transformers", "trl", "datasets", "matplotlib", "accelerate")
LAZY = (HOUSE / "__init__.py", HOUSE / "integrations" / "as_peft" / "modules.py")  # they import by their own tables
NEVER = ("peft", "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
FORBIDDEN_CALLS = (
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
)


def room_of(file: Path) -> str:
    first = file.relative_to(HOUSE).parts[0]
    return first.removesuffix(".py")


def imported(file: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of each import; `from a import b` gives a.b, since b may be a module."""
    package = ["veneer", *file.relative_to(HOUSE).parent.parts]
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names += [(node.lineno, f"{origin}.{alias.name}") for alias in node.names]
    return names


def calls(file: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]


def at(file: Path, line: int, what: str) -> str:
    return f"{file.relative_to(HOUSE)}:{line} {what}"


def test_every_room_has_its_place():
    assert {room_of(file) for file in FILES} - {"__init__"} == set(LEVEL)


def test_a_room_imports_only_rooms_above_it():
    wrong = []
    for file in FILES:
        room = room_of(file)
        for line, name in imported(file):
            parts = name.split(".")
            if parts[0] != "veneer" or room == "__init__":
                continue
            other = parts[1] if len(parts) > 1 else "__init__"
            if other == room or (other not in LEVEL and room in EDGE):  # the edge may use the public names
                continue
            if other not in LEVEL or LEVEL[other] >= LEVEL[room]:
                wrong.append(at(file, line, f"imports {name}"))
    assert wrong == []


def test_some_things_are_never_imported():
    wrong = [at(file, line, name) for file in FILES for line, name in imported(file) if name.partition(".")[0] in NEVER]
    assert wrong == []


def test_the_ecosystem_is_imported_only_at_the_edge():
    wrong = [
        at(file, line, name)
        for file in FILES
        if room_of(file) not in EDGE
        for line, name in imported(file)
        if name.partition(".")[0] in HEAVY
    ]
    assert wrong == []


def test_storage_reads_headers_without_torch():
    wrong = []
    for file in (file for file in FILES if room_of(file) in ("storage", "config", "errors", "suggest")):
        top = ast.parse(file.read_text(encoding="utf-8")).body
        names = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in top if isinstance(node, ast.ImportFrom)]
        wrong += [at(file, 1, name) for name in names if name.partition(".")[0] in ("torch", "numpy", "safetensors")]
    assert wrong == []


def test_nothing_runs_code_that_comes_from_data():
    wrong = [
        at(file, call.lineno, ast.unparse(call.func))
        for file in FILES
        for call in calls(file)
        if ast.unparse(call.func) in FORBIDDEN_CALLS
    ]
    assert wrong == []


def test_yaml_is_read_by_a_safe_loader():
    wrong = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("Loader", "FullLoader", "UnsafeLoader", "CLoader"):
                wrong.append(at(file, node.lineno, ast.unparse(node)))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "yaml.load":
                wrong += [] if any(k.arg == "Loader" for k in node.keywords) else [at(file, node.lineno, "yaml.load")]
    assert wrong == []


def test_modules_are_imported_by_literal_names():
    wrong = [
        at(file, call.lineno, ast.unparse(call))
        for file in FILES
        if file not in LAZY
        for call in calls(file)
        if ast.unparse(call.func).rpartition(".")[2] == "import_module"
        and not (call.args and isinstance(call.args[0], ast.Constant))
    ]
    assert wrong == []


@pytest.mark.parametrize("argument", ["shell", "trust_remote_code", "allow_pickle"])
def test_no_call_opens_a_door(argument):
    wrong = [
        at(file, call.lineno, ast.unparse(keyword))
        for file in FILES
        for call in calls(file)
        for keyword in call.keywords
        if keyword.arg == argument and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
    ]
    assert wrong == []


def test_every_file_name_says_something():
    vague = {"utils", "util", "helpers", "helper", "common", "other", "misc"}
    assert [str(path) for path in HOUSE.rglob("*") if vague & set(path.stem.split("_"))] == []


def test_every_module_says_what_it_is_for():
    assert [str(file) for file in FILES if not ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))] == []
