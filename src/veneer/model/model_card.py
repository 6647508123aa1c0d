"""The model card of an adapter that is on a model, whether or not its files lie where the card goes."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from veneer.model.card import base_of, write_card
from veneer.model.files import save_adapter
from veneer.storage.adapter_file import CONFIG_FILE, WEIGHTS_FILE


def card_of_model(model: nn.Module, name: str, folder: Path, *, said: Mapping[str, str] | None = None) -> None:
    """Write or renew README.md in a folder: from the adapter's files there if there are any, else from the model.

    said  more sections by name (`write_card`)
    """
    base = base_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    if all((folder / file).is_file() for file in (CONFIG_FILE, WEIGHTS_FILE)):
        write_card(folder, base=base, said=said)
        return
    with tempfile.TemporaryDirectory() as place:
        save_adapter(model, name, Path(place), card=None)
        write_card(Path(place), before=folder, base=base, into=folder, said=said)
