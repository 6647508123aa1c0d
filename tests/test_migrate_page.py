"""docs/migrate.md: its blocks are Python that runs, and each of its rows says what Veneer says, and how to mean it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tiny import llama
from veneer import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from veneer.storage.adapter_file import CONFIG_FILE, WEIGHTS_FILE

PAGE = (Path(__file__).parent.parent / "docs" / "migrate.md").read_text(encoding="utf-8")
STRICTER = PAGE.split("## What is stricter", 1)[1].split("\n## ", 1)[0]
ROWS = {
    wrote: re.findall(r"`([^`]+)`", says)[0]
    for wrote, says, _ in re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|$", STRICTER, flags=re.MULTILINE)[1:]
    if not wrote.startswith("-")
}
TARGETS = ["q_proj", "v_proj"]


def made(**settings: Any) -> PeftModel:
    return get_peft_model(llama(), LoraConfig(**{"target_modules": TARGETS, **settings}))


def two() -> PeftModel:
    model = made()
    model.add_adapter("other", LoraConfig(target_modules=TARGETS))
    return model


def saved(folder: Path) -> Path:
    made().save_pretrained(folder)
    return folder


def edited(folder: Path) -> Path:
    file = saved(folder) / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "lora_alpha": 32}), encoding="utf-8")
    return folder


def pickled(folder: Path) -> Path:
    torch.save(get_peft_model_state_dict(made()), saved(folder) / "adapter_model.bin")
    (folder / WEIGHTS_FILE).unlink()
    return folder


def some(model: PeftModel) -> dict[str, torch.Tensor]:
    return dict(list(get_peft_model_state_dict(model).items())[:3])


def loaded(folder: Path, *, layers: int = 2, config: LoraConfig | None = None) -> PeftModel:
    return PeftModel.from_pretrained(llama(layers=layers), folder, config=config)


def merged() -> PeftModel:
    model = made()
    model.merge_adapter()
    return model


def first_layers(folder: Path) -> LoraConfig:
    return LoraConfig.from_pretrained(saved(folder)).changed(layers_to_transform=[0, 1])


# Row -> (what was written, what to write if that was meant); both get a folder of their own.
CASES: dict[str, tuple[Any, Any]] = {
    '`target_modules=["q_proj", "v_prjo"]`': (
        lambda _: made(target_modules=["q_proj", "v_prjo"]),
        lambda _: made(target_modules=r".*\.(q_proj|v_prjo)"),
    ),
    '`exclude_modules=["nope"]`': (lambda _: made(exclude_modules=["nope"]), lambda _: made()),
    "`layers_to_transform=[0, 99]`": (
        lambda _: made(layers_to_transform=[0, 99]),
        lambda _: made(layers_to_transform=[0]),
    ),
    '`rank_pattern={"k_proj": 4}` without such a target': (
        lambda _: made(rank_pattern={"k_proj": 4}),
        lambda _: made(rank_pattern={"k_proj": 4}, target_modules=[*TARGETS, "k_proj"]),
    ),
    '`modules_to_save=["head"]`, meaning `lm_head`': (
        lambda _: made(modules_to_save=["head"]),
        lambda _: made(modules_to_save=["lm_head"]),
    ),
    "`lora_alpha=0`": (lambda _: made(lora_alpha=0), lambda _: made().set_scale("default", 0.0)),
    "`lora_dropout=1.0`": (lambda _: made(lora_dropout=1.0), lambda _: made().set_requires_grad("default", False)),
    '`use_rslora="false"`': (lambda _: made(use_rslora="false"), lambda _: made(use_rslora=False)),
    "`fan_in_fan_out=True` over `nn.Linear`": (lambda _: made(fan_in_fan_out=True), lambda _: made()),
    "`loftq_config={…}` alone": (
        lambda _: made(loftq_config={"loftq_bits": 4}),
        lambda _: made(loftq_config={"loftq_bits": 4}, init_lora_weights="loftq"),
    ),
    "`get_peft_model` on a model with adapters": (
        lambda _: get_peft_model(made(), LoraConfig()),
        lambda _: made().add_adapter("other", LoraConfig()),
    ),
    '`model.peft_config["default"].lora_alpha = 32`': (
        lambda _: setattr(made().peft_config["default"], "lora_alpha", 32),
        lambda _: made().set_scale("default", 4.0),
    ),
    "a folder whose `adapter_config.json` was edited": (
        lambda folder: loaded(edited(folder)),
        lambda folder: loaded(saved(folder)).set_scale("default", 4.0),
    ),
    "`set_peft_model_state_dict(model, part_of_it)`": (
        lambda _: set_peft_model_state_dict(made(), some(made())),
        lambda _: set_peft_model_state_dict(made(), some(made()), strict=False),
    ),
    "an adapter of two layers over a model of three": (
        lambda folder: loaded(saved(folder), layers=3),
        lambda folder: loaded(folder, layers=3, config=first_layers(folder)),
    ),
    "a folder with `adapter_model.bin`": (lambda folder: loaded(pickled(folder)), lambda folder: loaded(saved(folder))),
    "`load_adapter(folder, taken_name)` with other settings": (
        lambda folder: made(r=4).load_adapter(saved(folder), "default"),
        lambda folder: made().load_adapter(saved(folder), "default"),
    ),
    "`save_pretrained(folder, safe_serialization=False)`": (
        lambda folder: made().save_pretrained(folder, safe_serialization=False),
        lambda folder: made().save_pretrained(folder),
    ),
    "`save_pretrained(folder, save_embedding_layers=True)`": (
        lambda folder: made().save_pretrained(folder, save_embedding_layers=True),
        lambda folder: made(modules_to_save=["embed_tokens"]).save_pretrained(folder),
    ),
    '`merge_and_unload(adapter_names=["typo"])`': (
        lambda _: made().merge_and_unload(adapter_names=["typo"]),
        lambda _: made().merge_and_unload(adapter_names=["default"]),
    ),
    '`add_weighted_adapter(["a", "b"], [1.0], "c")`': (
        lambda _: two().add_weighted_adapter(["default", "other"], [1.0], "c"),
        lambda _: two().add_weighted_adapter(["default", "other"], [1.0, 1.0], "c"),
    ),
    '`add_adapter("a/b", config)`': (
        lambda _: made().add_adapter("a/b", LoraConfig()),
        lambda _: made().add_adapter("a-b", LoraConfig()),
    ),
    "`merge_adapter()` twice": (lambda _: merged().merge_adapter(), lambda _: merged()),
    '`target_parameters=["q_proj.weight"]`, a layer\'s weight': (
        lambda _: made(target_modules=[], target_parameters=["q_proj.weight"]),
        lambda _: made(target_modules=["q_proj"]),
    ),
    '`add_weighted_adapter(…, "svd", density=0.5)`': (
        lambda _: two().add_weighted_adapter(["default", "other"], [1.0, 1.0], "c", "svd", density=0.5),
        lambda _: two().add_weighted_adapter(["default", "other"], [1.0, 1.0], "c", "magnitude_prune_svd", density=0.5),
    ),
    "`delete_adapter` of a merged adapter": (
        lambda _: merged().delete_adapter("default"),
        lambda _: [(model := merged()).unmerge_adapter(), model.delete_adapter("default")],
    ),
}


def test_the_page_and_the_cases_have_the_same_rows():
    assert set(ROWS) == set(CASES)


@pytest.mark.filterwarnings("ignore::veneer.errors.VeneerWarning")
@pytest.mark.parametrize("row", CASES)
def test_a_row_says_what_veneer_says(row, tmp_path):
    wrote, meant = CASES[row]
    with pytest.raises(veneer.errors.VeneerError, match=re.escape(ROWS[row])):
        wrote(tmp_path / "wrote")
    meant(tmp_path / "meant")


def test_the_names_in_memory_are_those_of_the_page():
    model = made(modules_to_save=["lm_head"])
    names = [name for name, _ in model.named_parameters()]
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    assert {f"{layer}.weight", f"{layer}.adapters.default.lora_A", "base_model.model.lm_head.weight"} <= set(names)
    assert "base_model.model.lm_head.modules_to_save.default.weight" in names


def test_the_layers_answer_as_the_page_says():
    block = next(b for b in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL) if "base_layer" in b)
    names: dict[str, Any] = {"veneer": veneer, "base": llama()}
    exec(compile(block, "docs/migrate.md", "exec"), names)
    layer, model = names["layer"], names["model"]
    assert layer.lora_A["default"].weight is layer.adapters["default"].lora_A
    assert layer.base_layer.weight is layer.weight
    layer.enable_adapters(False)
    others = [one for name, one in model.named_modules() if name.endswith("q_proj")]
    assert all(one.disable_adapters for one in others)
