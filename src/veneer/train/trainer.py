"""SFTTrainer with our loss where it matters, and no telemetry."""

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from trl.trainer.sft_trainer import SFTTrainer

from veneer.train.out_of_memory import Doing
from veneer.train.schedule import Schedule, scheduler
from veneer.train.tokens import IGNORED
from veneer.train.watch import Meter, not_finite


class VeneerSFTTrainer(SFTTrainer):
    """Trains the adapters of a model on token ids and labels.

    meter           counts the tokens read
    doing           what it is at, for the error that memory ran out
    schedule, warmup   as in run.yaml: how the learning rate goes, see schedule.py
    through_head    True: the loss comes from the logits the model itself computes, in the columns of the batch that
                    hold a label. False: TRL's, which multiplies by `lm_head.weight` itself. The first is right for an
                    adapted output head, which TRL would pass by, and faster on a CPU, where TRL scores every token.
    """

    def __init__(self, *args: Any, meter: Meter, through_head: bool, schedule: Schedule, warmup: float, **kwargs: Any):
        self.meter, self.through_head = meter, through_head
        self.schedule: Schedule = schedule
        self.warmup = warmup
        self.doing = Doing()
        self._eval_loss, self._eval_tokens = 0.0, 0
        super().__init__(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Ours, in which no step has a learning rate of 0."""
        if self.lr_scheduler is None:
            steered: Any = optimizer or self.optimizer
            self.lr_scheduler = scheduler(steered, self.schedule, warmup=self.warmup, steps=num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """One pass; nothing where the checkpoint to go on from was the last step, after which Trainer does one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: it would describe the run in TRL's words, beside files of ours."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward; RunError if the loss is not finite."""
        mask = inputs.get("attention_mask")
        self.meter.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        self.doing.begin(inputs["input_ids"])
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.doing.done()
        if not loss.isfinite():
            raise not_finite("loss", self.state.global_step + 1, Path(str(self.args.output_dir)))
        return loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The loss per learned token of the whole set; Trainer's own is a mean of the batches' means."""
        self._eval_loss, self._eval_tokens = 0.0, 0
        output = super().evaluation_loop(*args, **kwargs)
        assert output.metrics is not None
        (name,) = [name for name in output.metrics if name.endswith("_loss")]
        output.metrics[name] = self._eval_loss / self._eval_tokens
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a batch, added up for `evaluation_loop`."""
        self.doing.begin(inputs["input_ids"], evaluates=True)
        learned = int((inputs["labels"][:, 1:] != IGNORED).sum())
        found = super().prediction_step(model, inputs, *args, **kwargs)
        self._eval_loss += float(found[0]) * learned
        self._eval_tokens += learned
        return found

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, from the model's logits or from TRL (see `through_head`)."""
        compute = self._from_logits if self.through_head else super().compute_loss
        found = compute(model, inputs, return_outputs, num_items_in_batch)
        self.doing.forward_done()
        return found

    def _from_logits(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: torch.Tensor | int | None
    ) -> Any:
        """Cross-entropy per learned token: the sum over the batch divided by the tokens of the whole step."""
        labels_BT = inputs.pop("labels")
        next_BT = labels_BT[:, 1:]
        columns_K = (next_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
        outputs = model(**inputs, use_cache=False, logits_to_keep=columns_K)
        total = cross_entropy(
            outputs.logits.flatten(0, 1).float(),
            next_BT[:, columns_K].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        learned = (next_BT != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / learned
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss
