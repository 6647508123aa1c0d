"""What the README shows runs, and says what it says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_every_file_and_folder_it_names_exists():
    named = re.findall(r"`((?:tests|docs|src)/[\w/.-]+)`", README) + re.findall(r"\((docs/[\w/.-]+)\)", README)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_tree_it_draws_is_the_tree():
    drawn = set(re.findall(r"^      (\w+)(?:/|\.py) ", README, flags=re.MULTILINE))
    source = ROOT / "src" / "veneer"
    there = {p.name for p in source.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert drawn >= there


def test_the_commands_it_names_exist():
    from veneer.cli import app

    named = set(re.findall(r"^    \.venv/bin/veneer (\w+)", README, flags=re.MULTILINE))
    assert named
    assert named <= {command.callback.__name__ for command in app.registered_commands if command.callback}
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in make for target in re.findall(r"^    make (\w+)", README, flags=re.MULTILINE))


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    from veneer.train.small_model import small_model

    monkeypatch.chdir(tmp_path)
    code = BLOCKS[0].replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', repr(str(small_model())))
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    said = re.search(r"# (trainable params: .*)", BLOCKS[0])
    assert said is not None
    assert capsys.readouterr().out.strip() == said[1]
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert f"{size / 2**20:.0f} MB" in BLOCKS[0]
    assert type(names["plain"]).__name__ == "LlamaForCausalLM"


def test_the_trainer_example_runs():
    from trl import SFTTrainer

    import tiny

    names = {"plain": tiny.llama(), "SFTTrainer": SFTTrainer}
    exec("from veneer import LoraConfig\n" + BLOCKS[1], names)
    assert names["plain"].active_adapters() == ["default"]
