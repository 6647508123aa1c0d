"""The tables of docs/scale.md, by arithmetic: python -m benchmarks.scale_plan writes them into the page."""

from pathlib import Path

from veneer.train.estimate import (
    LLAMA_8B,
    LLAMA_70B,
    LLAMA_405B,
    PROFILES,
    Profile,
    Run,
    Shape,
    memory,
    total,
    traffic,
)

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
BEGIN, END = "<!-- tables: written by benchmarks/scale_plan.py -->", "<!-- tables: end -->"
MODELS = (LLAMA_8B, LLAMA_70B, LLAMA_405B)
DEVICES = (1, 8, 64, 256, 1024)
ROOM = 76 * 2**30  # of a device that is sold as 80 GB, less what CUDA and its libraries take
WIRES = {"within a machine (400 GB/s)": 400e9, "between machines (25 GB/s a device)": 25e9}
PEAK = 400e12  # operations a second that a device does in bfloat16, in practice


def run_of(shape: Shape) -> Run:
    """One row of 4,096 tokens on each device, base in bfloat16, rank 16, a layer's activations computed again."""
    return Run(shape, "bfloat16", rank=16, rows=1, tokens=4096, checkpointing=True)


def _size(count: float) -> str:
    """Bytes in a few digits.

    >>> _size(3 * 2**30), _size(160 * 2**20)
    ('3.0 GiB', '160 MiB')
    """
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _marked(parts: dict[str, int]) -> str:
    """The sum, in bold where it fits."""
    return f"**{_size(total(parts))}**" if total(parts) <= ROOM else _size(total(parts))


def parts_table() -> str:
    """What one device by itself would hold, part by part."""
    lines = []
    for shape in MODELS:
        for keeping in ("bfloat16", "nf4"):
            run = Run(
                shape, keeping, rows=1, tokens=4096, checkpointing=True, computes=2 if keeping == "bfloat16" else 4
            )
            parts = memory(run)
            cells = [_size(value) for value in parts.values()]
            lines.append([f"{shape.name}, {keeping}", *cells, _marked(parts)])
    return _table(["base", *memory(run_of(LLAMA_8B)), "sum"], lines)


def memory_table(shape: Shape) -> str:
    """What each device holds under each profile."""
    run = run_of(shape)
    lines = [[profile, *(_marked(memory(run, profile, n)) for n in DEVICES)] for profile in PROFILES]
    return _table(["memory of a device", *map(str, DEVICES)], lines)


def traffic_table(shape: Shape) -> str:
    """What each device sends in a step under each profile."""
    run = run_of(shape)
    lines = [[profile, *(_size(traffic(run, profile, n)) if n > 1 else "-" for n in DEVICES)] for profile in PROFILES]
    return _table(["sent in a step", *map(str, DEVICES)], lines)


def compute_seconds(run: Run) -> float:
    """How long a device computes at least: forward, again for checkpointing, and the gradient of the inputs."""
    numbers = run.shape.parameters - run.shape.vocabulary * run.shape.width  # an embedding multiplies nothing
    return 3 * 2 * numbers * run.rows * run.tokens / PEAK


def wires_table() -> str:
    """How long sending takes beside computing, on 64 devices."""
    lines = []
    for shape in MODELS:
        run, cells = run_of(shape), []
        chosen: tuple[Profile, ...] = ("ddp", "fsdp2")
        for profile in chosen:
            cells += [f"{traffic(run, profile, 64) / speed:.2f} s" for speed in WIRES.values()]
        lines.append([shape.name, f"{compute_seconds(run):.2f} s", *cells])
    head = ["base", "computes", *(f"{profile} {where}" for profile in ("ddp", "fsdp2") for where in WIRES)]
    return _table(head, lines)


def tables() -> str:
    """All tables, as they stand in the page."""
    parts = ["### One device\n", parts_table(), ""]
    for shape in MODELS:
        parts += [f"### {shape.name}: {shape.parameters:,} parameters, {shape.adapters(16):,} trained\n"]
        parts += [memory_table(shape), "", traffic_table(shape), ""]
    parts += ["### Computing and sending, on 64 devices\n", wires_table()]
    return "\n".join(parts)


def with_tables(page: str) -> str:
    """The page with the tables of today."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE)
