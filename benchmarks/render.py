"""results/*.json to docs/benchmarks.md and its pictures: `python -m benchmarks.render`. Nothing is measured here."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.plots import draw
from benchmarks.record import RESULTS, Figure, Table

DOCS = Path(__file__).parent.parent / "docs"
# In the order of the page; each is a script here, and its JSON.
FIGURES = (
    "step",
    "step_model",
    "step_large",
    "activation_memory",
    "end_to_end",
    "attach",
    "adapter_files",
    "mixed_batch",
    "scaling",
    "quantised_memory",
    "freed_memory",
)

HEAD = """# Benchmarks

<!-- Written by benchmarks/render.py from benchmarks/results/: edit those. -->

What Veneer costs beside PEFT, and beside the least that it could cost. The contenders of a table ran in turn in one
process, in an order that moves on by one each round, so that what disturbs a round disturbs all of them. A time is the
median over the rounds, its spread the first and third quartile; a ratio is the median of the rounds' ratios. Every time
of every round is in `benchmarks/results/`. An aim was set before the work began; one that is missed says so. All was
measured with nothing running beside: attaching, files and merging with the newest code; the rest an evening before,
since when dropout has lost writes to memory of no use (with 512 tokens, a step with dropout took 0.96 to 1.01 of its
time, side by side in four runs; a second run of all steps was of a noisier hour and is not shown). The machine is a
virtual one whose speed wanders by a tenth from minute to minute: of two ratios that differ by less than a twentieth,
neither is the better one.
"""

# For figures with a missed aim: what stands between them, and what was tried.
TRIED = {
    "step": """
LoRA: by counting it should cost 1.05 of the limit. Thin products do less in a time than wide ones and wait for memory:
alone, each at its best, they come to 1.06 to 1.07; the rest are some seven calls from Python for each layer, and
activations that the frozen layers need not keep, which push others out of the cache. q, k and v, and gate and up, share
one product with their A's; one function over a whole MLP was no faster; adding sBA to W makes a temporary of W's size
and loses small updates in 16 bits.
Dropout: its places are drawn again in the backward pass, by torch on one thread however many there are, and x goes
through a buffer, some rows at a time, once a pass. q, k and v have places of their own, so their A's share no product
as they do without dropout. A mask would cost a draw and a byte for every element. Putting the dropped elements back
after the update, instead of a buffer with zeros, was no faster side by side.
DoRA: a pass over the output in each direction for the gain, and the norms of W + sBA, as much work as the forward of
one more token for each rank; expanding the square costs the same and cancels.
DoRA with dropout multiplies W twice by its formula, which alone is twice the limit's products. The sparse products with
the dropped elements, which take the second one's place on a CPU for float32, do a twentieth of its work in a third to a
half of its time, turning W included, as they wait for rows of W from the cache. Turning W a part at a time and torch's
own sampled product have made large layers' 0.4 to 0.5 of what they were; small ones' are as fast as before.
With bf16 the limit takes 0.6 of its time, and most of what is added no less than before.
Pages of 2 MiB for what a step allocates brought nothing that stands out from the noise.""",
    "step_model": """
As for the step of two layers. Here a layer sees 512 tokens instead of 1,024: what each call costs weighs twice as much,
and dropout's many small ones no less than PEFT's mask.""",
    "step_large": """
With 128 tokens DoRA's norms, which read W once in float32 whatever its dtype, and with dropout the second product with
W (sparse ones pay from 256 tokens on) are most of what is added. With more tokens the norms' share falls.""",
    "activation_memory": """
DoRA's gain needs the layer's output before it for the magnitude's
gradient: one tensor of the output's size is kept, and no more.""",
    "attach": """
Switching is at its aim, give or take the noise; done again at once, it takes a third of this time. Import meets its
aim in one run and misses it in the next: what comes beside torch is regex and 168 files of our own, together 0.09 s,
and a full collection of garbage, another 0.08 s, which walks all of torch's objects and comes with whatever is imported
after torch. All is compiled, as pip leaves what it installs. `import veneer` alone does not import torch at all.""",
    "adapter_files": """
Saving: the file is flushed to the disk, read back and compared before it takes
the old one's place, PEFT's is left to the system's cache; *file alone* is the writing of the same bytes without a
flush. Merging and folding in: the sum is made in float64 and rounded once, where PEFT adds in the weight's dtype, every
weight is looked through for NaN and infinity before the first one is put in place, and the merged weights have memory
of their own, which the system clears first. Merging keeps the base, so that unmerging is exact and takes next to
nothing: both together take less than PEFT's. Experts in one parameter are added several at a time. Large tensors:
reading and checking the bytes is all there is to do, in both libraries.""",
    "mixed_batch": """
Prefill: PEFT itself takes little more than the bare base here, so a third of
its time is less than the base alone takes. Decode: at 64 adapters the factors of rank 16 that every token must read are
three times the base's own bytes. Sorted segments and one product an adapter were slower than the one batched product;
stacks are made once for a `generate`.""",
}

