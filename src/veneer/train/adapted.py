"""A model together with its adapter, found from the adapter's folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import RunError
from veneer.storage.adapter_file import CONFIG_FILE, read_config
from veneer.storage.hub import adapter_folder
from veneer.train.load import Dtype, load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Adapted:
    """The PeftModel, its tokenizer, and the name of the model below."""

    model: Any
    tokenizer: "PreTrainedTokenizerBase"
    base: str


def load_adapted(adapter: str, *, base: str | None = None, dtype: Dtype = "auto") -> Adapted:
    """An adapter on its model; the model is the one its config names unless `base` names another.

    The tokenizer is the one saved beside the adapter, if there is one. Raises AdapterFileError and RunError.
    """
    from veneer import PeftModel

    folder = adapter_folder(adapter)
    config = read_config(folder)
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise RunError(f"{folder / CONFIG_FILE} does not name the model it belongs to. Name it on the command line.")
    own_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(folder) if own_tokenizer else name)
    model = load_model(name, revision=None if base else config.get("revision"), dtype=dtype)
    return Adapted(PeftModel.from_pretrained(model, str(folder)), tokenizer, name)


def is_adapter(location: str) -> bool:
    """Whether a local folder holds an adapter."""
    return Path(location, CONFIG_FILE).is_file()
