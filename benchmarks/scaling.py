"""Figure 6: how the cost of a step grows with rank, depth, sequence length, and the number of adapters.

python -m benchmarks.scaling
"""

import importlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from benchmarks.adapted import LIBRARIES, PROJECTIONS, SMOLLM2_LAYERS, TINY, Shape, Work, adapted, sharing, step
from benchmarks.harness import Aim, Contender, Figure, Options, Table, main, measure
from benchmarks.step import LIMIT

ABOUT = """What grows, and whether it grows as its arithmetic does. *By arithmetic* is the ratio of the floating-point
operations of the products: for T tokens through a layer of P weights with adapters of P_adapter weights, 4·T·P frozen,
6·T·P_adapter more with adapters, and 7·T²·hidden for attention. Thin products run at a lower rate than large ones, so a
low rank costs more than its share."""


def operations(shape: Shape, batch: int, tokens: int, rank: int = 0) -> float:
    """Floating-point operations of a step of frozen layers, with adapters of this rank."""
    products = 4 * shape.linear + 6 * shape.adapter(rank)
    attention = 7 * tokens * shape.hidden  # 4 forward, 10 backward, which computes the scores again; causal: half
    return shape.layers * batch * tokens * (products + attention)


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of a line through the logarithms: 1 where y grows as x. Points at or below 0 say nothing."""
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if y > 0]
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else math.nan


def placed(table: Table, axis: str, at: dict[str, tuple[str, float]], expected: dict[str, float]) -> Table:
    """The table with its rows on lines over an axis, beside what the arithmetic gives."""
    rows = [replace(row, at=at.get(row.name), expected=expected.get(row.name)) for row in table.rows]
    return replace(table, rows=rows, axis=axis)


def by_rank(work: Work, options: Options, ranks: Sequence[int]) -> Table:
    """The step at several ranks, over one frozen base."""
    base = work.base()
    contenders, at, expected = {LIMIT: step(base, work)}, {}, {}
    frozen = operations(work.shape, work.batch, work.tokens)
    for library in LIBRARIES:
        for rank in ranks:
            name = f"{library}, rank {rank}"
            contenders[name] = step(adapted(library, sharing(base), rank=rank), work)
            at[name] = (library, rank)
            expected[name] = operations(work.shape, work.batch, work.tokens, rank) / frozen
    table = measure("Rank", contenders, options, reference=LIMIT, rounds=7, setting=work.setting)
    beyond = {library: [table.ratio(f"{library}, rank {rank}") - 1 for rank in ranks] for library in LIBRARIES}
    slopes = {library: exponent(ranks, ratios) for library, ratios in beyond.items()}
    note = "The time beyond the limit grows as rank to the power of " + _listed(slopes) + "; by arithmetic 1."
    return replace(placed(table, "rank", at, expected), note=note)


def by_depth(work: Work, options: Options, depths: Sequence[int]) -> Table:
    """The step of models of several depths."""
    contenders: dict[str, Contender] = {}
    at, expected = {}, {}
    for depth in depths:
        deeper = replace(work, shape=replace(work.shape, layers=depth))
        base = deeper.base()
        contenders[f"{LIMIT}, {depth} layers"] = step(base, deeper)
        contenders[f"Veneer, {depth} layers"] = step(adapted("Veneer", sharing(base)), deeper)
        for line in (LIMIT, "Veneer"):
            at[f"{line}, {depth} layers"] = (line, depth)
            rank = 16 if line == "Veneer" else 0
            mine, first = (replace(work.shape, layers=number) for number in (depth, depths[0]))
            expected[f"{line}, {depth} layers"] = operations(mine, work.batch, work.tokens, rank) / operations(
                first, work.batch, work.tokens
            )
    return _grown(work, options, "Depth", "layers", contenders, at, expected, depths)


def by_tokens(work: Work, options: Options, lengths: Sequence[int]) -> Table:
    """The step on sequences of several lengths, one sequence each."""
    base = work.base()
    model = adapted("Veneer", sharing(base))
    contenders: dict[str, Contender] = {}
    at, expected = {}, {}
    for tokens in lengths:
        longer = replace(work, batch=1, tokens=tokens)
        for line, made, rank in ((LIMIT, base, 0), ("Veneer", model, 16)):
            name = f"{line}, {tokens} tokens"
            contenders[name] = step(made, longer)
            at[name] = (line, tokens)
            expected[name] = operations(work.shape, 1, tokens, rank) / operations(work.shape, 1, lengths[0])
    return _grown(replace(work, batch=1), options, "Sequence length", "tokens", contenders, at, expected, lengths)


def _grown(
    work: Work,
    options: Options,
    title: str,
    axis: str,
    contenders: dict[str, Contender],
    at: dict[str, tuple[str, float]],
    expected: dict[str, float],
    places: Sequence[int],
) -> Table:
    """Both lines over one axis, in units of the first place's limit."""
    reference = next(iter(contenders))
    setting = {**work.setting, "rank": 16}
    table = measure(title, contenders, options, reference=reference, rounds=7, setting=setting)
    times = {line: [table[f"{line}, {place} {axis}"].median for place in places] for line in (LIMIT, "Veneer")}
    slopes = {line: exponent(places, medians) for line, medians in times.items()}
    sums = exponent(places, [expected[f"Veneer, {place} {axis}"] for place in places])
    over = {str(place): table.ratio(f"Veneer, {place} {axis}", f"{LIMIT}, {place} {axis}") for place in places}
    note = f"Grows as {axis} to the power of {_listed(slopes)}; by arithmetic {sums:.2f}. "
    note += f"Veneer over the limit at {_listed(over)}."
    return replace(placed(table, axis, at, expected), note=note)


