"""An adapter file with the names that an older version of its model had, read as one with today's names.

First the names alone are looked at, with the shapes in the header; values are only moved once all of it fits.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path

from torch import Tensor, nn

from veneer.config import LoraConfig, rank_and_alpha
from veneer.errors import AdapterFileError, bullet_list, shortened
from veneer.functional.lowrank import scaling
from veneer.layers.kinds import kind_of
from veneer.model.renamed.former_names import FormerNames, Place, former_names, place_of
from veneer.model.renamed.names import Known, plain_name, probed, shown, split
from veneer.model.renamed.pieces import FACTOR_A, FACTOR_B, MAGNITUDE, Joined, Piece, lacking, whole_weight
from veneer.model.renamed.settings import RankAndAlpha, renamed_config, renamed_modules
from veneer.model.start import takes_off_its_start
from veneer.storage import keys
from veneer.storage.header import Header, TensorInfo
from veneer.targets.names import named
from veneer.targets.parameters import kind_of_parameter, parameter_sites
from veneer.targets.structure import Structure, structure_of

_Recipe = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class RenamedFile:
    """A file as it would be with today's names.

    config   what it says of the adapter
    header   names, shapes and dtypes of its tensors
    recipes  how each of them comes from the tensors that the file has, whose names lack `base_model.model.`
    became   {former name: name now}, a star for each number
    dropout  the lora_dropout that the file had and the config has not, or 0
    """

    config: LoraConfig
    header: Header
    recipes: Mapping[str, _Recipe]
    became: Mapping[str, str]
    dropout: float

    def values(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with today's names, from those of the file."""
        plain = {plain_name(key): value for key, value in tensors.items()}
        return {key: recipe(plain) for key, recipe in self.recipes.items()}

    def notice(self, source: object, model_name: str) -> str:
        """What a user should know: what was read as what, and how to be rid of it."""
        lines = shortened([f"{former} → {now}" for former, now in self.became.items()])
        if self.dropout:
            lines.append(f"lora_dropout: {self.dropout:g} → 0, since no input of a parameter can be dropped")
        headline = (
            f"{source} was made for an older version of {model_name}. It is read with the names and parameters there "
            "are now; save the adapter, and the new file has them:"
        )
        return bullet_list(headline, lines)


def read_renamed(
    model: nn.Module, source: Path, config: LoraConfig, header: Header, structure: Structure | None = None
) -> RenamedFile | None:
    """The file with today's names; None if it has them, or if nothing in it is known by a former name.

    structure  the model's, if it was looked at already

    Raises AdapterFileError if some of its names are and others are not, or if the values cannot follow.
    """
    plain = {plain_name(key): info for key, info in header.tensors.items()}
    structure = structure or structure_of(model)
    known = Known(structure, model)
    read = any(_is_read(structure, config, key) for key in plain)
    if config.layer_replication or (all(map(known.has, plain)) and not read):
        return None
    names = former_names(model)
    found = {name: _place(names, known, name) for name in sorted({probed(key) for key in plain})} if names else {}
    places = {key: found[probed(key)] for key in plain} if names else {}
    if not places or not (read or any(place and place.name != probed(key) for key, place in places.items())):
        return None
    return _Reading(model, structure, source, config, header, plain, places, known).done()


def _is_read(structure: Structure, config: LoraConfig, key: str) -> bool:
    """Whether a tensor is of an adapter on what was a layer once and is a module that reads its weight now."""
    path, added = split(key)
    module = structure.modules.get(path)
    if module is None or not added.startswith(".lora_") or kind_of(module) is not None:
        return False
    name = f"{path}.weight"
    return name in structure.parameters and not named(config.target_parameters or [], name)


def _place(names: Iterable[FormerNames], known: Known, name: str) -> Place | None:
    place = place_of(names, name)
    if place is not None and known.has_place(place):
        return place
    return Place(name) if known.has_place(Place(name)) else None


