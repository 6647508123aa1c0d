"""`trainable_token_indices`: which rows of which embeddings are trained in full."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from veneer.config import LoraConfig
from veneer.errors import VeneerWarning
from veneer.layers.sharded import shape_of
from veneer.layers.token_rows import why_no_rows
from veneer.targets.findings import Findings
from veneer.targets.names import inside, named
from veneer.targets.structure import Structure
from veneer.targets.suggest import explain_unmatched
from veneer.targets.ties import Tie, input_embedding

FIELD = "trainable_token_indices"


@dataclass(frozen=True)
class TokenSite:
    """Rows that are trained: of which module, for which tokens, and which modules share them.

    width  D, how many numbers a row has
    tied   paths of the modules that share the weight, and so the rows
    """

    path: str
    tokens: tuple[int, ...]
    width: int
    tied: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Every module the rows act in, their owner first."""
        return (self.path, *self.tied)

    @property
    def parameters(self) -> int:
        """How many trainable numbers the rows have."""
        return len(self.tokens) * self.width


def token_sites(
    model: nn.Module, structure: Structure, ties: list[Tie], config: LoraConfig, findings: Findings
) -> tuple[TokenSite, ...]:
    """The rows that `trainable_token_indices` means. What is tied to an embedding shares its rows, as in PEFT."""
    wanted = _tokens_by_path(model, structure, config, findings)
    sites, done = [], set()
    for path in sorted(wanted, key=lambda path: any(path in tie.others for tie in ties)):  # a source comes first
        if path in done:
            continue
        tie = next((tie for tie in ties if path in tie.paths), None)
        shared = _sharing(path, tie, wanted, config, findings)
        done |= set(shared)
        owner = shared[0]
        if problems := _why_not(structure, shared, wanted[path]):
            findings.wrong.extend(problems)
        else:
            weight = structure.modules[owner]._parameters["weight"]
            assert weight is not None
            sites.append(TokenSite(owner, tuple(wanted[path]), shape_of(weight)[1], shared[1:]))
    return tuple(sites)


def check_overlap(sites: Iterable[TokenSite], targets: list[str], saved: list[str], findings: Findings) -> None:
    """Note modules whose rows are trained and that are trained in another way as well."""
    for site in sites:
        for path in site.paths:
            tied = "" if path == site.path else f" (tied to {site.path})"
            if path in targets:
                findings.wrong.append(
                    f"{FIELD}: {path}{tied} is in target_modules too: a row that is trained in full has no use for an "
                    "update; leave it out of one of them"
                )
            if inside(path, saved):
                findings.wrong.append(f"{FIELD}: {path}{tied} is trained in full already, by modules_to_save")


def warn_of_rows(structure: Structure, sites: Iterable[TokenSite], ties: list[Tie]) -> None:
    """Say where rows will not train, or will untie a weight."""
    for site in sites:
        padding = getattr(structure.modules[site.path], "padding_idx", None)
        if padding in site.tokens and not site.tied:
            warnings.warn(
                f"{FIELD}: token {padding} is the padding of {site.path}, whose row gets no gradient, so it stays.",
                VeneerWarning,
                stacklevel=5,
            )
        tie = next((tie for tie in ties if site.path in tie.paths), None)
        if tie is not None and set(site.paths) != set(tie.paths):
            warnings.warn(
                f"{' and '.join(tie.paths)} share one weight, and {FIELD} trains rows of {' and '.join(site.paths)} "
                "by themselves. Merging makes them two weights. To train them as one, name the embedding only.",
                VeneerWarning,
                stacklevel=5,
            )


def indices_on_disk(
    model: nn.Module, config: LoraConfig, sites: tuple[TokenSite, ...]
) -> list[int] | dict[str, list[int]] | None:
    """The setting as a file says it. A list means an input embedding that the model names itself, so that PEFT finds
    it too; otherwise it is named."""
    given = config.trainable_token_indices
    if not isinstance(given, list) or hasattr(model, "get_input_embeddings"):
        return given
    return {site.path: list(site.tokens) for site in sites}


def _tokens_by_path(
    model: nn.Module, structure: Structure, config: LoraConfig, findings: Findings
) -> dict[str, list[int]]:
    given = config.trainable_token_indices
    if given is None:
        return {}
    if isinstance(given, list):
        path = input_embedding(model, structure)
        if path is None:
            there = [path for path, module in structure.modules.items() if isinstance(module, nn.Embedding)]
            hint = f"name one: {{'…': [...]}} with {', '.join(there)}" if there else "the model has no Embedding"
            findings.wrong.append(f"{FIELD}: which embedding is meant cannot be told; {hint}")
        return {} if path is None else {path: given}
    wanted: dict[str, list[int]] = {}
    for name, tokens in given.items():
        paths = [path for path in structure.modules if named([name], path)]
        if not paths:
            embeddings = [path for path, one in structure.modules.items() if isinstance(one, nn.Embedding)]
            findings.idle.append(explain_unmatched(FIELD, name, embeddings))
        for path in paths:
            if wanted.setdefault(path, tokens) != tokens:
                findings.wrong.append(f"{FIELD}: {path} is named twice, with different tokens")
    return wanted


def _sharing(
    path: str, tie: Tie | None, wanted: dict[str, list[int]], config: LoraConfig, findings: Findings
) -> tuple[str, ...]:
    """The modules that have the rows of `path` in common, their owner first."""
    if tie is None:
        return (path,)
    differing = [other for other in tie.paths if other in wanted and wanted[other] != wanted[path]]
    if differing and config.ensure_weight_tying:
        findings.wrong.append(
            f"{FIELD}: {path} and {differing[0]} are tied, and ensure_weight_tying needs the same tokens for both"
        )
        return tie.paths
    if config.ensure_weight_tying or (path == tie.source and not differing):
        return tie.paths
    return (path,)


def _why_not(structure: Structure, paths: tuple[str, ...], tokens: list[int]) -> list[str]:
    problems = []
    for path in paths:
        module = structure.modules[path]
        if reason := why_no_rows(module) or structure.readers.get(path):
            problems.append(f"{FIELD}: rows of {path} cannot be trained: {reason}")
    weight = structure.modules[paths[0]]._parameters.get("weight")
    if not problems and weight is not None:
        rows = shape_of(weight)[0]
        outside = [token for token in tokens if token >= rows]
        if outside:
            problems.append(
                f"{FIELD}: {paths[0]} has {rows} rows, 0 to {rows - 1}, so none for token "
                f"{', '.join(map(str, outside))}; make room first with model.resize_token_embeddings"
            )
    return problems
