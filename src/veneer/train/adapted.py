"""A model together with its adapter, found from the adapter's folder."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from veneer.errors import RunError, bullet_list
from veneer.storage.adapter_file import CONFIG_FILE, read_config
from veneer.storage.hub import adapter_folder
from veneer.train.folders import refuse_run_folder
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

    refuse_run_folder(adapter)
    folder = adapter_folder(adapter)
    config = read_config(folder)
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise RunError(f"{folder / CONFIG_FILE} does not name the model it belongs to. Name it on the command line.")
    own_tokenizer = (folder / "tokenizer_config.json").is_file()
    try:
        tokenizer = load_tokenizer(str(folder) if own_tokenizer else name)
        model = load_model(name, revision=None if base else config.get("revision"), dtype=dtype)
    except RunError as error:
        if base or Path(name).is_dir():
            raise
        raise RunError(_base_is_gone(adapter, folder, name, error)) from error
    return Adapted(PeftModel.from_pretrained(model, str(folder)), tokenizer, name)


def _base_is_gone(adapter: str, folder: Path, name: str, error: RunError) -> str:
    ways = [
        f"veneer merge {quote(adapter)} --into FOLDER --base MODEL",
        f"veneer chat MODEL --adapter {quote(adapter)}",
    ]
    reason = str(error).partition("\n")[0]
    headline = f"{folder / CONFIG_FILE} names the model {name}, which is not here. ({reason}) Say where it is:"
    return bullet_list(headline, ways)


def is_adapter(location: str) -> bool:
    """Whether a local folder holds an adapter."""
    return Path(location, CONFIG_FILE).is_file()
