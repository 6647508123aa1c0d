from pathlib import Path

import pytest

from veneer.train.plot import plot_losses, smoothed


def test_smoothing_starts_unbiased_and_lags() -> None:
    assert smoothed([4.0])[0] == pytest.approx(4.0)
    values = smoothed([1.0, 0.0, 0.0, 0.0])
    assert values == sorted(values, reverse=True)
    assert 0 < values[-1] < 1


def test_a_png_is_written(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    plot_losses([(1, 2.0), (2, 1.0)], path, eval_losses=[(2, 1.5)])
    assert path.read_bytes().startswith(b"\x89PNG")
