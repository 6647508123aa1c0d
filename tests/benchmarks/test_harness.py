"""What the harness makes of contenders whose cost is known: they turn a clock of our own."""

import json
import math

import pytest
import torch

from benchmarks.harness import Aim, Contender, Figure, Options, main, measure, show
from benchmarks.record import Row, Table


class Clock:
    """A clock that contenders move; each round is slower than the one before, as on a busy machine."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, seconds: float):
        def run() -> None:
            self.log.append(name)
            self.now += seconds * 1.5 ** self.log.count(name)

        return run


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    clock = Clock()
    contenders = {"limit": clock.contender("limit", 1.0), "ours": clock.contender("ours", 1.25)}
    table = measure("t", contenders, Options(), reference="limit", rounds=5, clock=clock)
    assert table.ratio("ours") == pytest.approx(1.25)
    assert table["ours"].values == pytest.approx([1.25 * 1.5**turn for turn in range(3, 8)])  # two rounds of warm-up
    assert table["ours"].spread == pytest.approx((1.25 * 1.5**4, 1.25 * 1.5**6))


def test_by_a_value_of_nothing_there_is_no_ratio_and_the_table_stands(capsys) -> None:
    table = Table("t", [Row("limit", [0.0]), Row("Veneer", [3.0], Aim(at_most=1.1))], "limit", "MiB")
    assert math.isnan(table.ratio("Veneer"))
    assert [met for *_, met in table.judged()] == [False]
    show(Figure("f", "F", "", [table]))
    assert "missed: nan" in capsys.readouterr().out


def test_the_order_moves_on_by_one_each_round() -> None:
    clock = Clock()
    measure("t", {name: clock.contender(name, 1) for name in "abc"}, Options(), rounds=2, warmup=1, clock=clock)
    assert "".join(clock.log) == "abcbcacab"


def test_what_is_prepared_is_not_timed_and_is_given_to_the_run() -> None:
    clock = Clock()
    given = []

    def prepare() -> str:
        clock.now += 100
        return "fresh"

    def run(what: str) -> None:
        given.append(what)
        clock.now += 1

    table = measure("t", {"a": Contender(run, prepare)}, Options(), rounds=2, warmup=0, clock=clock)
    assert table["a"].values == [1, 1]
    assert given == ["fresh", "fresh"]


def test_several_calls_in_one_timing_give_the_time_of_one() -> None:
    clock = Clock()

    def run() -> None:
        clock.now += 3

    assert measure("t", {"a": run}, Options(), rounds=1, calls=10, clock=clock)["a"].values == [3]


def test_the_command_line_sets_the_rounds_and_quick_makes_them_two() -> None:
    clock = Clock()
    asked = measure("t", {"a": clock.contender("a", 1)}, Options(rounds=4), rounds=9, clock=clock)
    quick = measure("t", {"a": clock.contender("a", 1)}, Options(quick=True), rounds=9, clock=clock)
    assert (len(asked["a"].values), len(quick["a"].values)) == (4, 2)
    assert asked.setting["rounds"] == 4


@pytest.mark.parametrize(
    ("aim", "met"),
    [
        (Aim(at_most=1.25), True),
        (Aim(at_most=1.24), False),
        (Aim(at_least=1.2), True),
        (Aim(at_most=0.5, against="theirs"), True),
        (Aim(at_least=0.6, against="theirs"), False),
    ],
)
def test_an_aim_is_met_or_missed(aim: Aim, met: bool) -> None:
    clock = Clock()
    costs = {"limit": 4, "ours": 5, "theirs": 10}
    contenders = {name: clock.contender(name, cost) for name, cost in costs.items()}
    table = measure("t", contenders, Options(), reference="limit", rounds=1, aims={"ours": aim}, clock=clock)
    assert [(row.name, found) for row, _, _, found in table.judged()] == [("ours", met)]


def test_a_misspelt_aim_or_reference_is_noticed() -> None:
    with pytest.raises(AssertionError, match="aim"):
        measure("t", {"a": lambda: None}, Options(), aims={"b": Aim(at_most=1)})
    with pytest.raises(AssertionError, match="reference"):
        measure("t", {"a": lambda: None}, Options(), reference="b")
    with pytest.raises(AssertionError, match="one bound"):
        Aim()


def two(options: Options) -> Figure:
    clock = Clock()
    contenders = {"limit": clock.contender("limit", 1.0), "Veneer": clock.contender("Veneer", 1.07)}
    aims = {"Veneer": Aim(at_most=1.1)}
    table = measure("Two", contenders, options, reference="limit", aims=aims, setting={"rank": 16}, clock=clock)
    return Figure("step", "A step", "About it.", [table])


def test_the_record_is_read_back_as_it_was_written(tmp_path, capsys) -> None:
    made = main(two, "doc", ["--rounds", "3", "--results", str(tmp_path)])
    assert Figure.load(tmp_path / "step.json") == made
    shown = capsys.readouterr().out
    assert "1.07" in shown
    assert "met" in shown


def test_the_record_says_on_what_it_was_measured_but_not_where(tmp_path) -> None:
    made = main(two, "doc", ["--rounds", "2", "--results", str(tmp_path)])
    assert made.machine["torch"] == torch.__version__
    assert made.machine["threads"] == torch.get_num_threads()
    text = (tmp_path / "step.json").read_text(encoding="utf-8")
    assert "/" not in json.dumps(json.loads(text)["machine"])


def test_a_quick_run_writes_nothing_by_itself_and_says_that_it_was_one(tmp_path) -> None:
    assert main(two, "doc", ["--quick"]).quick
    assert Figure.load(main(two, "doc", ["--quick", "--results", str(tmp_path)]).save(tmp_path)).quick


def test_a_device_that_is_not_there_is_refused(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        main(two, "doc", ["--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err


def test_values_that_are_no_times_stand_without_ratios() -> None:
    from benchmarks.harness import Row, Table

    table = Table("bytes", [Row("ours", [3.0])], unit="MiB")
    assert table.cells() == (["", "MiB"], [["ours", "3"]])
    show(Figure("f", "F", "", [table]))
    assert math.isclose(table["ours"].median, 3)
