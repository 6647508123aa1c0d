"""run.yaml and the settings laid over it, read and checked. Every problem is collected and raised at once.

settings = load(Path("run.yaml"), ["lora.r=32", "training.epochs=2"])
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from veneer.errors import ConfigError, RunError, bullet_list
from veneer.train.setting_problems import in_words
from veneer.train.settings import SECTIONS, Lora, RunConfig


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run file with `section.key=value` overrides laid over it; RunError names every problem."""
    if not path.is_file():
        raise RunError(f"There is no run file {path}. `veneer init {path}` writes one to start from.")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RunError(f"{path} is not UTF-8 text (line {line}). Save it as UTF-8.") from None
    return parse(text, overrides, source=str(path))


def parse(text: str, overrides: Sequence[str] = (), *, source: str = "run.yaml") -> RunConfig:
    """As `load`, from the text of a run file; `source` is what error messages call it."""
    values = _read_yaml(text, source)
    values |= {name: {} for name in SECTIONS if name in values and values[name] is None}
    problems = [problem for override in overrides for problem in _lay_over(values, override)]
    config = None
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += in_words(error)
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
    except ValueError as error:  # a date or a number that does not exist, such as 2026-13-01
        raise RunError(f"{source} is not valid YAML: {error}") from None
    except RecursionError:
        raise RunError(f"{source} is not valid YAML: it is nested too deeply") from None
    if not isinstance(values, dict):
        raise RunError(
            f"{source} must hold keys such as 'model', 'data' and 'output'. `veneer init` writes an example."
        )
    return values


def _strict_loader() -> Any:
    """A YAML loader that refuses a key that is no word, and one written twice, of which PyYAML keeps the last."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                problem = None
                if not isinstance(key, yaml.ScalarNode):
                    problem = "a key must be a word, not a list or a mapping"
                elif key.value in seen:
                    problem = f"the key {key.value!r} is written twice"
                if problem:
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
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
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    place = values
    for key in keys[:-1]:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            return [f"{path}: {key!r} is not a section"]
    place[keys[-1]] = value
    return []


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
