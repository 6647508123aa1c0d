"""What a transformers model has to be told, so that its own saving stays right. Plain torch models are left alone."""

from typing import Any

from torch import nn

from veneer.config import LoraConfig
from veneer.errors import check_kind
from veneer.layers.attach import Adapters
from veneer.layers.kinds import Layer
from veneer.layers.replication import original_layers
from veneer.layers.saved_module import Copies
from veneer.layers.token_rows import RowsByAdapter
from veneer.layers.weights import is_offloaded, read
from veneer.model.merge import base_in_place

SAVE = "save_pretrained"
_LEAVE_OUT = "_keys_to_ignore_on_save"


class SaveBase:
    """A model's own `save_pretrained` while adapters lie over it: it writes the base, as if there were none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save with the base weights and biases in place and without the adapters' tensors."""
        with base_in_place(self.model), original_layers(self.model):
            theirs = getattr(self.model, _LEAVE_OUT)
            ours = {
                f"{path}.{name}"
                for path, module in self.model.named_modules()
                if isinstance(module, Adapters | Copies | RowsByAdapter)
                for name in module.state_dict()
            }
            setattr(self.model, _LEAVE_OUT, {*(theirs or ()), *ours})
            try:
                return getattr(type(self.model), SAVE)(self.model, *args, **kwargs)
            finally:
                setattr(self.model, _LEAVE_OUT, theirs)


def guard_saving(model: nn.Module) -> None:
    """Let the model's own `save_pretrained` write the base checkpoint, untouched by adapters."""
    if hasattr(type(model), SAVE) and hasattr(type(model), _LEAVE_OUT):
        vars(model)[SAVE] = SaveBase(model)


def release_saving(model: nn.Module) -> None:
    """Undo `guard_saving`."""
    if is_guarded(model):
        del vars(model)[SAVE]


def is_guarded(model: nn.Module) -> bool:
    """Whether the model's own `save_pretrained` writes the base, as `guard_saving` has it."""
    return isinstance(vars(model).get(SAVE), SaveBase)


def note_untied_head(model: Layer) -> None:
    """Tell a config that output head and embedding are two weights now, or loading would tie them again."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and embedding is not None and not _one_weight(head, embedding):
        model.config.tie_word_embeddings = False


def _one_weight(head: Layer, embedding: Layer) -> bool:
    """Whether two modules share a weight; each has a parameter of its own if the model is, or was, offloaded."""
    if head.weight is embedding.weight:
        return True
    if not (is_offloaded(head) or is_offloaded(embedding)):
        return head.weight.data_ptr() == embedding.weight.data_ptr()
    mine, other = read(head), read(embedding)
    return mine.shape == other.shape and mine.equal(other.to(mine))


def with_base_name(config: LoraConfig, model: nn.Module) -> LoraConfig:
    """A copy that names the base model, if the config does not and the model knows."""
    check_kind(model, nn.Module, "A model (a torch.nn.Module)")
    name = vars(model).get("name_or_path") or None
    if not isinstance(config, LoraConfig) or config.base_model_name_or_path is not None or name is None:
        return config
    return config.changed(base_model_name_or_path=name)
