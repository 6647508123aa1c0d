"""How to load an adapter with each library that reads it, as Markdown; and which cannot, said beforehand."""

from collections.abc import Mapping
from typing import Any

from veneer.config.init_names import SUBTRACTING, known_init, split_name
from veneer.model.contents import Contents

# The ranks that `vllm serve --max-lora-rank` takes.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_CLASSES = {
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
}
_BESIDE_LORA = ("classifier", "score")  # the only modules that vLLM reads beside adapters


def how_to_load(
    config: Mapping[str, Any], contents: Contents, base: str, location: str | None, subfolder: str = ""
) -> str:
    """The section that says how to load an adapter. `location` is its hub id or folder, if known."""
    where = location or "path/to/this/adapter"
    parts = ["## How to load it", _by_peft(config, where, subfolder, base)]
    if config.get("task_type") in _CLASSES:
        parts.append(_by_transformers(config, where, subfolder))
    if config.get("task_type") == "CAUSAL_LM":
        parts.append(_by_vllm(config, contents, where, base, subfolder))
        parts.append(
            "As a plain model that needs no adapter any more: "
            f"`veneer merge {where}{f'/{subfolder}' if subfolder else ''} --into merged`."
        )
    return "\n\n".join(parts)


def refused_by_vllm(config: Mapping[str, Any], contents: Contents) -> list[str]:
    """What of an adapter vLLM 0.33 does not read."""
    saved = [name for name in config.get("modules_to_save") or [] if name not in _BESIDE_LORA]
    found = {
        "DoRA": config.get("use_dora"),
        "trained biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
        "modules trained in full": saved,
        "trained tokens": config.get("trainable_token_indices"),
        "adapters on parameters": config.get("target_parameters"),
        "activated LoRA": config.get("alora_invocation_tokens"),
        "replicated layers": config.get("layer_replication"),
        "a start that changes the base": _changes_the_base(config.get("init_lora_weights")),
        f"a rank above {VLLM_RANKS[-1]}": _highest_rank(config, contents) > VLLM_RANKS[-1],
    }
    return [what for what, there in found.items() if there]


def _changes_the_base(start: Any) -> bool:
    return isinstance(start, str) and known_init(start) and split_name(start)[0] in (*SUBTRACTING, "loftq")


def _by_peft(config: Mapping[str, Any], where: str, subfolder: str, base: str) -> str:
    inside = f", subfolder={subfolder!r}" if subfolder else ""
    kind = _CLASSES.get(str(config.get("task_type")))
    if kind:
        name = f"AutoPeftModelFor{kind}"
        lines = [f"from veneer import {name}  # or: from peft import {name}", ""]
        lines += [f'model = {name}.from_pretrained("{where}"{inside})']
    else:
        lines = ["from veneer import PeftModel  # or: from peft import PeftModel", ""]
        lines += [f"base = ...  # {base}", f'model = PeftModel.from_pretrained(base, "{where}"{inside})']
    return f"With Veneer or PEFT:\n\n{_code('python', lines)}"


def _by_transformers(config: Mapping[str, Any], where: str, subfolder: str) -> str:
    name = f"AutoModelFor{_CLASSES[str(config['task_type'])]}"
    inside = f', adapter_kwargs={{"subfolder": "{subfolder}"}}' if subfolder else ""
    lines = [f"from transformers import {name}", "", f'model = {name}.from_pretrained("{where}"{inside})']
    return f"With transformers, where PEFT is installed:\n\n{_code('python', lines)}"


def _by_vllm(config: Mapping[str, Any], contents: Contents, where: str, base: str, subfolder: str) -> str:
    if refused := refused_by_vllm(config, contents):
        return f"vLLM does not read this adapter ({', '.join(refused)}): merge it into its base first."
    rank = next(rank for rank in VLLM_RANKS if rank >= _highest_rank(config, contents))
    place = f"{where}/{subfolder}" if subfolder else where
    lines = [f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter={place}"]
    note = " (the folder has to be downloaded first)" if subfolder else ""
    return f"With vLLM{note}:\n\n{_code('bash', lines)}"


def _highest_rank(config: Mapping[str, Any], contents: Contents) -> int:
    rank = config.get("r")
    return max([rank if isinstance(rank, int) else 1, *(r for group in contents.groups.values() for r in group.ranks)])


def _code(language: str, lines: list[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