def with_others(library: str, model: nn.Module, count: int, *, active: bool) -> nn.Module:
    """The model with `count` adapters, the first of them active or all of them."""
    config = importlib.import_module(LIBRARIES[library]).LoraConfig
    made: Any = adapted(library, model)
    others = [f"other{number}" for number in range(1, count)]
    for other in others:
        made.add_adapter(other, config(r=16, target_modules=list(PROJECTIONS)))
    made.base_model.set_adapter(["default", *others] if active else ["default"])
    return made


def by_attached(work: Work, options: Options, counts: Sequence[int]) -> Table:
    """The step with one active adapter and several that only lie there: they should cost nothing."""
    base = work.base()
    contenders, at = {}, {}
    for library in LIBRARIES:
        for count in counts:
            name = f"{library}, {count} attached"
            model = with_others(library, sharing(base), count, active=False)
            contenders[name] = step(model, work)
            at[name] = (library, count)
    least, most = (f"Veneer, {count} attached" for count in (counts[0], counts[-1]))
    table = measure(
        "Adapters attached, one of them active",
        contenders,
        options,
        reference=least,
        rounds=7,
        aims={most: Aim(at_most=1.05)},
        setting={**work.setting, "rank": 16},
    )
    return placed(table, "adapters", at, dict.fromkeys((name for name in at if name.startswith("Veneer")), 1.0))


def by_active(work: Work, options: Options, counts: Sequence[int]) -> Table:
    """The step with several adapters active at once, their updates added up."""
    base = work.base()
    contenders, at, expected = {LIMIT: step(base, work)}, {}, {}
    frozen = operations(work.shape, work.batch, work.tokens)
    for library in LIBRARIES:
        for count in counts:
            name = f"{library}, {count} active"
            model = with_others(library, sharing(base), count, active=True)
            contenders[name] = step(model, work)
            at[name] = (library, count)
            expected[name] = operations(work.shape, work.batch, work.tokens, 16 * count) / frozen
    setting = {**work.setting, "rank": 16}
    table = measure("Adapters active at once", contenders, options, reference=LIMIT, rounds=7, setting=setting)
    return placed(table, "adapters", at, expected)


def _listed(numbers: dict[str, float]) -> str:
    return ", ".join(f"{number:.2f} ({name})" for name, number in numbers.items())


def figure(options: Options) -> Figure:
    """Five sweeps."""
    if options.quick:
        work, few = Work(TINY, 1, 16, device=options.device), (1, 2)
        sweeps = ((by_rank, (4, 8)), (by_depth, few), (by_tokens, (8, 16)), (by_attached, few), (by_active, few))
    else:
        work = Work(SMOLLM2_LAYERS, 2, 256, device=options.device)
        sweeps = (
            (by_rank, (8, 32, 128, 512)),
            (by_depth, (1, 2, 4, 8)),
            (by_tokens, (64, 128, 256, 512, 1024)),
            (by_attached, (1, 10, 100)),
            (by_active, (1, 2, 4)),
        )
    tables = [sweep(work, options, places) for sweep, places in sweeps]
    return Figure("scaling", "Scaling", ABOUT, tables)


if __name__ == "__main__":
    main(figure, __doc__)
