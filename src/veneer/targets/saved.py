"""`modules_to_save`: which modules are trained in full, with the head that a classification task brings."""

import warnings
from collections.abc import Iterable

from veneer.config import LoraConfig, TaskType, ends_of
from veneer.errors import VeneerWarning
from veneer.targets.findings import Findings
from veneer.targets.names import inside, named
from veneer.targets.structure import Structure
from veneer.targets.suggest import explain_unmatched

HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


def saved_modules(structure: Structure, config: LoraConfig, findings: Findings) -> tuple[list[str], list[str]]:
    """Names and paths of the modules trained in full: those asked for, and the head of a classifier."""
    heads = HEADS.get(config.task_type, ()) if isinstance(config.task_type, TaskType) else ()
    present = [head for head in heads if any(named([head], path) for path in structure.modules)]
    # PEFT lists every name a head may have; those that this model does not have mean nothing
    names = [name for name in config.modules_to_save or [] if name in present or name not in heads]
    for name in names:
        if not any(named([name], path) for path in structure.modules):
            findings.idle.append(explain_unmatched("modules_to_save", name, structure.modules))
    names += [head for head in present if head not in names]
    if heads and not names:
        warnings.warn(
            f"task_type={config.task_type} trains a new head, but {structure.model_name} has no "
            f"{' or '.join(heads)}: name its head in modules_to_save, or it stays as it is.",
            VeneerWarning,
            stacklevel=4,
        )
    paths = [path for path in structure.modules if named(names, path)]
    outermost = [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]
    return _read_alike(structure, names, heads, outermost), outermost


def _read_alike(structure: Structure, names: list[str], heads: Iterable[str], saved: list[str]) -> list[str]:
    """The names, longer where PEFT would read more in them: to it "norm" means "input_layernorm" as well."""
    others = [path for path in structure.modules if not inside(path, saved)]
    found: list[str] = []
    for name in names:
        mine = [path for path in saved if named([name], path)]
        if name in heads or not mine or not any(path.endswith(name) for path in others):
            found.append(name)
            continue
        for path in mine:
            longer = (end for end in ends_of(path) if not any(other.endswith(end) for other in others))
            found.append(next(longer, name))
    return list(dict.fromkeys(found))


def read_by_ending(modules: Iterable[str], config: LoraConfig) -> list[str]:
    """Paths that PEFT finds in modules_to_save beyond those named: it looks at ends, wherever a name begins."""
    names = config.modules_to_save or []
    return [path for path in modules if any(map(path.endswith, names)) and not named(names, path)]
