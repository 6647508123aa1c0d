import dataclasses
from pathlib import Path

import pytest
import yaml

from veneer.config import LoraConfig
from veneer.errors import RunError
from veneer.train.run_file import load, parse
from veneer.train.settings import SECTIONS, RunConfig
from veneer.train.template import TEMPLATE

SMALL = "model: m\ndata: {train: rows.jsonl}\noutput: out\n"


def problems(text: str, *overrides: str) -> str:
    with pytest.raises(RunError) as caught:
        parse(text, overrides)
    return str(caught.value)


def test_the_template_says_the_defaults() -> None:
    said = parse(TEMPLATE)
    bare = RunConfig.model_validate({"model": said.model, "data": {"train": said.data.train}, "output": said.output})
    assert said == bare


def test_the_template_names_every_setting() -> None:
    written = yaml.safe_load(TEMPLATE)
    assert list(written) == [*RunConfig.model_fields]
    for name, section in SECTIONS.items():
        assert list(written[name]) == [*section.model_fields]


def test_every_line_of_the_template_with_a_choice_is_right() -> None:
    for choice in ("linear", "cosine", "constant"):
        assert parse(TEMPLATE, [f"training.schedule={choice}"]).training.schedule == choice
    for choice in ("adamw", "loraplus", "lorafa"):
        assert parse(TEMPLATE, [f"training.optimizer={choice}"]).training.optimizer == choice
    for choice in ("error", "drop", "cut"):
        assert parse(TEMPLATE, [f"data.too_long={choice}"]).data.too_long == choice


def test_lora_fields_are_those_of_lora_config() -> None:
    config = parse(SMALL, ["lora.target_modules=[q_proj, v_proj]", "lora.r=4"]).lora.config()
    assert config.r == 4
    assert config.target_modules == ["q_proj", "v_proj"]
    assert config.task_type == "CAUSAL_LM"


def test_the_section_has_the_fields_that_make_an_adapter() -> None:
    elsewhere = {"task_type", "base_model_name_or_path", "revision", "inference_mode", "runtime_config"}
    of_the_layers = {"fan_in_fan_out"}  # found out when the adapter is made
    with_data = {"eva_config", "corda_config", "lora_ga_config"}
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    assert {*SECTIONS["lora"].model_fields} == known - elsewhere - of_the_layers - with_data


