from pathlib import Path

import pytest

from veneer.train.plot import plot_losses, smoothed


def test_smoothing_starts_unbiased_and_lags() -> None:
    assert smoothed([4.0])[0] == pytest.approx(4.0)
    values = smoothed([1.0, 0.0, 0.0, 0.0])
    assert values == sorted(values, reverse=True)
    assert 0 < values[-1] < 1


@pytest.mark.parametrize(("losses", "from_zero"), [([2.0, 0.5], True), ([2.0, 1.9], False)])
def test_the_axis_begins_at_0_where_the_curve_comes_near(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[float], from_zero: bool
) -> None:
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append(self.axes[0].get_ylim()))
    plot_losses(list(enumerate(losses)), tmp_path / "loss.png")
    assert bool(drawn[0][0] == 0) is from_zero


def test_a_png_is_written(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    plot_losses([(1, 2.0), (2, 1.0)], path, eval_losses=[(2, 1.5)])
    assert path.read_bytes().startswith(b"\x89PNG")
