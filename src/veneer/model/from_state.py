"""Lay an adapter over a model from values in memory, as `model/files.py` does from a folder."""

from collections.abc import Mapping

from torch import Tensor, nn

from veneer.config import LoraConfig
from veneer.errors import ConfigError
from veneer.layers.replication import replicated
from veneer.model.apply import carry_out, one_at_a_time
from veneer.model.make import saved_dtypes
from veneer.model.plan import plan
from veneer.model.renamed.state import adapter_of_today
from veneer.model.start import check_start_can_be_redone, takes_off_its_start
from veneer.model.state_dict import checked_values, with_prefix
from veneer.model.tensors import check_range


@one_at_a_time
def load_adapter_state(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    state: Mapping[str, Tensor],
    *,
    trainable: bool = False,
    float32: bool = True,
) -> None:
    """Attach an adapter given by its config and its values, by their names in an adapter file.

    The names may lack `base_model.model.`. Raises what loading a folder raises, and then nothing has changed.
    """
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"The config of an adapter must be a LoraConfig, not {type(config).__name__}.")
    config = config.changed(inference_mode=not trainable)
    if takes_off_its_start(config):
        check_start_can_be_redone(config, f"Adapter {name!r} cannot be loaded")
    config, state = adapter_of_today(model, config, with_prefix(state))
    todo = plan(model, name, config, strict=False)
    with replicated(model, todo.config.layer_replication):
        tensors = checked_values(model, todo.resolution, state, "the config given with it")
        check_range("The state dict", tensors, saved_dtypes(model, todo.resolution, tensors, float32=float32))
    tensors = {key: value.clone() for key, value in tensors.items()}  # the adapter's own, whatever becomes of `state`
    carry_out(model, todo, tensors=tensors, float32=float32)
