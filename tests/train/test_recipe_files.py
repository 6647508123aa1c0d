"""The run files of recipes/ are accepted and run, on the tiny model and few rows."""

from pathlib import Path

import pytest

from train.tiny_run import Told
from veneer.train.run import train
from veneer.train.run_file import load

ROOT = Path(__file__).parent.parent.parent
FILES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_run_file_of_the_recipes_runs(
    file: Path, chat_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    written = load(file)
    for rows in (written.data.train, written.data.eval):
        assert rows is not None
        assert Path(rows).is_file()
    smaller = [f"model={chat_model}", f"data.train={rows_file}", f"data.eval={rows_file}", f"output={tmp_path / 'out'}"]
    shorter = ["training.max_steps=3", "training.epochs=null", "training.learning_rate=1e-2", "lora.r=4"]
    result = train(load(file, [*smaller, *shorter]), progress=Told())
    assert result.losses[-1][1] < result.losses[0][1]


def test_there_are_run_files() -> None:
    assert {file.stem for file in FILES} == {"causal_lm", "rslora", "saved_modules"}
