"""What a transformers model has to be told, so that its own saving stays right. Plain torch models are left alone."""

from torch import nn

from veneer.layers.attach import Adapters
from veneer.layers.kinds import Layer
from veneer.layers.saved_module import Copies
from veneer.model.overlay import Overlay

_LIST = "_keys_to_ignore_on_save"


def keep_checkpoint_clean(model: nn.Module, overlay: Overlay) -> None:
    """Keep adapter tensors out of what the model's own `save_pretrained` writes: the base checkpoint."""
    if not hasattr(type(model), _LIST):
        return
    ours = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, Adapters | Copies)
        for name, _ in module.named_parameters()
    }
    theirs = set(getattr(model, _LIST) or ()) - overlay.unsaved
    overlay.unsaved = ours
    setattr(model, _LIST, theirs | ours)


def note_untied_head(model: Layer) -> None:
    """Tell a config that output head and embedding are two weights now, or loading would tie them again."""
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and embedding is not None and head.weight is not embedding.weight:
        config.tie_word_embeddings = False
