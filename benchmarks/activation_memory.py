"""Figure 2: what is kept for the backward pass, in bytes, and the peak memory of a step.

python -m benchmarks.activation_memory
"""

import copy
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from benchmarks.adapted import SMOLLM2_LAYERS, TINY, Shape, Work, adapted, sharing, step
from benchmarks.harness import Aim, Figure, Options, Row, Table, main
from benchmarks.peak import peak_of
from benchmarks.step import LIMIT, contender

ABOUT = """Bytes of the tensors that autograd keeps between forward and backward, counted by saved-tensor hooks: each
storage once, and the parameters, which are there anyway, not at all. The last table is the peak of a whole step in a
process of its own, on top of what the model and its adapters hold: gradients, temporaries and what no hook sees."""
CASES = [(method, dropout) for method in ("LoRA", "DoRA") for dropout in (0.0, 0.05)]
MIB = 2**20
EIGHT_LAYERS = Shape("eight layers of SmolLM2's shape", 576, 1536, 9, 3, 8)


def saved_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """What autograd keeps while `run` uses the model, without the memory of its parameters and buffers."""
    known = {_address(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(_address(tensor), tensor.untyped_storage())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in known)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class OneLayer(nn.Module):
    """A square linear layer under a name that an adapter can be aimed at."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(features, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Layer input to layer output."""
        return self.q_proj(x)


def one_layer(features: int, tokens: int, rank: int, dtype: torch.dtype) -> Table:
    """What one linear layer keeps; frozen it keeps its weight alone, which is there anyway."""
    torch.manual_seed(0)
    base = OneLayer(features).to(dtype).requires_grad_(False)
    x = torch.randn(tokens, features, dtype=dtype, requires_grad=True)
    must = tokens * (features * dtype.itemsize + rank * 4)
    rows = [Row("x and x_A", [must / MIB])]
    for method, dropout in CASES:
        for library in ("PEFT", "Veneer"):
            model = adapted(
                library, copy.deepcopy(base), rank=rank, dropout=dropout, method=method, targets=("q_proj",)
            )
            kept = saved_bytes(model, lambda model=model: model(x))
            rows.append(Row(contender(library, method, dropout), [kept / MIB], _aim(library, method, dropout)))
    setting = {"layer": f"{features} × {features}", "tokens": tokens, "rank": rank, "dtype": _short(dtype)}
    return Table(f"Kept for backward by one layer, {_short(dtype)} base", rows, "x and x_A", "MiB", setting)


def _aim(library: str, method: str, dropout: float) -> Aim | None:
    if library == "PEFT":
        return None
    if dropout or method == "DoRA":
        return Aim(at_most=0.6, against=contender("PEFT", method, dropout))
    return Aim(at_most=1.05)  # A and B cast to the input's dtype are the rest


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def decoder_layers(work: Work, rank: int) -> Table:
    """What whole decoder layers keep beyond what they keep frozen."""
    shape, rows_of_x = work.shape, work.batch * work.tokens
    base = work.base()
    frozen = saved_bytes(base, lambda: work.backward(base, work.input()))
    inputs = rows_of_x * (2 * shape.hidden + shape.mlp) * work.dtype.itemsize  # of q/k/v, gate/up, down; o's is there
    must = shape.layers * (inputs + 7 * rows_of_x * rank * 4)
    rows = [Row("each input once and x_A", [must / MIB])]
    for method, dropout in CASES:
        for library in ("PEFT", "Veneer"):
            model = adapted(library, sharing(base), rank=rank, dropout=dropout, method=method)
            kept = saved_bytes(model, lambda model=model: work.backward(model, work.input()))
            rows.append(
                Row(contender(library, method, dropout), [(kept - frozen) / MIB], _aim(library, method, dropout))
            )
    title = f"Kept beyond what the frozen layers keep, {_short(work.dtype)}"
    setting = {**work.setting, "rank": rank, "frozen": f"{frozen / MIB:.0f} MiB"}
    return Table(title, rows, rows[0].name, "MiB", setting)


def step_of(device: str, shape: dict, batch: int, tokens: int, model: str, method: str, dropout: float) -> Callable:
    """For `peak_of`: the step of one contender; `model` is "limit", "full" or a library."""
    work = Work(Shape(**shape), batch, tokens, device=device)
    made = work.base()
    if model == "full":
        made.requires_grad_(True)
    elif model != LIMIT:
        made = adapted(model, made, method=method, dropout=dropout)
    contender = step(made, work)
    assert contender.prepare is not None
    prepare = contender.prepare

    def run() -> None:
        contender.run(prepare())
        prepare()  # lets the gradients go

    return run


def peaks(work: Work, cases: list[tuple[str, float]]) -> list[Table]:
    """The peak of a step, one process a contender: by itself, and beyond the limit's."""
    which = {LIMIT: (LIMIT, "LoRA", 0.0), "full fine-tuning": ("full", "LoRA", 0.0)}
    for method, dropout in cases:
        for library in ("PEFT", "Veneer"):
            which[contender(library, method, dropout)] = (library, method, dropout)
    size = {"device": work.device, "shape": asdict(work.shape), "batch": work.batch, "tokens": work.tokens}
    found = {
        name: peak_of("benchmarks.activation_memory:step_of", **size, model=model, method=method, dropout=dropout)
        for name, (model, method, dropout) in which.items()
    }
    step_rows = [Row(name, [peak.step / MIB]) for name, peak in found.items()]
    beyond = [
        Row(name, [(found[name].step - found[LIMIT].step) / MIB], _aim(*case) if case[1:] != ("LoRA", 0.0) else None)
        for name, case in which.items()
        if case[0] in ("PEFT", "Veneer")
    ]
    setting = {**work.setting, "rank": 16}
    return [
        Table("Peak memory of a step", step_rows, LIMIT, "MiB", setting),
        Table("Peak memory of a step beyond the limit's", beyond, None, "MiB", setting),
    ]


def figure(options: Options) -> Figure:
    """One layer, decoder layers, and the peak of a step."""
    features, tokens = (64, 32) if options.quick else (1024, 2048)
    tables = [one_layer(features, tokens, 16, dtype) for dtype in (torch.bfloat16, torch.float32)]
    shape, batch, tokens = (TINY, 2, 16) if options.quick else (SMOLLM2_LAYERS, 4, 256)
    tables.append(decoder_layers(Work(shape, batch, tokens), 16))
    if options.quick:  # Linux tells a process's memory to some dozen pages only: a tiny model's step is lost in them
        shape, batch, tokens, cases = SMOLLM2_LAYERS, 2, 64, CASES[1:2]
    else:
        shape, cases = EIGHT_LAYERS, CASES
    tables += peaks(Work(shape, batch, tokens, device=options.device), cases)
    return Figure("activation_memory", "Activation memory", ABOUT, tables)


if __name__ == "__main__":
    main(figure, __doc__)
