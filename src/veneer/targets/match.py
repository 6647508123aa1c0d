"""Resolve a config against a model: every name must mean something, or all that do not are named at once.

The rules are PEFT's, so that a file means the same layers in both: a list entry is a full path or its last parts, a
string is a regular expression for the full path, exclusion wins, and a layer's index is the first number in its path
(or the first after a name in `layers_pattern`).
"""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from veneer.config import ALL_LINEAR, LoraConfig, all_matches, first_match, rank_and_alpha
from veneer.errors import VeneerWarning
from veneer.layers.kinds import EMBEDDING, kind_of
from veneer.layers.kinds.tied import TIED_HEAD
from veneer.targets.findings import Findings
from veneer.targets.layer_numbers import in_layers
from veneer.targets.left_out import stacks, warn_of_stacks
from veneer.targets.names import as_list, by_name, inside, named, selector
from veneer.targets.names_on_disk import names_on_disk
from veneer.targets.parameters import (
    attention_sites,
    check_settings,
    is_attention,
    parameter_sites,
    targeted_parameters,
    without_parts_of_attention,
)
from veneer.targets.saved import saved_modules
from veneer.targets.site import Site
from veneer.targets.structure import Structure, structure_of
from veneer.targets.suggest import explain_unmatched, some
from veneer.targets.ties import also_named, check_effect, follow_ties, ties_of, unnamed, warn_of_untying
from veneer.targets.token_rows import TokenSite, check_overlap, indices_on_disk, token_sites, warn_of_rows


@dataclass(frozen=True)
class Resolution:
    """What a config means for one model.

    sites            the layers that get an adapter, in the model's order
    saved            paths of the modules trained in full
    biases           full names of the bias parameters trained beside the adapter
    target_modules   the names or expression that mean just these sites, as an adapter file says it
    modules_to_save  the names of the modules trained in full, as an adapter file says it
    token_rows       the rows of embeddings trained in full
    token_indices    the same, as an adapter file says it
    tied             {path: source} of the sites and saved modules that share what is trained on another, their source
    """

    sites: tuple[Site, ...]
    saved: tuple[str, ...]
    biases: tuple[str, ...]
    target_modules: list[str] | str
    modules_to_save: list[str] | None
    token_rows: tuple[TokenSite, ...] = ()
    token_indices: list[int] | dict[str, list[int]] | None = None
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)


def resolve(
    model: nn.Module, config: LoraConfig, *, strict: bool = True, structure: Structure | None = None
) -> Resolution:
    """The sites, saved modules and biases that `config` means in `model`. Touches nothing.

    structure  the model's, if it was looked at already
    strict  whether a setting that matches nothing is an error. An adapter file may name more than a model has: there
            it is a warning, as the tensors of the file say what must be found.

    Raises TargetError that lists everything that does not fit, with suggestions.
    """
    structure, findings = structure or structure_of(model), Findings()
    save_names, saved = saved_modules(structure, config, findings)
    chosen = _excluded(structure, config, _targeted(structure, config, saved, findings), findings)
    ties = ties_of(model, structure)
    trained = follow_ties(ties, config, in_layers(config, chosen, findings), saved, findings)
    paths, saved = trained.targets, trained.saved
    parameters = targeted_parameters(structure, config, paths, saved, findings, strict=strict)
    rows = token_sites(model, structure, ties, config, findings)
    check_overlap(rows, paths, saved, findings)
    check_effect(ties, config, [*trained.tied, *(path for site in rows for path in site.tied)], findings)
    _check_patterns(config, [*paths, *parameters], findings)
    _check_layers(structure, config, paths, saved, findings)
    biases = _biases(structure, config, paths, saved)
    _check_something_is_left(config, [*paths, *parameters], biases, findings)
    sites = [] if findings.wrong else _with_tied(_sites(structure, config, paths, parameters), trained.tied)
    check_settings(config, sites, biases, findings, strict=strict)
    findings.settle(structure.model_name, strict=strict or not (paths or parameters))
    _warn_of_rank(sites)
    if strict:
        warn_of_untying(ties, config, paths, saved)
        warn_of_rows(structure, rows, ties)
        warn_of_stacks(structure, config, saved)
    return Resolution(
        sites=tuple(sites),
        saved=tuple(saved),
        biases=biases,
        target_modules=also_named(names_on_disk(structure, config, chosen, paths, saved), trained.one_weight(paths)),
        modules_to_save=[*save_names, *unnamed(save_names, trained.one_weight(saved))] or None,
        token_rows=rows,
        token_indices=indices_on_disk(model, config, rows),
        tied=trained.tied,
    )


def _targeted(structure: Structure, config: LoraConfig, saved: list[str], findings: Findings) -> list[str]:
    """The paths that target_modules means, before exclusions by the other fields."""
    target = config.target_modules
    if not target and config.target_parameters:
        return []
    if target is None or target == ALL_LINEAR:
        chosen = [path for path in structure.linear_layers if not inside(path, saved)]
        if not chosen:
            findings.wrong.append(f"target_modules={target!r}: there is no linear layer to adapt")
        return chosen
    selects = selector(target)
    found = [path for path in structure.modules if selects(path)]
    meant = {} if isinstance(target, str) else by_name(target, found)
    for name in as_list(target):
        mine = found if isinstance(target, str) else meant.get(name)
        if not mine:
            findings.idle.append(_unmatched_module(structure, name, is_pattern=isinstance(target, str)))
        elif all(inside(path, saved) for path in mine):
            findings.idle.append(f"target_modules: {name!r} means only modules that modules_to_save trains in full")
    return without_parts_of_attention(structure, [path for path in found if not inside(path, saved)])


