"""SFTTrainer with our loss where it matters, and no telemetry."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from trl.trainer.sft_trainer import SFTTrainer

from veneer.train.gathered import adapter_state, put_into_shards
from veneer.train.loss import summed_loss
from veneer.train.order import ByLength, FillersLast
from veneer.train.out_of_memory import Doing
from veneer.train.resume import write_processes
from veneer.train.schedule import Schedule, scheduler
from veneer.train.tokens import IGNORED
from veneer.train.watch import Meter, not_finite
from veneer.train.whole_state import WholeState, as_without, by_dtype


class VeneerSFTTrainer(SFTTrainer):
    """Trains the adapters of a model on token ids and labels.

    meter           counts the tokens read
    doing           what it is at, for the error that memory ran out
    schedule, warmup   as in run.yaml: how the learning rate goes, see schedule.py
    group_by_length    rows of similar length in one step, see order.py
    fillers         how many rows at the end of the training and of the evaluation set only make batches whole
    own_optimizer   what steps the parameters, if it is not Trainer's AdamW
    head            the output head where the loss may be taken in it, see loss.py; None: from the model's logits
    """

    def __init__(
        self,
        *args: Any,
        meter: Meter,
        schedule: Schedule,
        warmup: float,
        group_by_length: bool = False,
        fillers: tuple[int, int] = (0, 0),
        **kwargs: Any,
    ):
        self.meter, self.group_by_length, self.fillers = meter, group_by_length, fillers
        self.schedule: Schedule = schedule
        self.warmup = warmup
        self.head: nn.Linear | None = None
        self.own_optimizer: torch.optim.Optimizer | None = None
        self._groups: list[dict[str, Any]] = []
        self.doing = Doing()
        self._eval_loss, self._eval_tokens = 0.0, 0
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Ours, if the run has one. Under DeepSpeed Trainer forgets what it was given, and asks again."""
        if self.optimizer is None:
            self.optimizer = self.own_optimizer
        made: Any = super().create_optimizer(*args, **kwargs)
        if self.is_deepspeed_enabled and not self._groups:  # before DeepSpeed lays them end to end
            self._groups = [dict(group) for group in made.param_groups]
            by_dtype(made)
        return made

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

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: it would walk through all parameters in each step for a number that nobody is shown."""
        return 0

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: it would describe the run in TRL's words, beside files of ours."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward; RunError if the loss is not finite."""
        self.meter.tokens += self._read_by_all(inputs)
        self.doing.begin(inputs["input_ids"])
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.doing.done()
        if not loss.isfinite():
            raise not_finite("loss", self.state.global_step + 1, Path(str(self.args.output_dir)))
        return loss

    def _read_by_all(self, inputs: dict[str, Any]) -> int:
        """How many tokens all processes read in this batch, padding and fillers not counted."""
        mask, labels_BT = inputs.get("attention_mask"), inputs["labels"]
        read_BT = torch.ones_like(labels_BT) if mask is None else mask
        if self.accelerator.num_processes == 1:
            return int(read_BT.sum())
        read = read_BT[(labels_BT != IGNORED).any(dim=1)].sum()
        return int(self.accelerator.reduce(read, "sum"))  # type: ignore

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The loss per learned token of the whole set; Trainer's own is a mean of the batches' means."""
        self._eval_loss, self._eval_tokens = 0.0, 0
        output = super().evaluation_loop(*args, **kwargs)
        assert output.metrics is not None
        (name,) = [name for name in output.metrics if name.endswith("_loss")]
        loss, tokens = self._eval_loss, self._eval_tokens
        if self.accelerator.num_processes > 1:
            sums = torch.tensor([loss, tokens], dtype=torch.float64, device=self.args.device)
            loss, tokens = self.accelerator.reduce(sums, "sum").tolist()  # type: ignore
        output.metrics[name] = loss / tokens
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
        """Cross-entropy per learned token: the sum over the batch divided by the tokens of the whole step.

        In training, a mixture of experts adds its own term for an even load, as in TRL.
        """
        labels_BT = inputs.pop("labels")
        total, outputs = summed_loss(model, inputs, labels_BT, None if return_outputs else self.head)
        own = (labels_BT[:, 1:] != IGNORED).sum().clamp(min=1)  # fillers alone: nothing is learned
        learned = own if num_items_in_batch is None else num_items_in_batch
        loss = total / learned
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        if self.aux_loss_enabled and model.training:
            batches = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / batches
        self.doing.forward_done()
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clips; RunError before the step if the norm, which is that of all gradients, is no finite number."""
        norm = super()._clip_grad_norm(model)
        if norm is not None and not torch.as_tensor(norm).isfinite():
            raise not_finite("gradient", self.state.global_step + 1, Path(str(self.args.output_dir)))
        return norm

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        """Rows shuffled, of similar length together where that is asked for; fillers last."""
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        fillers = self.fillers[0]
        if not self.group_by_length:
            if not fillers:
                return super()._get_train_sampler(train_dataset)
            from accelerate.data_loader import SeedableRandomSampler

            real = range(len(rows) - fillers)
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return FillersLast(SeedableRandomSampler(real, data_seed=seed, generator=torch.Generator()), fillers)
        a_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return ByLength([len(ids) for ids in rows["input_ids"]], a_step, seed=self.args.seed, fillers=fillers)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """The longest rows first: the loss is a sum over all of them, in any order."""
        if not self.group_by_length:
            return super()._get_eval_sampler(eval_dataset)
        lengths = [len(ids) for ids in eval_dataset["input_ids"]]
        real = len(lengths) - self.fillers[1]
        return [*sorted(range(real), key=lengths.__getitem__, reverse=True), *range(real, len(lengths))]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer does; of a model in shards the adapter alone is gathered, not the base.

        The adapter's folder appears in one step. What other processes had put there before would be gone: they wait.
        """
        state = adapter_state(self._adapted(), always=self.is_deepspeed_enabled)
        if state is None:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            self._save(output_dir, state_dict=state)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As Trainer does, but under FSDP without the whole model, whose adapter is saved already, and under DeepSpeed
        in a form that any number of processes reads.
        """
        if self.is_deepspeed_enabled:
            state = self._whole_state()
            state.gather()
            with as_without(self, state):
                super()._save_optimizer_and_scheduler(output_dir)
            return
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from transformers import trainer

        theirs: Any = trainer
        kept = theirs.save_fsdp_model
        theirs.save_fsdp_model = lambda *_args, **_options: None
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            theirs.save_fsdp_model = kept

    def _save_rng_state(self, output_dir: str) -> None:
        """As Trainer does, with a note of how many processes there are."""
        if self.args.world_size > 1 and self.args.should_save:
            write_processes(Path(output_dir), self.args.world_size)
        super()._save_rng_state(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As Trainer does; into a model in shards the adapter alone."""
        if self.is_fsdp_enabled:
            put_into_shards(self._adapted(), Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """As Trainer does. DeepSpeed copies the adapter to step it, so it gets a checkpoint's values before that."""
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        put_into_shards(self._adapted(), Path(resume_from_checkpoint))
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        with as_without(self, self._whole_state()):
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As Trainer does. DeepSpeed has other groups than the optimizer had, so each has its rate to begin with."""
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule: Any = self.lr_scheduler
        if checkpoint is not None:
            schedule.base_lrs = [group["initial_lr"] for group in schedule.optimizer.param_groups]

    def _whole_state(self) -> WholeState:
        wrapped: Any = self.optimizer
        return WholeState(wrapped.optimizer, self._groups)

    def _adapted(self) -> Any:
        """The model, without what accelerate has put around it."""
        return self.accelerator.unwrap_model(self.model)  # type: ignore
