"""Fine-tuning from end to end: `veneer train` against PEFT in TRL's SFTTrainer and in transformers' Trainer.

The task is the demonstration's.

Each contender runs its own whole training loop, optimizer, logging and all, in a thread of its own; they take turns,
one step each, so that what disturbs the machine disturbs all. Needs the demonstration's model (fetched once) and peft.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback

from benchmarks.harness import Aim, Figure, Options, Row, Table, main
from veneer.train.build import arguments, build_trainer
from veneer.train.demo import FULL, _rows
from veneer.train.load import load_model, load_tokenizer
from veneer.train.progress import Progress
from veneer.train.quiet import quiet
from veneer.train.settings import Data, Lora, RunConfig, Training
from veneer.train.small_model import NAME, small_model
from veneer.train.tokens import Tokens, stop_ids, tokenise
from veneer.train.watch import Meter

ABOUT = (
    "SmolLM2-135M learns the demonstration's task, adapters of rank 16 on every linear layer, batches of 8 rows. A "
    "third of the tokens carry a label, and all contenders learn the same ones. Tokens are those of the rows, without "
    "padding. With the same settings all read the same batches: what differs is Veneer's layers, and its loss, which "
    "makes logits for labelled tokens alone. As it comes, Veneer also puts rows of similar length into one step: of "
    "the demonstration's 320 rows, random batches are 16 % padding and grouped ones 3 %. On a CPU, TRL 1.16 scores "
    "every token, makes each logit twice and takes longer than the model's own loss would; on a GPU it has a kernel "
    "and scores labelled tokens alone, so this ratio is one of CPUs. Transformers' own Trainer with PEFT, and the loss "
    "that the model itself computes, stands beside it and is the stricter comparison. All read each row once; the loss "
    "of rows not trained on, after that, shows that they learned the same."
)
PEFT, TRAINER = "TRL + PEFT", "Trainer + PEFT"
SAME, DEFAULT = "Veneer, same settings", "Veneer, as it comes"


class Turns(TrainerCallback):
    """Lets a trainer run in a thread, one step at a time."""

    def __init__(self) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None

    def start(self, trainer: Trainer) -> None:
        """Run to the end of the first step."""
        trainer.add_callback(self)
        threading.Thread(target=self._run, args=(trainer,), daemon=True).start()
        self._wait()

    def step(self) -> None:
        """Run to the end of the next step; of the whole training, if that was the last."""
        self._go.release()
        self._wait()

    def _wait(self) -> None:
        self._done.acquire()
        if self._error:
            raise self._error

    def _run(self, trainer: Trainer) -> None:
        try:
            trainer.train()
        except BaseException as error:
            self._error = error
        self._done.release()

    def on_step_end(self, *args: Any, **rest: Any) -> None:
        """Give the turn away; what is logged of this step is part of the next turn."""
        self._done.release()
        self._go.acquire()


@dataclass
class Contestant:
    """A trainer with what it has read so far: tokens without padding, and the seconds and tokens of each turn."""

    trainer: Trainer
    turns: Turns = field(default_factory=Turns)
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        inner = self.trainer.training_step

        def counted(model: Any, inputs: dict[str, Any], *args: Any, **rest: Any) -> torch.Tensor:
            self.tokens += int(inputs["attention_mask"].sum())
            return inner(model, inputs, *args, **rest)

        self.trainer.training_step = counted
        self.trainer.remove_callback(PrinterCallback)
        self.turns.start(self.trainer)

    def step(self) -> None:
        """One timed step."""
        before, begun = self.tokens, time.perf_counter()
        self.turns.step()
        self.seconds.append(time.perf_counter() - begun)
        self.rates.append((self.tokens - before) / self.seconds[-1])


def settings(folder: Path, output: Path, steps: int, *, batch: int, grouped: bool) -> RunConfig:
    """The demonstration's, for so many steps."""
    return RunConfig(
        model=str(folder),
        dtype="float32",
        data=Data(train="bundled"),
        lora=Lora(r=16, lora_alpha=32),
        training=Training(
            epochs=None,
            max_steps=steps,
            batch_size=batch,
            learning_rate=FULL.learning_rate,
            warmup=0,
            max_length=512,
            group_by_length=grouped,
        ),
        output=str(output),
    )


def veneer_trainer(run: RunConfig, data: Tokens) -> Trainer:
    """What `veneer train` trains with."""
    from veneer.integrations.transformers import add_adapter

    output = Path(run.output)
    model = load_model(run.model, dtype=run.dtype)
    add_adapter(model, run.lora.config(), generator=torch.Generator().manual_seed(0))
    (output / "logs").mkdir(parents=True)
    return build_trainer(
        model,
        load_tokenizer(run.model),
        data,
        Tokens([]),
        run,
        arguments(run, output, evaluates=False),
        log_file=output / "logs" / "log.jsonl",
        progress=Progress(),
        meter=Meter(),
    )


def peft_model(run: RunConfig) -> Any:
    """The model with PEFT's adapters."""
    import peft

    config = peft.LoraConfig(
        r=run.lora.r, lora_alpha=int(run.lora.lora_alpha), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    return peft.get_peft_model(load_model(run.model, dtype=run.dtype), config)


def trl_trainer(run: RunConfig, data: Tokens) -> Trainer:
    """SFTTrainer with PEFT: its own loss, optimizer and schedule, the same rows, labels and settings."""
    from trl.trainer.sft_trainer import SFTTrainer

    class Silent(SFTTrainer):
        def _send_telemetry(self) -> None:
            """Nothing is sent anywhere."""

    return Silent(
        model=peft_model(run),
        args=arguments(run, Path(run.output), evaluates=False),
        train_dataset=_dataset(data),
        processing_class=load_tokenizer(run.model),
    )


def plain_trainer(run: RunConfig, data: Tokens) -> Trainer:
    """transformers' Trainer with PEFT, and the loss that the model computes itself."""
    from transformers import DataCollatorForSeq2Seq, TrainingArguments

    as_for_trl = arguments(run, Path(run.output), evaluates=False)
    known = {each.name for each in fields(TrainingArguments) if each.init}
    same = {name: value for name, value in vars(as_for_trl).items() if name in known}
    tokenizer = load_tokenizer(run.model)
    return Trainer(
        model=peft_model(run),
        args=TrainingArguments(**same),
        train_dataset=_dataset(data),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )


def _dataset(data: Tokens) -> Dataset:
    return Dataset.from_dict(
        {"input_ids": [each.input_ids for each in data.examples], "labels": [each.labels for each in data.examples]}
    )


MADE: dict[str, tuple[Callable[[RunConfig, Tokens], Trainer], bool]] = {
    PEFT: (trl_trainer, False),
    TRAINER: (plain_trainer, False),
    SAME: (veneer_trainer, False),
    DEFAULT: (veneer_trainer, True),
}


def tokens(folder: Path, file: str, rows: int) -> Tokens:
    """The first rows of a bundled file as the demonstration puts them."""
    stops = stop_ids(load_model(str(folder), dtype="float32"), load_tokenizer(str(folder)))
    return tokenise(_rows(file, rows), load_tokenizer(str(folder)), stops=stops, max_length=512)


@torch.no_grad()
def loss_of(model: Any, data: Tokens) -> float:
    """Cross-entropy per learned token, by the model's own forward."""
    model.eval()
    total, learned = 0.0, 0
    for each in data.examples:
        ids, labels = torch.tensor([each.input_ids]), torch.tensor([each.labels])
        count = int((labels[:, 1:] != -100).sum())
        total += float(model(input_ids=ids, labels=labels).loss) * count
        learned += count
    return total / learned


def figure(options: Options) -> Figure:
    """Train each contender for one epoch, in turns."""
    rounds = options.rounds or (1 if options.quick else 5)
    batch = 2 if options.quick else FULL.batch_size
    with quiet(), TemporaryDirectory() as scratch:
        folder = small_model()
        data = tokens(folder, "train.jsonl", batch * (rounds + 1))
        unseen = tokens(folder, "test.jsonl", 2 if options.quick else 8)
        contestants = {}
        for at, (name, (make, grouped)) in enumerate(MADE.items()):
            run = settings(folder, Path(scratch, str(at)), rounds + 1, batch=batch, grouped=grouped)
            contestants[name] = Contestant(make(run, data))
        names = list(contestants)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                contestants[name].step()
        losses = {name: loss_of(each.trainer.model, unseen) for name, each in contestants.items()}
    setting = {"model": NAME, "dtype": "fp32", "rank": 16, "batch": batch, "rows": len(data.examples)}
    aims = {SAME: Aim(at_least=1.1), DEFAULT: Aim(at_least=1.5)}
    speed = [Row(name, each.rates, aims.get(name)) for name, each in contestants.items()]
    whole = [Row(name, [sum(each.seconds)]) for name, each in contestants.items()]
    after = [Row(name, [loss]) for name, loss in losses.items()]
    tables = [
        Table("Tokens read in a second", speed, PEFT, "tokens/s", {**setting, "rounds": rounds}),
        Table("The same rows, once, after the first step", whole, PEFT, "s", setting, plot=False),
        Table("Loss of rows not trained on, after that", after, PEFT, "nats/token", setting, plot=False),
    ]
    return Figure("end_to_end", "Fine-tuning from end to end", ABOUT, tables)


if __name__ == "__main__":
    main(figure, __doc__)
