"""EVA on a whole model: the principal components of each layer's inputs. Shapes: I in, N rows, R rank.

Paischer et al. 2024, https://arxiv.org/abs/2410.07170.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from veneer.config import EvaConfig, LoraConfig
from veneer.errors import AdapterNameError, ConfigError, bullet_list
from veneer.init import Components
from veneer.init.rank_spread import EvaComponents, fingerprint, shared_inputs
from veneer.model.facade import PeftModel
from veneer.model.measure.eva_inputs import (
    PrepareLayer,
    by_layer,
    forward_fn_dict,
    gathered,
    on_device,
    only_device,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from veneer.model.measure.eva_start import start_from
from veneer.model.measure.observe import bare_model, base_alone, refuse_experts, sees_rows, watching
from veneer.model.measure.progress import progress
from veneer.model.overlay import DEFAULT, overlay_of
from veneer.storage.keys import PREFIX
from veneer.targets import Site, resolve

MAX_BATCHES = 1000
PrepareModel = Callable[[Any, LoraConfig], Any]


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[Any, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: PrepareModel | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: (
        PrepareLayer | Mapping[str, PrepareLayer] | None
    ) = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = DEFAULT,
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    *,
    max_batches: int = MAX_BATCHES,
) -> None:
    """Give an adapter made with init_lora_weights="eva" its start: new ranks, A from the data, B zero.

    Call it after `get_peft_model` and before the optimizer is made, as ranks change, and a layer that gets no rank
    loses its adapter. The config in use says the new ranks. Either `dataloader` or `eva_state_dict` is needed:

    eva_state_dict  what `get_eva_state_dict` found, over the model with or without adapters, or what PEFT's did

    The other arguments are those of `get_eva_state_dict`.
    Raises AdapterNameError, ConfigError or MergeError, and then nothing has changed.
    """
    bare = bare_model(model)
    config = _config_in_use(bare, adapter_name)
    if config.init_lora_weights != "eva":
        raise ConfigError(
            f"Adapter {adapter_name!r} was made with init_lora_weights={config.init_lora_weights!r}: EVA initialises "
            "those made with 'eva'."
        )
    if (dataloader is None) == (eva_state_dict is None):
        raise ConfigError("initialize_lora_eva_weights needs a dataloader or an eva_state_dict: give one of them.")
    if eva_state_dict is None:
        assert dataloader is not None
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
            max_batches=max_batches,
        )
    start_from(bare, adapter_name, {name.removeprefix(PREFIX): A for name, A in eva_state_dict.items()})


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[Any, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: PrepareModel | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: (
        PrepareLayer | Mapping[str, PrepareLayer] | None
    ) = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = DEFAULT,
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    *,
    max_batches: int = MAX_BATCHES,
) -> dict[str, Tensor]:
    """{layer: A of shape (R, I) with its new rank R}; R may be 0. Names and values are as PEFT's.

    model           a model without adapters and `peft_config`, or one with an adapter `adapter_name`; it runs as the
                    base, in evaluation mode
    dataloader      batches, anything that can be gone through again; it is, until all components have settled
    forward_fn      (model, batch) runs the model
    prepare_model_inputs_fn  (batch, config) -> what prepare_layer_inputs_fn is given; None: the batch itself
    prepare_layer_inputs_fn  (layer's inputs, that, layer's name) -> the rows (N, I) to look at, or a mapping of such
                    functions by layer; None, or a layer not named: all rows. By default the tokens that are attended to
                    and have a label
    gather_distributed_inputs  in a distributed run, look at the rows of all processes; False if each sees all the data
    max_batches     how many batches to try

    Raises ConfigError if components have not settled by then, if some layer is never reached, or if the data do not
    fit; the model is as it was in any case.
    """
    bare = bare_model(model)
    sites, config = _sites(bare, peft_config, adapter_name)
    prefix = PREFIX if isinstance(model, PeftModel) else ""
    names = {f"{prefix}{site.path}": site for site in sites}
    watch = _Watch(
        names,
        config,
        by_layer(prepare_layer_inputs_fn, list(names)),
        gather=gather_distributed_inputs and dist.is_available() and dist.is_initialized(),
    )
    if max_batches < 1:
        raise ConfigError(f"max_batches={max_batches}: at least one batch is needed.")
    device = only_device(bare)
    passes = _Passes(dataloader)
    batches = (on_device(batch, device) for batch in passes)

    def run(batch: Any, paths: Iterable[str]) -> None:
        watch.batch = batch if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, config)
        with watching(bare, paths, watch):
            forward_fn(model, batch)

    with base_alone(model, training=False), progress(show_progress_bar, "EVA: layers settled") as advance:
        first = next(batches)
        run(first, [site.path for site in sites])
        found = watch.begin()
        total = len(found.waiting())
        for count, batch in enumerate(chain([first], batches)):
            waiting = found.waiting()
            advance(done=total - len(waiting), total=total)
            if not waiting or count >= max_batches:
                break
            if passes.done:
                watch.check_all_reached()
            run(batch, [names[name].path for name in waiting])
            found.end_of_batch()
    whiten = EvaConfig.of(config.eva_config).whiten
    return {name: _factor(name, part, whiten).to(device).contiguous() for name, part in found.result().items()}


def _factor(name: str, part: Components, whiten: bool) -> Tensor:
    """A of shape (R, I), in memory of its own: a part of all components would keep them alive."""
    A_RI = part.vectors.clone()
    if not whiten:
        return A_RI
    assert part.singular_values is not None
    if not (part.singular_values > 0).all():
        raise ConfigError(f"{name}: EVA cannot whiten, some component has no variance. Lower r, or use whiten=False.")
    return A_RI / part.singular_values.sqrt()[:, None]


def _config_in_use(model: nn.Module, name: str) -> LoraConfig:
    overlay = overlay_of(model)
    if overlay is None:
        raise AdapterNameError("The model has no adapter: make one with get_peft_model first, and then give it data.")
    overlay.check_names([name])
    return overlay.configs[name]


def _sites(model: nn.Module, config: LoraConfig | None, name: str) -> tuple[list[Site], LoraConfig]:
    """The layers that EVA looks at, and the config with its settings."""
    overlay = overlay_of(model)
    if config is None:
        if overlay is None:
            raise ConfigError("get_eva_state_dict needs peft_config for a model without adapters.")
        config = _config_in_use(model, name)
        sites = overlay.resolutions[name].sites
    else:
        if not isinstance(config, LoraConfig):
            raise ConfigError(f"peft_config must be a LoraConfig, not {type(config).__name__}.")
        sites = resolve(model, config).sites
    refuse_experts(config, "EVA")
    seen = [site for site in sites if sees_rows(site)]
    if not seen:
        raise ConfigError("EVA looks at the inputs of linear layers, and the config adapts none.")
    return seen, config


class _Passes:
    """The batches of a data loader again and again; `done` counts how often all were given."""

    def __init__(self, dataloader: Iterable[Any]) -> None:
        self._dataloader = dataloader
        self.done = 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            count = 0
            for batch in self._dataloader:
                count += 1
                yield batch
            if not count and self.done:
                raise ConfigError(
                    "EVA's components are not settled, and the data can be gone through only once: give a list of "
                    "batches or a DataLoader, not a generator."
                )
            if not count:
                raise ConfigError("The dataloader is empty.")
            self.done += 1


class _Watch:
    """What is done with the inputs of layers: first find those that are equal, then gather components.

    batch  what `prepare_model_inputs_fn` made of the batch that runs
    """

    def __init__(
        self, names: Mapping[str, Site], config: LoraConfig, prepare: Mapping[str, PrepareLayer], *, gather: bool
    ) -> None:
        self.batch: Any = None
        self._names = {site.path: name for name, site in names.items()}
        self._sites = names
        self._settings = EvaConfig.of(config.eva_config)
        self._prepare = prepare
        self._gather = gather
        self._marks: dict[str, Hashable] = {}
        self._rows = dict.fromkeys(names, 0)
        self._found: EvaComponents | None = None

    def __call__(self, path: str, inputs: tuple[Any, ...]) -> None:
        """Take in the inputs of one call of a layer."""
        name = self._names[path]
        X_NI = self._prepare[name](inputs, self.batch, name)
        features = self._sites[name].shape[1]
        if not isinstance(X_NI, Tensor) or X_NI.dim() != 2 or X_NI.shape[1] != features:
            found = list(X_NI.shape) if isinstance(X_NI, Tensor) else type(X_NI).__name__
            raise ConfigError(f"{name}: prepare_layer_inputs_fn must give rows of {features} features, not {found}.")
        if self._gather:
            X_NI = gathered(X_NI)
        self._rows[name] = max(self._rows[name], len(X_NI))
        if self._found is not None:
            self._found.update(name, X_NI)
        elif len(X_NI):  # nothing is equal to nothing
            self._marks.setdefault(name, fingerprint(X_NI))

    def begin(self) -> EvaComponents:
        """From now on gather components, of layers with equal inputs only once."""
        self._found = EvaComponents(
            {name: site.rank for name, site in self._sites.items()},
            {name: site.shape[1] for name, site in self._sites.items()},
            settings=self._settings,
            same_input=shared_inputs(self._marks),
        )
        return self._found

    def check_all_reached(self) -> None:
        """Once all data were seen: raise ConfigError if more of the same will not do."""
        assert self._found is not None
        problems = [
            f"{name}: at most {self._rows[name]} rows in a batch, {needed} components to find"
            if self._rows[name]
            else f"{name}: not reached, or without a token that counts"
            for name, needed in self._found.unmeasured().items()
        ]
        if problems:
            raise ConfigError(
                bullet_list(
                    "EVA saw all the data, and has nothing to go by for some layers. Give larger batches, lower r or "
                    "rho, or leave the layers out:",
                    problems[:6],
                )
            )
