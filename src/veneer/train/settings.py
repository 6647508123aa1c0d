"""run.yaml: what it may say, read and checked. Every problem is collected and raised at once.

settings = load(Path("run.yaml"), ["lora.r=32", "training.epochs=2"])
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import ErrorDetails

from veneer.errors import ConfigError, RunError, bullet_list
from veneer.suggest import did_you_mean

if TYPE_CHECKING:
    from veneer import LoraConfig

Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Share = Annotated[float, Field(ge=0, lt=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


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

    r: int = 16
    lora_alpha: int | Finite = 32
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    lora_dropout: Finite = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}

    def config(self) -> "LoraConfig":
        """The LoraConfig these fields make; ConfigError if they cannot be right."""
        from veneer import LoraConfig

        return LoraConfig(**self.model_dump(), task_type="CAUSAL_LM")


class Training(Section):
    """How long and how fast."""

    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 1
    max_steps: Annotated[int, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(gt=0)] = 8
    gradient_accumulation: Annotated[int, Field(gt=0)] = 1
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.03
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    max_length: Annotated[int, Field(gt=1)] = 1024
    packing: bool = False
    gradient_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    log_every: Annotated[int, Field(gt=0)] = 1
    eval_every: Annotated[int, Field(gt=0)] | None = None
    save_every: Annotated[int, Field(gt=0)] | None = None
    keep_checkpoints: Annotated[int, Field(gt=0)] = 2
    resume: bool = False

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.max_steps is not None and self.epochs is not None and "epochs" in self.model_fields_set:
            raise ValueError("epochs and max_steps both say how long to train: set one of them and the other to null")
        if self.max_steps is None and self.epochs is None:
            raise ValueError("neither epochs nor max_steps says how long to train")
        return self


class RunConfig(Section):
    """A whole run: model, data, adapter, training and the folder for what comes out."""

    model: Text
    revision: Text | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    data: Data
    lora: Lora = Lora()
    training: Training = Training()
    output: Text
    overwrite: bool = False

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if self.training.eval_every and not (self.data.eval or self.data.eval_fraction):
            raise ValueError("training.eval_every needs rows to evaluate on: set data.eval or data.eval_fraction")
        if self.overwrite and self.training.resume:
            raise ValueError("overwrite starts anew and training.resume goes on: set one of them")
        return self


SECTIONS: dict[str, type[Section]] = {"data": Data, "lora": Lora, "training": Training}


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run file with `section.key=value` overrides laid over it; RunError names every problem."""
    if not path.is_file():
        raise RunError(f"There is no run file {path}. `veneer init {path}` writes one to start from.")
    return parse(path.read_text(encoding="utf-8-sig"), overrides, source=str(path))


def parse(text: str, overrides: Sequence[str] = (), *, source: str = "run.yaml") -> RunConfig:
    """As `load`, from the text of a run file; `source` is what error messages call it."""
    values = _read_yaml(text, source)
    problems = [problem for override in overrides for problem in _lay_over(values, override)]
    config = None
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += [_in_words(detail) for detail in error.errors()]
    problems += _lora_problems(values.get("lora"))
    if problems or config is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RunError(bullet_list(f"{source} cannot be used: {count}.", problems))
    return config


def _read_yaml(text: str, source: str) -> dict[str, Any]:
    import yaml

    try:
        values = _strict_loader()(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise RunError(f"{source} is not valid YAML{where}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(values, dict):
        raise RunError(
            f"{source} must hold keys such as 'model', 'data' and 'output'. `veneer init` writes an example."
        )
    return values


def _strict_loader() -> Any:
    """A YAML loader that refuses a key written twice, of which PyYAML would silently keep the last."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is written twice", key.start_mark
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    return StrictLoader


def _lay_over(values: dict[str, Any], override: str) -> list[str]:
    """Put one `a.b=value` into the nested values; the list says what is wrong with it."""
    import yaml

    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        return [f"{override!r} is not of the form key=value, for example training.epochs=2"]
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    place = values
    for key in keys[:-1]:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            return [f"{path}: {key!r} is not a section"]
    place[keys[-1]] = value
    return []


def _in_words(detail: ErrorDetails) -> str:
    """One pydantic error as a line: the key, what is allowed and what was given."""
    keys = [str(key) for key in detail["loc"]]
    name = ".".join(keys) or "run"
    known = (SECTIONS.get(keys[0], RunConfig) if len(keys) > 1 else RunConfig).model_fields if keys else {}
    if detail["type"] == "extra_forbidden":
        return f"{name}: unknown key{did_you_mean(keys[-1], known) or _elsewhere(keys[-1]) or _all_of(known)}"
    if detail["type"] == "missing":
        return f"{name}: is required"
    if detail["type"] == "value_error":
        message = detail["msg"].removeprefix("Value error, ")
        return message if not keys else f"{name}: {message}"
    if detail["type"] == "model_type":
        return f"{name}: must be a section with keys of its own ({', '.join(SECTIONS[name].model_fields)})"
    allowed = detail["msg"].removeprefix("Input ").partition(", unable to parse")[0]
    return f"{name}: {allowed}, got {detail['input']!r}"


def _elsewhere(key: str) -> str:
    """Where a key that is at the wrong place would belong."""
    homes = [f"{section}.{key}" for section, model in SECTIONS.items() if key in model.model_fields]
    homes += [key] if key in RunConfig.model_fields else []
    return f", did you mean {homes[0]!r}?" if homes else ""


def _all_of(known: Any) -> str:
    return f" (allowed: {', '.join(known)})"


def _lora_problems(values: Any) -> list[str]:
    """What LoraConfig says about the section, once its keys and types are right."""
    try:
        Lora.model_validate(values or {}).config()
    except ValidationError:
        return []
    except ConfigError as error:
        headline, *lines = str(error).splitlines()
        return [f"lora.{line.strip()}" for line in lines] or [f"lora: {headline}"]
    return []
