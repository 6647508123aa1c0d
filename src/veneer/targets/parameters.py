"""Weights that a module reads instead of being called: `target_parameters`, and the two of an attention module.

The rules are PEFT's: an entry is a parameter's full name or its last parts, and files nest. Of several parameters of
one module, in the order in which it registers them, the last has the module's own path there, the one before it that
path and ".base_layer", and so on.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from veneer.config import LoraConfig, rank_and_alpha
from veneer.config.init_names import DATA_DRIVEN
from veneer.layers.kinds import ATTENTION, Kind, Stack, kind_of, parameter_kind
from veneer.layers.saved_module import CONTAINERS
from veneer.targets.findings import Findings
from veneer.targets.names import inside, named, selector
from veneer.targets.site import Site
from veneer.targets.structure import Structure
from veneer.targets.suggest import explain_unmatched, some

WRAPPED = "base_layer"


def targeted_parameters(
    structure: Structure, config: LoraConfig, paths: list[str], saved: list[str], findings: Findings, *, strict: bool
) -> list[str]:
    """The full names of the parameters that target_parameters means, in the model's order.

    paths, saved  the modules that get an adapter, or are trained in full
    strict        whether a layer's own weight, which target_modules could name, is refused
    """
    wanted = config.target_parameters or []
    found = [name for name in structure.parameters if named(wanted, name)]
    for entry in wanted:
        if not any(named([entry], name) for name in found):
            findings.idle.append(_unmatched(structure, entry))
    refused: dict[str, list[str]] = {}
    for name in found:
        if reason := _refusal(structure, name, paths, saved, strict=strict):
            refused.setdefault(reason, []).append(name)
    findings.wrong.extend(
        f"target_parameters: {some(those)} cannot be adapted: {why}" for why, those in refused.items()
    )
    if strict and found:
        _check_other_fields(config, found, findings)
    return found


def parameter_sites(structure: Structure, config: LoraConfig, names: list[str]) -> Iterator[Site]:
    """The sites of the parameters of these full names."""
    owners = [name.rpartition(".")[0] for name in names]
    for index, name in enumerate(names):
        path, _, parameter = name.rpartition(".")
        outside = owners[index + 1 :].count(path)
        file_path = path + f".{WRAPPED}" * outside
        yield _site(structure, config, path, parameter, file_path=file_path, pattern_name=name)


def is_attention(module: nn.Module) -> bool:
    """Whether a module is adapted through two weights that it reads: its in_proj_weight and that of its out_proj."""
    return kind_of(module) is ATTENTION


def without_parts_of_attention(structure: Structure, paths: list[str]) -> list[str]:
    """The paths without those whose attention module is among them: they are adapted with it."""
    chosen = {f"{path}.out_proj" for path in paths if is_attention(structure.modules[path])}
    return [path for path in paths if path not in chosen]


def attention_sites(structure: Structure, config: LoraConfig, path: str) -> Iterator[Site]:
    """The two sites of the attention module at `path`."""
    yield _site(structure, config, path, "in_proj_weight", file_path=path, pattern_name=path)
    file_path = f"{path}.{WRAPPED}.out_proj"
    yield _site(structure, config, f"{path}.out_proj", "weight", file_path=file_path, pattern_name=path)


def check_settings(
    config: LoraConfig, sites: list[Site], biases: Sequence[str], findings: Findings, *, strict: bool
) -> None:
    """Find the settings that a weight which is read cannot follow.

    biases  the biases that the config's `bias` means
    strict  whether to refuse an exclusion of half an attention module, which PEFT does not follow, and a `bias` that
            means none
    """
    read = [site.name for site in sites if site.by_weight]
    if not read:
        return
    if strict and config.exclude_modules:
        drops = selector(config.exclude_modules)
        findings.wrong.extend(
            f"exclude_modules: {site.path} is adapted together with the attention module that it is a part of; "
            f"exclude that module, or name its in_proj_weight alone in target_parameters"
            for site in sites
            if site.by_weight and site.parameter == "weight" and drops(site.path)
        )
    if config.lora_dropout and not config.inference_mode:
        findings.wrong.append(
            f"lora_dropout={config.lora_dropout:g}: {some(read)} is read by its module, so no input of it can be "
            "dropped; set lora_dropout=0, or leave it out of the targets"
        )
    if strict and config.init_lora_weights in DATA_DRIVEN:
        findings.wrong.append(
            f"init_lora_weights={config.init_lora_weights!r} measures what goes into a layer, and {some(read)} is read "
            "by its module; choose another one"
        )
    if config.bias != "none" and (strict or biases):
        findings.wrong.append(f"bias={config.bias!r} cannot go with {some(read)}, which its module reads; set 'none'")
    if config.lora_bias:
        findings.wrong.append(f"lora_bias cannot go with {some(read)}: a weight that is read has no place for a bias")


def _site(
    structure: Structure, config: LoraConfig, path: str, parameter: str, *, file_path: str, pattern_name: str
) -> Site:
    module = structure.modules[path]
    kind = kind_of_parameter(module, parameter)
    rank, alpha = rank_and_alpha(config, pattern_name)
    shape = kind.dims(module)
    return Site(
        path,
        kind,
        shape,
        factors=kind.factors(module, shape, rank),
        magnitude=kind.magnitude(module, shape[0]),
        rank=rank,
        alpha=alpha,
        rslora=config.use_rslora,
        dora=config.use_dora,
        dropout=0.0,
        parameter=parameter,
        file_path=file_path,
    )


def kind_of_parameter(module: nn.Module, parameter: str) -> Kind:
    """The kind of a parameter of two or three dimensions. Experts say themselves if they store (in, out)."""
    weight = module._parameters[parameter]
    assert weight is not None
    return parameter_kind(Stack.of(weight, transposed=bool(getattr(module, "is_transposed", False))))


def _refusal(structure: Structure, name: str, paths: list[str], saved: list[str], *, strict: bool) -> str | None:
    """Why the parameter of this full name cannot be adapted, or None if it can."""
    path, _, parameter = name.rpartition(".")
    if not path:
        return "it belongs to the model itself, and only those of a module inside can be adapted"
    module = structure.modules[path]
    weight = module._parameters[parameter]
    assert weight is not None
    if inside(path, saved):
        return "modules_to_save trains its module in full"
    if path in paths or any(is_attention(structure.modules[other]) and inside(path, [other]) for other in paths):
        return "target_modules adapts its module already"
    if isinstance(module, CONTAINERS):
        return f"it lies in a {type(module).__name__}, which is never called itself"
    if structure.readers.get(path):
        return structure.readers[path]
    if parameter == "weight" and kind_of(module) is not None and strict:
        return f"it is the weight of a layer; write target_modules=[{path.rpartition('.')[2]!r}]"
    if weight.dim() not in (2, 3):
        return f"it has {weight.dim()} dimension(s), and only a matrix or a stack of matrices can be adapted"
    return None


def _check_other_fields(config: LoraConfig, found: list[str], findings: Findings) -> None:
    """PEFT follows neither field for parameters, so a file with both would mean something else there."""
    if config.layers_to_transform is not None:
        findings.wrong.append(
            "layers_to_transform does not choose among target_parameters: give the full names of those to adapt"
        )
    if config.exclude_modules:
        drops = selector(config.exclude_modules)
        hit = [name for name in found if drops(name) or drops(name.rpartition(".")[0])]
        if hit:
            findings.wrong.append(
                f"exclude_modules does not choose among target_parameters ({some(hit)}): give the full names of those "
                "to adapt"
            )


def _unmatched(structure: Structure, entry: str) -> str:
    layers = [path for path in structure.modules if named([entry], path)]
    own = [name for name in structure.adaptable_parameters if layers and name.rpartition(".")[0] == layers[0]]
    if own:
        names = ", ".join(f"{entry}.{name.rpartition('.')[2]}" for name in own)
        return f"target_parameters: {entry!r} is a module; name its parameters: {names}"
    if layers:
        return f"target_parameters: {entry!r} is a module; name one of its parameters, or write it into target_modules"
    return explain_unmatched("target_parameters", entry, structure.adaptable_parameters)
