"""`modules_to_save`: which modules are trained in full, with the head that a classification task brings."""

import warnings

from veneer.config import LoraConfig, TaskType
from veneer.errors import VeneerWarning
from veneer.targets.findings import Findings
from veneer.targets.names import inside, named
from veneer.targets.names_on_disk import suffixes
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
    on_disk = [[name] if name in heads else _for_peft(name, structure, outermost) for name in names]
    return [name for some in on_disk for name in some], outermost


def _for_peft(name: str, structure: Structure, paths: list[str]) -> list[str]:
    """The name, or longer ones where PEFT, which looks at the letters that a path ends with, would take more modules.

    `norm`, say, is `input_layernorm` to PEFT too.
    """
    others = [path for path in structure.modules if path.endswith(name) and path not in paths]
    others = [path for path in others if not inside(path, paths)]
    mine = [path for path in paths if named([name], path)]
    if not others or not mine:
        return [name]
    found = dict.fromkeys(
        next((end for end in suffixes(path) if not any(other.endswith(end) for other in others)), name) for path in mine
    )
    return list(found)
