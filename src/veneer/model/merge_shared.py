"""What merging means for embeddings: rows that stand in place of theirs, and weights that stay one after it."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from veneer.errors import MergeError
from veneer.layers.kinds import Layer
from veneer.layers.token_rows import TokenRows, with_rows
from veneer.layers.weights import is_offloaded, write
from veneer.model.overlay import overlay_needed, token_rows

Sources = Mapping[str, str]


def sources_of(model: nn.Module, names: Sequence[str]) -> Sources:
    """{path: source} of the modules whose merged weight is their source's: all that acts on either is shared."""
    overlay = overlay_needed(model)
    effects: dict[str, list[tuple[str, str]]] = {}  # by module, what acts on its weight: (adapter, the owner of it)
    for name in names:
        resolution = overlay.resolutions[name]
        for site in resolution.sites:
            effects.setdefault(site.path, []).append((name, site.tied_to or site.path))
        for rows in resolution.token_rows:
            for path in rows.paths:
                effects.setdefault(path, []).append((name, rows.path))
    return {
        path: source for path, mine in effects.items() if (source := mine[0][1]) != path and effects.get(source) == mine
    }


def one_with(sources: Sources, path: str) -> list[str]:
    """The module and those that have its merged weight."""
    return [path, *(tied for tied, source in sources.items() if source == path)]


def put_merged(find: Callable[[str], Layer], sources: Sources, path: str, parameter: str, value: Tensor) -> None:
    """Put a merged value in place, as one parameter in all modules that share it; `find` is the model's `finder`."""
    first, *others = (find(one) for one in one_with(sources, path))
    write(first, parameter, value)
    for other in others:
        if is_offloaded(other, parameter):
            write(other, parameter, value)
        else:
            other._parameters[parameter] = first._parameters[parameter]


def check_rows(model: nn.Module, names: Sequence[str]) -> None:
    """Raise MergeError if two adapters train the same row."""
    owners: dict[tuple[str, int], str] = {}
    for name in names:
        for site, _ in token_rows(model, name):
            for path, token in ((path, token) for path in site.paths for token in site.tokens):
                if (path, token) in owners:
                    raise MergeError(
                        f"Adapters {owners[path, token]!r} and {name!r} both train the row of token {token} in {path}; "
                        "only one can be merged."
                    )
                owners[path, token] = name


def merged_rows(model: nn.Module, names: Sequence[str], sources: Sources) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """((path, name), merged value) of each weight with rows of adapters in it. Raises MergeError if one is broken."""
    found: dict[str, list[TokenRows]] = {}
    for name in names:
        for site, rows in token_rows(model, name):
            for path in site.paths:
                found.setdefault(path, []).append(rows)
    for path, adapters in found.items():
        if path in sources:
            continue
        yield (path, "weight"), with_rows(model.get_submodule(path), adapters, path)
