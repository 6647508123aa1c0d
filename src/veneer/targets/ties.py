"""Embeddings and output heads that are one weight, and what is trained on them (`ensure_weight_tying`)."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import regex
from torch import nn

from veneer.config import LoraConfig, rank_and_alpha
from veneer.errors import VeneerWarning
from veneer.layers.weights import is_offloaded
from veneer.targets.findings import Findings
from veneer.targets.names import inside, named, selector
from veneer.targets.structure import Structure, named_by


@dataclass(frozen=True)
class Tie:
    """Modules that share one weight.

    source  the embedding
    others  the output heads, and further embeddings, tied to it
    """

    source: str
    others: tuple[str, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """All of them, the source first."""
        return (self.source, *self.others)


@dataclass
class Trained:
    """What a config trains, by path; `tied` says which of the modules share it, {path: source}."""

    targets: list[str]
    saved: list[str]
    tied: dict[str, str] = field(default_factory=dict)

    def one_weight(self, paths: list[str]) -> list[str]:
        """Those of the paths that share what is trained with another."""
        return [path for path in paths if path in self.tied or path in self.tied.values()]


def ties_of(model: nn.Module, structure: Structure) -> list[Tie]:
    """The ties of a model: modules whose weight is one and the same parameter, where one is an embedding.

    Of weights that are offloaded, each module has a parameter of its own; there the model's word counts.
    """
    groups: dict[int, list[str]] = {}
    said = _said_to_be_tied(model)
    for path, module in structure.modules.items():
        weight = module._parameters.get("weight")
        if weight is None or not isinstance(module, nn.Embedding | nn.Linear):
            continue
        source = structure.modules.get(said[path]) if path in said else None
        if source is not None and is_offloaded(module) and is_offloaded(source):
            weight = source._parameters["weight"]
        groups.setdefault(id(weight), []).append(path)
    main = input_embedding(model, structure)
    ties = []
    for paths in groups.values():
        embeddings = [path for path in paths if isinstance(structure.modules[path], nn.Embedding)]
        if len(paths) > 1 and embeddings:
            source = main if main in embeddings else embeddings[0]
            assert source is not None
            ties.append(Tie(source, tuple(path for path in paths if path != source)))
    return ties


def _said_to_be_tied(model: nn.Module) -> dict[str, str]:
    """{path: path of the module whose weight it shares}, as a transformers model lists its ties."""
    listed = vars(model).get("all_tied_weights_keys")
    if not isinstance(listed, dict):
        return {}
    ending = ".weight"
    return {
        name.removesuffix(ending): source.removesuffix(ending)
        for name, source in listed.items()
        if name.endswith(ending) and source.endswith(ending)
    }


def input_embedding(model: nn.Module, structure: Structure) -> str | None:
    """The path of the input embedding, where the model says which it is or has only one; else None."""
    found = named_by(model, "get_input_embeddings")
    if found is not None:
        return next((path for path, module in structure.modules.items() if module is found), None)
    embeddings = [path for path, module in structure.modules.items() if isinstance(module, nn.Embedding)]
    return embeddings[0] if len(embeddings) == 1 else None


def follow_ties(
    ties: Iterable[Tie], config: LoraConfig, targets: list[str], saved: list[str], findings: Findings
) -> Trained:
    """What is trained when tied modules are trained as one, if `ensure_weight_tying` asks for that."""
    trained = Trained(list(targets), list(saved))
    for tie in ties:
        targeted = [path for path in tie.paths if path in targets]
        kept = [path for path in tie.paths if inside(path, saved)]
        if not targeted and not kept:
            continue
        if not config.ensure_weight_tying:
            continue
        problems = _why_not_tied(tie, config, targeted, kept, saved)
        findings.wrong.extend(problems)
        if problems:
            continue
        one = trained.targets if targeted else trained.saved
        one.extend(path for path in tie.paths if path not in one)
        one.sort(key=lambda path, tie=tie: path in tie.others)  # whoever shares the source's comes after it
        trained.tied |= dict.fromkeys(tie.others, tie.source)
    return trained


def check_effect(ties: list[Tie], config: LoraConfig, tied: Iterable[str], findings: Findings) -> None:
    """Note `ensure_weight_tying` where nothing that is trained is tied."""
    if not config.ensure_weight_tying or list(tied) or findings.wrong:
        return
    if not ties:
        findings.idle.append("ensure_weight_tying=True: no module shares its weight with an embedding; leave it out")
    else:
        both = " or ".join(ties[0].paths)
        findings.idle.append(
            f"ensure_weight_tying=True: nothing is trained on tied weights; name {both}, or leave it out"
        )


def warn_of_untying(ties: Iterable[Tie], config: LoraConfig, targets: list[str], saved: list[str]) -> None:
    """Say what becomes of tied weights that are not trained as one."""
    if config.ensure_weight_tying:
        return
    for tie in ties:
        paths = [path for path in tie.paths if path in targets or inside(path, saved)]
        if paths:
            warnings.warn(
                f"{' and '.join(tie.paths)} share one weight, and {_what_is_trained(tie, paths)}. Merging makes them "
                "two weights, so the merged model is larger and no longer ties them. To train them as one, set "
                "ensure_weight_tying=True.",
                VeneerWarning,
                stacklevel=5,
            )


def unnamed(names: list[str], paths: Iterable[str]) -> list[str]:
    """Those of the paths that no name means."""
    return [path for path in paths if not named(names, path)]


def also_named(target: list[str] | str, paths: list[str]) -> list[str] | str:
    """`target_modules` such that these paths are meant too: an adapter file names every module that a tie adds."""
    if isinstance(target, list):
        return sorted([*target, *unnamed(target, paths)])
    missing = [path for path in paths if not selector(target)(path)]
    return "|".join([f"(?:{target})", *map(regex.escape, missing)]) if missing else target


def _what_is_trained(tie: Tie, paths: list[str]) -> str:
    if len(paths) == len(tie.paths):
        return "each is trained by itself"
    return f"only {' and '.join(paths)} {'is' if len(paths) == 1 else 'are'} trained"


def _why_not_tied(tie: Tie, config: LoraConfig, targeted: list[str], kept: list[str], saved: list[str]) -> list[str]:
    field = "ensure_weight_tying"
    if targeted and kept:
        return [
            f"{field}: {targeted[0]} is in target_modules, {kept[0]} in modules_to_save, and they share one weight; "
            "choose one"
        ]
    if kept and any(path not in saved for path in kept):
        return [f"{field}: {kept[0]} is part of a larger module in modules_to_save; name {tie.source} itself"]
    if kept:
        return []
    problems = []
    exclude = config.exclude_modules
    if exclude and (left_out := [path for path in tie.paths if selector(exclude)(path)]):
        problems.append(f"{field}: exclude_modules leaves out {left_out[0]}, which is tied to {targeted[0]}")
    if config.use_dora:
        problems.append(
            f"{field} cannot go with use_dora on {targeted[0]}: a magnitude belongs to the outputs of a layer, which "
            "are the width for an embedding and the vocabulary for a head, so the two would not stay one weight"
        )
    mine = rank_and_alpha(config, tie.source)
    for path in tie.others:
        if rank_and_alpha(config, path) != mine:
            problems.append(
                f"{field}: rank_pattern or alpha_pattern tells {path} and {tie.source} apart, but they get one adapter"
            )
    return problems
