"""What a run can be told: the sections and keys of run.yaml, their types, ranges and defaults."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from veneer.config.init_names import DATA_DRIVEN
from veneer.train.quantisation import INSTEAD, Quantization

if TYPE_CHECKING:
    from veneer import LoraConfig


def _refuse_truth(value: Any) -> Any:
    """Python counts true as 1; a number that is written as true is a mistake."""
    if isinstance(value, bool):
        raise ValueError(f"should be a number, got {str(value).lower()}")
    return value


NotTruth = BeforeValidator(_refuse_truth)


def _name_the_usual(value: Any) -> Any:
    """Other tools have other names, and some ways cannot be trained over: say what to take."""
    if isinstance(value, str) and value.lower() in INSTEAD:
        raise ValueError(f"{value}: {INSTEAD[value.lower()]}")
    return value


Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Whole = Annotated[int, NotTruth]
Finite = Annotated[float, Field(allow_inf_nan=False), NotTruth]
Count = Annotated[int, Field(gt=0), NotTruth]
Share = Annotated[float, Field(ge=0, lt=1), NotTruth]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), NotTruth]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), NotTruth]


class Section(BaseModel):
    """A part of the run file: unknown keys are refused, numbers written as text (YAML's `1e-4`) are read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    """Where the rows are."""

    train: Text
    eval: Text | None = None
    eval_fraction: Share = 0.0
    too_long: Literal["error", "drop", "cut"] = "error"

    @model_validator(mode="after")
    def _one_way_to_evaluate(self) -> Self:
        if self.eval is not None and self.eval_fraction:
            raise ValueError("eval and eval_fraction both name rows to evaluate on: set one of them")
        return self


class Lora(Section):
    """The fields of LoraConfig, by the same names."""

    r: Whole = 16
    lora_alpha: Whole | Finite = 32
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    lora_dropout: Finite = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    loftq_config: dict[str, Whole] | None = None
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[Whole] | dict[str, list[Whole]] | None = None
    ensure_weight_tying: bool = False
    target_parameters: list[str] | None = None
    layers_to_transform: Whole | list[Whole] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, Whole] = {}
    alpha_pattern: dict[str, Finite] = {}
    layer_replication: list[tuple[Whole, Whole]] | None = None
    alora_invocation_tokens: list[Whole] | None = None

    def config(self) -> "LoraConfig":
        """The LoraConfig these fields make; ConfigError if they cannot be right, or need data that a run has not."""
        from veneer import LoraConfig
        from veneer.errors import ConfigError

        if self.init_lora_weights in DATA_DRIVEN:
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r} starts from something measured on data, which a run "
                "does not do yet. Use it from Python, or choose another start: pissa, olora, orthogonal, …"
            )
        return LoraConfig(**self.model_dump(), task_type="CAUSAL_LM")


class Training(Section):
    """How long and how fast."""

    epochs: Positive | None = 1
    max_steps: Count | None = None
    batch_size: Count = 8
    gradient_accumulation: Count = 1
    learning_rate: Positive = 2e-4
    optimizer: Literal["adamw", "loraplus", "lorafa"] = "adamw"
    loraplus_lr_ratio: Positive | None = None
    loraplus_lr_embedding: NotNegative | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: NotNegative = 0.03
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 1.0
    max_length: Annotated[int, Field(gt=1), NotTruth] = 1024
    group_by_length: bool = True
    packing: bool = False
    gradient_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32), NotTruth] = 0
    log_every: Count = 1
    eval_every: Count | None = None
    save_every: Count | None = None
    keep_checkpoints: Count = 2
    resume: bool = False

    @model_validator(mode="before")
    @classmethod
    def _steps_instead_of_epochs(cls, values: Any) -> Any:
        """max_steps alone takes the place of the default of epochs, also where the settings are written out."""
        if isinstance(values, dict) and values.get("max_steps") is not None and "epochs" not in values:
            return {**values, "epochs": None}
        return values

    @model_validator(mode="after")
    def _the_optimizer_has_the_settings(self) -> Self:
        for name in ("loraplus_lr_ratio", "loraplus_lr_embedding"):
            if getattr(self, name) is not None and self.optimizer != "loraplus":
                raise ValueError(f"{name} has no effect with optimizer={self.optimizer}: say optimizer=loraplus")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("epochs and max_steps both say how long to train: set one of them and the other to null")
        if self.max_steps is None and self.epochs is None:
            raise ValueError("neither epochs nor max_steps says how long to train")
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup={self.warmup:g} is neither a share below 1 nor a whole number of steps")
        return self


class RunConfig(Section):
    """A whole run: model, data, adapter, training and the folder for what comes out."""

    model: Text
    revision: Text | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Annotated[Quantization | None, BeforeValidator(_name_the_usual)] = None
    data: Data
    lora: Lora = Lora()
    training: Training = Training()
    output: Text
    overwrite: bool = False

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if self.training.eval_every and not (self.data.eval or self.data.eval_fraction):
            raise ValueError("training.eval_every needs rows to evaluate on: set data.eval or data.eval_fraction")
        if self.quantization and self.dtype != "auto":
            raise ValueError(
                f"dtype={self.dtype} and quantization={self.quantization} both say how the weights are kept: leave "
                "dtype at auto (what is not quantised is float32 then), or quantization out"
            )
        if self.quantization and self.lora.init_lora_weights == "loftq":
            raise ValueError(
                "lora.init_lora_weights=loftq rounds the weights itself and needs them in full precision: leave "
                "quantization out, or take another start"
            )
        if self.overwrite and self.training.resume:
            raise ValueError("overwrite starts anew and training.resume goes on: set one of them")
        return self


SECTIONS: dict[str, type[Section]] = {"data": Data, "lora": Lora, "training": Training}