FOOT = """## Measure it yourself

    make bench                                      # everything, and this page
    .venv/bin/python -m benchmarks.step             # one figure
    .venv/bin/python -m benchmarks.step --quick     # does it run? A tiny model, two rounds; nothing is written
    .venv/bin/python -m benchmarks --device cuda    # on a GPU: larger batches, bf16, memory as CUDA counts it
    .venv/bin/python -m benchmarks.render           # this page again from benchmarks/results/

Nothing else should run meanwhile. `--threads` sets torch's threads, `--rounds` the number of rounds. On a GPU the clock
stops when the device has finished.
"""


def read(folder: Path = RESULTS) -> list[Figure]:
    """The figures that were measured, in the order of the page."""
    return sorted(map(Figure.load, folder.glob("*.json")), key=lambda figure: FIGURES.index(figure.name))


def page(figures: Sequence[Figure], pictures: dict[str, str]) -> str:
    """The page as Markdown; `pictures` has the address of a figure's picture, by its name."""
    parts = [HEAD, _aims(figures)]
    for figure in figures:
        parts.append(f"## {figure.title}\n\n{_flowing(figure.about)}\n")
        if figure.quick:
            parts.append("**A smoke run, too short to claim anything.**\n")
        parts.append(f"{_machine(figure)}\n")
        if figure.name in TRIED and not all(met for table in figure.tables for *_, met in table.judged()):
            parts.append(f"**Where an aim is missed.** {_flowing(TRIED[figure.name])}\n")
        if figure.name in pictures:
            parts.append(f"![{figure.title}]({pictures[figure.name]})\n")
        parts += [_section(table) for table in figure.tables]
    return "\n".join([*parts, FOOT])


def _aims(figures: Sequence[Figure]) -> str:
    """Every aim in one table, met or missed."""
    lines, hits = [], 0
    for figure in figures:
        for table in figure.tables:
            for row, aim, ratio, met in table.judged():
                hits += met
                against = aim.against or table.reference
                bound = str(aim).partition(" ×")[0]
                lines.append([table.title, row.name, against, f"{ratio:.3f}", bound, "met" if met else "**missed**"])
    if not lines:
        return ""
    head = ["measured", "contender", "against", "ratio", "aim", ""]
    return f"## Aims: {hits} of {len(lines)} met\n\n{_markdown(head, lines)}"


def _section(table: Table) -> str:
    setting = ", ".join(f"{key} {value}" for key, value in table.setting.items())
    said = f"{setting[:1].upper()}{setting[1:]}.\n" if setting else ""
    note = f"{_flowing(table.note)}\n" if table.note else ""
    return "\n".join(filter(None, [f"### {table.title}\n", said, _markdown(*table.cells()), note]))


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _machine(figure: Figure) -> str:
    facts = dict(figure.machine)
    said = [f"{facts.pop('cpu', 'unknown processor')}", f"{facts.pop('cores', '?')} cores"]
    if "gpu" in facts:
        said.insert(0, facts.pop("gpu"))
    return f"Measured on {', '.join(said)}: {', '.join(f'{name} {value}' for name, value in facts.items())}."


def _flowing(text: str) -> str:
    """One paragraph on one line: the source breaks its lines where the code wants it."""
    return " ".join(text.split())


def write(results: Path = RESULTS, docs: Path = DOCS) -> Path:
    """Draw the pictures and write the page."""
    figures = read(results)
    pictures = {}
    for figure in figures:
        if file := draw(figure, docs / "benchmarks"):
            pictures[figure.name] = file.relative_to(docs).as_posix()
    file = docs / "benchmarks.md"
    file.write_text(page(figures, pictures), encoding="utf-8")
    return file


if __name__ == "__main__":
    print(write())
