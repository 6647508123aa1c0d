"""Where a model's adapters go: into a folder, onto the Hugging Face hub, and what a card says of them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from veneer.errors import AdapterNameError, ArgumentError, ConfigError, check_kind
from veneer.layers.route import as_names
from veneer.model.files import save_adapters
from veneer.model.methods import AdapterMethods
from veneer.model.model_card import card_of_model
from veneer.model.overlay import overlay_needed
from veneer.model.push import push_adapters
from veneer.model.sharded import check_whole, is_sharded_model
from veneer.storage.push import check_push_options, less_of_whole_models

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


class SavingMethods(AdapterMethods):
    """The methods of a `PeftModel` that write its adapters out, under PEFT's names."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        convert_mutated_init: bool = True,
        push_to_hub: bool = False,
        **hub: Any,
    ) -> None:
        """Write adapters in PEFT's format: `default` to the folder itself, each other one to a subfolder of its name.

        state_dict            a state dict of this model to take the values from, as gathered from shards
        convert_mutated_init  write adapters that take their start off the base (PiSSA, say) as plain LoRA of twice the
                              rank over the original base; False: as trained, for readers that do the same start again

        push_to_hub           upload the same, too: `repo_id` (the folder's name unless given) and what else
                              `push_to_hub` takes

        A sharded model's values are gathered: all ranks must call it (is_main_process means nothing then), and the
        first one writes.

        A model card, README.md, lies beside the adapter; what you wrote into it stays (`create_or_update_model_card`).
        path_initial_model_for_weight_conversion is there for PEFT's callers; the start is remembered, not read. So are
        `save_function` and `max_shard_size` for those of accelerate and transformers.

        Each folder is replaced in one step. Raises AdapterNameError, AdapterFileError or RankError.
        """
        refuse_pickles(safe_serialization)
        if save_embedding_layers not in ("auto", False):
            raise ConfigError(
                "save_embedding_layers=True would write base weights into the adapter. To train and save embeddings, "
                "name them in modules_to_save; to save the base, call its own save_pretrained."
            )
        names = list(self.peft_config) if selected_adapters is None else as_names(selected_adapters)
        check_kind(save_directory, (str, os.PathLike), "The folder to save to (save_directory)")
        if selected_adapters is not None and not names:
            raise AdapterNameError("There is nothing to save: no adapter is selected.")
        if not is_main_process and (state_dict is not None or not is_sharded_model(self.bare)):
            return
        overlay_needed(self.bare).check_names(names)
        hub = less_of_whole_models(hub)
        if hub and not push_to_hub:
            raise ArgumentError(f"save_pretrained takes {', '.join(sorted(hub))} only with push_to_hub=True.")
        check_push_options(hub)
        how = {"state": state_dict, "plain": convert_mutated_init}
        save_adapters(self.bare, names, Path(save_directory), **how)
        if push_to_hub:
            self._push(hub.pop("repo_id", None) or Path(save_directory).name, names, hub, **how)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        max_shard_size: int | str | None = None,
        tags: Sequence[str] | None = None,
    ) -> "CommitInfo":
        """Upload every adapter, as `save_pretrained` writes it, with a model card, in one commit.

        repo_id    `user/name`, made if there is none; a name alone means your own account
        private    make a new repository private; nothing changes about one that is there
        token      of an account that may write there; unless given, that of `hf auth login` or HF_TOKEN
        revision   a branch, made if there is none
        create_pr  propose the files to the owner of the repository
        tags       put into the card's metadata besides those that are always there

        max_shard_size is there for transformers' callers. What you wrote into the repository's README.md stays.
        Raises AdapterFileError that says what to do, and then the repository is as it was.
        """
        refuse_pickles(safe_serialization)
        options = {
            "commit_message": commit_message,
            "commit_description": commit_description,
            "private": private,
            "token": token,
            "revision": revision,
            "create_pr": create_pr,
            "tags": tags,
        }
        return self._push(repo_id, list(self.peft_config), options)

    def _push(self, repo_id: str, names: list[str], options: Mapping[str, Any], **how: Any) -> "CommitInfo":
        if not names:
            raise AdapterNameError("There is nothing to push: the model has no adapter.")
        if how.get("state") is None:
            check_whole(
                self.bare, "Nothing was pushed", "Call save_pretrained on all ranks, and push from one process."
            )

        def save(folder: Path, card: Mapping[str, Any]) -> None:
            save_adapters(self.bare, names, folder, card=card, **how)

        return push_adapters(save, repo_id, [self.peft_config[name] for name in names], **options)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write README.md into a folder, or renew the sections of it that Veneer wrote.

        It says what the adapter is and how to load it, from the adapter's files if they lie in the folder, else from
        the model. A README.md that somebody else wrote keeps its text; its metadata gets what the hub needs.
        Raises AdapterNameError without an adapter.
        """
        overlay_needed(self.bare)
        card_of_model(self.bare, next(iter(self.peft_config)), Path(output_dir))


def refuse_pickles(safe_serialization: bool) -> None:
    """Raise ConfigError for safe_serialization=False."""
    if not safe_serialization:
        raise ConfigError("safe_serialization=False would write a pickle; adapters are written as safetensors.")