class _Reading:
    """One file being read: places are known, names, settings and recipes are made from them."""

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        source: Path,
        config: LoraConfig,
        header: Header,
        plain: Mapping[str, TensorInfo],
        places: Mapping[str, Place | None],
        known: Known,
    ) -> None:
        self.model, self.structure, self.source, self.config = model, structure, source, config
        self.header, self.plain, self.known = header, plain, known
        self._refuse_lost(places)
        self.places = {key: place for key, place in places.items() if place is not None}
        self.became = {
            shown(probed(key)): shown(place.name) for key, place in self.places.items() if place.name != probed(key)
        }
        self.tensors: dict[str, TensorInfo] = {}
        self.recipes: dict[str, _Recipe] = {}

    def done(self) -> RenamedFile:
        """The file with today's names. Raises AdapterFileError."""
        layers, parameters, joined = self._targets()
        if joined and (takes_off_its_start(self.config) or self.config.init_lora_weights == "loftq"):
            raise AdapterFileError(
                f"{self.source}: init_lora_weights={self.config.init_lora_weights!r} starts from weights which are "
                f"parts of others now ({_first(joined)}), so that start cannot be made again. Load the adapter with "
                "the version of transformers it was made with and save it as a plain LoRA."
            )
        moved = self._moved_modules()
        saved = renamed_modules(self.structure, self.config.modules_to_save or [], moved)
        config = renamed_config(
            self.model,
            self.structure,
            self.config,
            layers,
            parameters,
            modules_to_save=saved or None,
            trainable_token_indices=self._token_indices(moved),
        )
        self._move_names()
        self._join(joined, config, list(parameters))
        self._gather_whole()
        header = Header(self.tensors, self.header.metadata, self.header.data_start)
        return RenamedFile(config, header, self.recipes, self.became, self.config.lora_dropout - config.lora_dropout)

    def _refuse_lost(self, places: Mapping[str, Place | None]) -> None:
        """Raise AdapterFileError if a name leads nowhere, or to where values cannot follow."""
        lost = list(dict.fromkeys(shown(split(key)[0]) for key, place in places.items() if place is None))
        refused = {shown(probed(key)): place for key, place in places.items() if place is not None and place.refused}
        if not lost and not refused:
            return
        moved = {
            shown(probed(key)): shown(place.name)
            for key, place in places.items()
            if place is not None and place.name != probed(key) and not place.refused
        }
        lines = [
            *shortened([f"not in the model    {name}" for name in lost]),
            *shortened([f"cannot be followed  {name} → {p.name}: {p.refused}" for name, p in refused.items()]),
            *shortened([f"found as            {now}, once {former}" for former, now in moved.items()]),
        ]
        raise AdapterFileError(
            bullet_list(
                f"{self.source} has names of an older version of {self.structure.model_name}, and not all of them "
                "lead to something in it:",
                lines,
            )
        )

    def _targets(self) -> tuple[dict[str, RankAndAlpha], dict[str, RankAndAlpha], dict[str, Joined]]:
        """The layers and the parameters that are adapted, with rank and alpha, and those that several become."""
        layers: dict[str, RankAndAlpha] = {}
        parameters: dict[str, RankAndAlpha] = {}
        pieces: dict[str, dict[str, Piece]] = {}
        for key, place in self.places.items():
            path, added = split(key)
            if ".lora_" not in added:
                continue
            rank, alpha = rank_and_alpha(self.config, path)
            owner = place.name.removesuffix(".weight")
            if not place.is_whole:
                scale = scaling(alpha, rank, rslora=self.config.use_rslora)
                pieces.setdefault(place.name, {})[path] = Piece(path, place, rank, alpha, scale)
                if added not in (FACTOR_A, FACTOR_B, MAGNITUDE):
                    raise AdapterFileError(
                        f"{self.source}: {key} belongs to a weight that is a part of {place.name} now, which has no "
                        "place for it."
                    )
            elif owner in self.structure.modules and kind_of(self.structure.modules[owner]) is not None:
                layers[owner] = rank, alpha
            elif place.name in self.structure.parameters:
                parameters[place.name] = rank, alpha
                self.became[shown(probed(key))] = f"{shown(place.name)}.weight"
            else:
                parameters |= self._named_parameters(path, owner)
        shapes = {key: info.shape for key, info in self.plain.items()}
        joined = {name: self._joined(name, list(those.values()), shapes) for name, those in pieces.items()}
        for name, one in joined.items():
            owner = name.removesuffix(".weight")
            is_layer = name != owner and kind_of(self.structure.modules[owner]) is not None
            (layers if is_layer else parameters)[owner if is_layer else name] = one.rank, one.alpha
        order = self.structure.parameters.index
        return layers, dict(sorted(parameters.items(), key=lambda item: order(item[0]))), joined

    def _named_parameters(self, path: str, owner: str) -> dict[str, RankAndAlpha]:
        """The parameters of a module that target_parameters named already, by its former path."""
        found: dict[str, RankAndAlpha] = {}
        for name in self.structure.parameters:
            module, _, own = name.rpartition(".")
            former = f"{path}.{own}"
            if module == owner and named(self.config.target_parameters or [], former):
                found[name] = rank_and_alpha(self.config, former)
        return found

    def _joined(self, name: str, pieces: list[Piece], shapes: Mapping[str, tuple[int, ...]]) -> Joined:
        owner, _, own = name.rpartition(".")
        stack = kind_of_parameter(self.structure.modules[owner], own).stack
        assert stack is not None
        pieces.sort(key=lambda piece: (piece.place.part, piece.place.matrix or 0))
        one = Joined(tuple(pieces), stack, self.config.use_rslora)
        problems = one.problems(shapes, dora=self.config.use_dora)
        if stack.transposed or stack.out_features % one.parts:
            problems = [f"{name} keeps its matrices in another form than transformers says"]
        if problems:
            raise AdapterFileError(
                bullet_list(f"{self.source} does not fit {self.structure.model_name}:", shortened(problems))
            )
        return one

    def _moved_modules(self) -> dict[str, str]:
        """{former path: path now} of every module above a tensor whose place is known."""
        moved: dict[str, str] = {}
        for key, place in self.places.items():
            former, now = probed(key).split("."), place.name.split(".")
            while former and now and former[-1] == now[-1]:
                former, now = former[:-1], now[:-1]
                moved[".".join(former)] = ".".join(now)
        return moved

    def _token_indices(self, moved: Mapping[str, str]) -> list[int] | dict[str, list[int]] | None:
        given = self.config.trainable_token_indices
        if not isinstance(given, dict):
            return given
        return {renamed_modules(self.structure, [name], moved)[0]: tokens for name, tokens in given.items()}

    def _move_names(self) -> None:
        """The tensors of which only the name is another."""
        for key, place in self.places.items():
            if place.is_whole:
                added = split(key)[1]
                new = f"{keys.PREFIX}{place.name.removesuffix('.weight')}{added}" if added else keys.PREFIX + place.name
                self._add(new, self.plain[key].shape, key, itemgetter(key))

    def _join(self, joined: Mapping[str, Joined], config: LoraConfig, parameters: list[str]) -> None:
        """The tensors of adapters that several become."""
        paths = {s.name: s.file_path or s.path for s in parameter_sites(self.structure, config, parameters)}
        for name, one in joined.items():
            path = paths.get(name.removesuffix(".weight"), paths.get(name, name.removesuffix(".weight")))
            E, O, I = one.stack.matrices, one.stack.out_features, one.stack.in_features  # noqa: E741
            shapes: dict[str, tuple[int, ...]] = {FACTOR_A: (E * one.rank, I), FACTOR_B: (O, one.rank * E)}
            if self.config.use_dora:
                shapes[MAGNITUDE] = (E * O,)
            made = _once(one)
            for suffix, shape in shapes.items():
                first = one.pieces[0].path + FACTOR_A
                self._add(f"{keys.PREFIX}{path}{suffix}", shape, first, partial(_part, made, suffix))

    def _gather_whole(self) -> None:
        """The weights of modules trained in full that lie in one parameter now."""
        gathered: dict[str, dict[str, Place]] = {}
        for key, place in self.places.items():
            if not place.is_whole and not split(key)[1]:
                gathered.setdefault(place.name, {})[key] = place
        for name, sources in gathered.items():
            shape = tuple(self.model.get_parameter(name).shape)
            if lacking(list(sources.values()), shape):
                raise AdapterFileError(f"{self.source} has only some of the weights that lie in {name} now.")
            self._add(keys.PREFIX + name, shape, _first(sources), partial(_gathered, sources))

    def _add(self, new: str, shape: tuple[int, ...], like: str, recipe: _Recipe) -> None:
        if new in self.tensors:
            raise AdapterFileError(f"{self.source}: two tensors would both be {new} now; one of them is {like}.")
        info = self.plain[like]
        self.tensors[new] = TensorInfo(info.dtype, shape, info.nbytes, info.start)
        self.recipes[new] = recipe


def _once(joined: Joined) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """The factors of a joined adapter, computed for the first of its tensors and kept for the others."""
    kept: dict[str, Tensor] = {}

    def factors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not kept:
            kept.update(joined.factors(tensors))
        return kept

    return factors


def _part(made: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], suffix: str, tensors: Mapping) -> Tensor:
    return made(tensors)[suffix]


def _gathered(sources: Mapping[str, Place], tensors: Mapping[str, Tensor]) -> Tensor:
    return whole_weight({(place.matrix, place.part): tensors[key] for key, place in sources.items()})


def _first(names: Iterable[str]) -> str:
    return next(iter(names))