def test_every_initialisation_of_the_template_can_be_chosen() -> None:
    for choice in ("gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "mica", "loftq", "false"):
        assert str(parse(TEMPLATE, [f"lora.init_lora_weights={choice}"]).lora.init_lora_weights).lower() == choice


def test_overrides_win_and_numbers_written_as_text_are_read() -> None:
    settings = parse(SMALL, ["lora.r=32", "training.learning_rate=1e-4", "training.packing=true", "output=other"])
    assert settings.lora.r == 32
    assert settings.training.learning_rate == 1e-4
    assert settings.training.packing is True
    assert settings.output == "other"


def test_yaml_reads_scientific_notation_as_text_and_we_as_a_number() -> None:
    assert parse(SMALL + "training: {learning_rate: 1e-4}").training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SMALL + "training: {learning_rat: 1}", "training.learning_rat: unknown key, did you mean 'learning_rate'?"),
        (SMALL + "ouput: x", "ouput: unknown key, did you mean 'output'?"),
        (SMALL + "learning_rate: 1", "learning_rate: unknown key, did you mean 'training.learning_rate'?"),
        (SMALL + "data2: 1\nzzz: 2", "zzz: unknown key (allowed: model, revision, dtype, quantization, data, lora,"),
        ("data: {train: a}\noutput: o", "model: is required"),
        (SMALL + "training: {epochs: -1}", "training.epochs: should be greater than 0, got -1"),
        (SMALL + "training: {epochs: .nan}", "training.epochs: should be"),
        (SMALL + "training: {batch_size: many}", "training.batch_size: should be a valid integer, got 'many'"),
        (SMALL + "training: {schedule: liner}", "training.schedule: should be 'linear', 'cosine' or 'constant'"),
        (SMALL + "training: 3", "training: must be a section with keys of its own (epochs,"),
        (SMALL + "training: {optimizer: adam}", "training.optimizer: should be 'adamw', 'loraplus' or 'lorafa'"),
        (SMALL + "training: {optim: adamw}", "training.optim: unknown key, did you mean 'optimizer'?"),
        (
            SMALL + "training: {loraplus_lr_ratio: 16}",
            "training: loraplus_lr_ratio has no effect with optimizer=adamw: say optimizer=loraplus",
        ),
        (
            SMALL + "training: {optimizer: lorafa, loraplus_lr_embedding: 1e-5}",
            "training: loraplus_lr_embedding has no effect with optimizer=lorafa",
        ),
        (SMALL + "training: {loraplus_lr_ratio: 0}", "training.loraplus_lr_ratio: should be greater than 0, got 0"),
        (SMALL + "training: {epochs: 2, max_steps: 5}", "training: epochs and max_steps both say how long"),
        (SMALL + "training: {epochs: null}", "training: neither epochs nor max_steps"),
        (SMALL + "training: {eval_every: 5}", "training.eval_every needs rows to evaluate on"),
        (SMALL + "overwrite: true\ntraining: {resume: true}", "overwrite starts anew and training.resume goes on"),
        (SMALL + "lora: {r: 0}", "lora.r"),
        (SMALL + "lora: {init_lora_weights: eva}", "lora: init_lora_weights='eva' starts from something measured"),
        (SMALL + "lora: {lora_dropout: 1.5}", "lora.lora_dropout"),
        (SMALL + "lora: {init_lora_weights: pisa}", "lora.init_lora_weights='pisa': must be True, False"),
        (SMALL + "lora: {loftq_config: {loftq_bits: 4}}", "lora.loftq_config does nothing without init_lora_weights"),
        (SMALL + "lora: {layer_replication: [[2, 1]]}", "lora.layer_replication=[(2, 1)]: must be None or a list of"),
        (
            SMALL + "lora: {trainable_token_indices: {wte: 5}}",
            "lora.trainable_token_indices.wte: should be",
        ),
        (SMALL + "lora: {target_parameters: experts}", "lora.target_parameters: should be a valid list, got 'experts'"),
        (SMALL + "lora: {rank: 8}", "lora.rank: unknown key, did you mean 'r'?"),
        (SMALL + "rank: 8", "rank: unknown key, did you mean 'lora.r'?"),
        (SMALL + "training: {lr: 1e-3}", "training.lr: unknown key, did you mean 'learning_rate'?"),
        (SMALL + "lora: {alpha: 8}", "lora.alpha: unknown key, did you mean 'lora_alpha'?"),
        (SMALL + "training: {steps: 8}", "training.steps: unknown key, did you mean 'max_steps'?"),
        (SMALL + "lora: {batch_size: 8}", "lora.batch_size: unknown key, did you mean 'training.batch_size'?"),
        (SMALL + "lora: {or: 8}", "lora.or: unknown key (allowed: r,"),
        (SMALL + "training: {batch_size: true}", "training.batch_size: should be a number, got true"),
        (SMALL + "training: {learning_rate: yes}", "training.learning_rate: should be a number, got true"),
        (SMALL + "lora: {r: true}", "lora.r: should be a number, got true"),
        (SMALL + "lora: {rank_pattern: {q_proj: x}}", "lora.rank_pattern.q_proj: should be a valid integer, got 'x'"),
        (SMALL + "lora: {target_modules: 5}", "lora.target_modules: should be a valid string or a valid list, got 5"),
        (SMALL + "lora: {target_modules: [a, 5]}", "lora.target_modules.1: should be a valid string, got 5"),
        (SMALL + "training: {warmup: 2.5}", "training: warmup=2.5 is neither a share below 1 nor a whole number"),
        (SMALL + "[a, b]: 1", "not valid YAML (line 4, column 1): a key must be a word"),
        (SMALL + "lora: " + "[" * 3000, "not valid YAML: it is nested too deeply"),
        (SMALL + "revision: 2026-13-45", "not valid YAML: month must be in 1..12"),
        (SMALL + "model: other", "not valid YAML (line 4, column 1): the key 'model' is written twice"),
        ("model: [", "not valid YAML (line"),
        ("just text", "must hold keys such as"),
        ("", "must hold keys such as"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(text: str, said: str) -> None:
    assert said in problems(text)


def test_all_problems_come_at_once() -> None:
    text = problems("data: {trian: x}\noutput: o\nlora: {r: 0}\ntraining: {epochs: 0}", "nonsense")
    assert "6 problems" in text
    for said in ("'nonsense' is not of the form", "model: is required", "did you mean 'train'?", "training.epochs"):
        assert said in text


def test_one_wrong_key_is_one_line() -> None:
    assert "1 problem." in problems(SMALL + "lora: {target_modules: 5}")
    assert "1 problem." in problems(SMALL + "lora: {target_modules: [5, 6]}")
    assert "2 problems." in problems(SMALL + "lora: {rank_pattern: {q_proj: x, v_proj: y}}")


def test_an_empty_section_means_its_defaults() -> None:
    assert parse(SMALL + "training:\nlora:\n") == parse(SMALL)
    assert parse(SMALL + "training:\n", ["training.batch_size=2"]).training.batch_size == 2
    assert "data.train: is required" in problems("model: m\noutput: o\ndata:\n")


def test_max_steps_alone_replaces_the_default_epochs_also_when_written_out() -> None:
    said = parse(SMALL, ["training.max_steps=5"])
    assert parse(yaml.safe_dump(said.model_dump(mode="json"))) == said


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"model: m\noutput: \xff\n")
    with pytest.raises(RunError, match=r"run.yaml is not UTF-8 text \(line 2\)"):
        load(tmp_path / "run.yaml")


def test_an_override_inside_a_value_is_refused() -> None:
    assert "model.name: 'model' is not a section" in problems(SMALL, "model.name=x")


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="veneer init"):
        load(tmp_path / "run.yaml")


def test_a_file_is_read_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(TEMPLATE, encoding="utf-8")
    assert load(path, ["training.epochs=null", "training.max_steps=3"]).training.max_steps == 3