def _unmatched_module(structure: Structure, name: str, *, is_pattern: bool) -> str:
    if any(named([name], parameter) for parameter in structure.adaptable_parameters):
        return f"target_modules: {name!r} is a parameter, not a layer; write it into target_parameters"
    return explain_unmatched("target_modules", name, structure.layers, is_pattern=is_pattern)


def _excluded(structure: Structure, config: LoraConfig, chosen: list[str], findings: Findings) -> list[str]:
    exclude = config.exclude_modules
    if not exclude:
        return chosen
    # a file may exclude what "all-linear" would have meant, and its resolved names do not
    candidates = list(dict.fromkeys([*chosen, *structure.layers]))
    if config.target_modules in (None, ALL_LINEAR):  # which leaves them out anyway: here it shows that this is meant
        candidates += dict.fromkeys(name.rpartition(".")[0] for name in stacks(structure))
    drops = selector(exclude)
    meant = {} if isinstance(exclude, str) else by_name(exclude, candidates)
    for name in as_list(exclude):
        if not (any(map(drops, candidates)) if isinstance(exclude, str) else name in meant):
            findings.idle.append(
                explain_unmatched("exclude_modules", name, candidates, is_pattern=isinstance(exclude, str))
            )
    return [path for path in chosen if not drops(path)]


def _check_patterns(config: LoraConfig, paths: list[str], findings: Findings) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        keys = getattr(config, field)
        used = {first_match(keys, path) for path in paths} if keys else set()
        idle = [key for key in keys if key not in used] if paths else []
        hidden = all_matches(idle, paths)
        for key in idle:
            if key in hidden:
                problem = f"{field}: {key!r} has no effect, keys before it match the same layers; put it first"
            else:
                problem = explain_unmatched(field, key, paths)
            findings.idle.append(problem)


def _check_layers(
    structure: Structure, config: LoraConfig, paths: list[str], saved: list[str], findings: Findings
) -> None:
    refused: dict[str, list[str]] = {}
    for path in paths:
        if reason := structure.refusal(path):
            refused.setdefault(reason, []).append(path)
    findings.wrong.extend(f"target_modules: {some(those)} cannot be adapted: {why}" for why, those in refused.items())
    for path in saved:
        if owner := structure.readers.get(path):
            findings.wrong.append(f"modules_to_save: {path} cannot be trained in full: {owner}")
    if config.fan_in_fan_out and (paths or config.target_parameters) and not findings.wrong:
        kinds = [kind for path in paths if (kind := kind_of(structure.modules[path]))]
        if not any(kind.fan_in_fan_out for kind in kinds):
            findings.idle.append(
                "fan_in_fan_out=True: the targets store their weight as (out, in), so it would change nothing; "
                "leave it out (it belongs to GPT-2's Conv1D)"
            )


def _check_something_is_left(config: LoraConfig, paths: list[str], biases: tuple[str, ...], findings: Findings) -> None:
    if config.bias != "none" and not biases:
        findings.idle.append(f"bias={config.bias!r}: there is no bias to train; leave it out")
    if not paths and not findings.wrong and not findings.idle:
        findings.wrong.append("no layer is left to adapt: what target_modules names is excluded")


def _sites(structure: Structure, config: LoraConfig, paths: list[str], parameters: list[str]) -> list[Site]:
    sites: list[Site] = []
    for path in paths:
        if is_attention(structure.modules[path]):
            sites += attention_sites(structure, config, path)
        else:
            sites.append(_site(structure, config, path))
    return [*sites, *parameter_sites(structure, config, parameters)]


def _site(structure: Structure, config: LoraConfig, path: str) -> Site:
    layer = structure.modules[path]
    kind = kind_of(layer)
    assert kind is not None
    rank, alpha = rank_and_alpha(config, path)
    shape = kind.dims(layer)
    return Site(
        path,
        kind,
        shape,
        factors=kind.factors(layer, shape, rank),
        magnitude=kind.magnitude(layer, shape[0]),
        rank=rank,
        alpha=alpha,
        rslora=config.use_rslora,
        dora=config.use_dora,
        dropout=config.lora_dropout,
        bias=config.lora_bias,
    )


def _with_tied(sites: list[Site], tied: Mapping[str, str]) -> list[Site]:
    """The sites, such that those tied to another are what it is: a head reads the embedding's adapter transposed."""
    by_path = {site.path: site for site in sites}
    done = []
    for site in sites:
        source = by_path.get(tied.get(site.path, ""))
        if source is not None:
            kind = EMBEDDING if site.kind is EMBEDDING else TIED_HEAD
            site = replace(site, kind=kind, factors=source.factors, tied_to=source.path)
        done.append(site)
    return done


def _warn_of_rank(sites: list[Site]) -> None:
    wasteful = [site for site in sites if site.rank > site.largest_rank]
    if wasteful:
        one = wasteful[0]
        rows = one.shape[0] // one.kind.matrices
        warnings.warn(
            f"{len(wasteful)} layer(s) get a rank above what their weight can have, which costs memory and adds "
            f"nothing: {one.name} is {rows} × {one.shape[1]}, rank {one.rank}.",
            VeneerWarning,
            stacklevel=4,
        )


def _biases(structure: Structure, config: LoraConfig, paths: list[str], saved: list[str]) -> tuple[str, ...]:
    if config.bias == "none":
        return ()
    owners = paths if config.bias == "lora_only" else list(structure.modules)
    return tuple(f"{path}.bias" for path in owners if structure.has_bias(path) and not inside(path, saved))
