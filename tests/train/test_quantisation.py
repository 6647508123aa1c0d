"""`quantization` in a run: what is refused before anything is loaded, and runs over real quantised weights."""

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from train.tiny_run import Told, settings
from veneer.errors import MissingPackageError, RunError
from veneer.train import quantisation
from veneer.train.load import load_model
from veneer.train.quantisation import WAYS, Quantization, quantization_config
from veneer.train.run import train
from veneer.train.run_file import parse

SMALL = "model: m\ndata: {train: rows.jsonl}\noutput: out\n"
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]


def problem(*overrides: str) -> str:
    with pytest.raises(RunError) as caught:
        parse(SMALL, overrides)
    return str(caught.value)


def test_each_way_has_a_name_and_an_extra() -> None:
    import tomllib

    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for name in get_args(Quantization):
        assert parse(SMALL, [f"quantization={name}"]).quantization == name
        assert any(WAYS[name].package in line for line in extras["quant"])


def test_clashes_are_named() -> None:
    assert "dtype=float32 and quantization=nf4 both say" in problem("quantization=nf4", "dtype=float32")
    assert "lora.init_lora_weights=loftq rounds the weights itself" in problem(
        "quantization=nf4", "lora.init_lora_weights=loftq"
    )
    assert "should be 'nf4', 'fp4', 'int8'" in problem("quantization=nf5")
    assert "quantization: int4: nf4 (bitsandbytes) or torchao-int4 keep 4 bits" in problem("quantization=int4")
    assert "torchao has no gradient for it: torchao-int8" in problem("quantization=torchao-int8-dynamic")
    assert "did you mean 'quantization'?" in problem("quantize=nf4")


def test_a_missing_package_is_named_with_its_extra(
    chat_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantisation, "find_spec", lambda name: None)
    config = settings(chat_model, rows_file, tmp_path / "out").model_copy(update={"quantization": "nf4"})
    with pytest.raises(MissingPackageError, match=r"needs bitsandbytes, .*pip install 'veneer\[quant\]'"):
        train(config)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_sharded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    quantisation.refuse_unusable("nf4")
    with pytest.raises(RunError, match="quantization=int8: FSDP cannot cut such weights .* quantization=nf4 with"):
        quantisation.refuse_unusable("int8")
    assert quantization_config("nf4", torch.bfloat16).bnb_4bit_quant_storage == torch.bfloat16
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(RunError, match="quantization=nf4: ZeRO-3 cannot cut such weights"):
        quantisation.refuse_unusable("nf4")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    assert quantization_config("nf4", torch.bfloat16).bnb_4bit_quant_storage == torch.uint8


def test_a_base_that_is_quantised_already_is_refused(chat_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(chat_model, tmp_path / "gptq"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(RunError, match=r"is quantised already \(gptq\): leave quantization=nf4 out"):
        load_model(str(folder), quantization="nf4")


def wider(model: Path, folder: Path) -> Path:
    """A model whose widths are multiples of 32, with the tokenizer of another."""
    from transformers import AutoConfig, LlamaForCausalLM

    copy = Path(shutil.copytree(model, folder / "wider"))
    config = AutoConfig.from_pretrained(model)
    config.intermediate_size = 64
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(copy)
    return copy


@pytest.mark.parametrize("way", get_args(Quantization))
def test_a_run_over_a_quantised_base(way: Quantization, chat_model: Path, rows_file: Path, tmp_path: Path) -> None:
    pytest.importorskip(WAYS[way].package)
    if way == "torchao-int4":
        with pytest.raises(RunError, match=r"cannot be kept in 4 bits .* All widths must be multiples of 32\."):
            load_model(str(chat_model), quantization=way)
        chat_model = wider(chat_model, tmp_path)
    told = Told()
    config = settings(chat_model, rows_file, tmp_path / "out", data={"eval_fraction": 0.25}, eval_every=2)
    result = train(config.model_copy(update={"quantization": way}), progress=told)
    assert result.losses[-1][1] < result.losses[0][1]
    assert any(WAYS[way].says in line for line in told.lines)
    whole = train(settings(chat_model, rows_file, tmp_path / "whole", max_steps=1))
    assert (result.trainable, result.total) == (whole.trainable, whole.total)
    assert result.losses[0][1] == pytest.approx(whole.losses[0][1], rel=0.05)
    assert yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())["quantization"] == way
    card = (result.adapter_dir / "README.md").read_text(encoding="utf-8")
    assert f"| precision of the base | {WAYS[way].says} (`{way}`) |" in card
    assert json.loads((result.adapter_dir / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        chat_model
    )


def test_adapters_stay_in_float32_and_go_on_learning_after_an_evaluation(
    chat_model: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL would round them to bfloat16; on some CPUs bitsandbytes gives no gradient after a call in evaluation."""
    from veneer.train import run

    seen = []
    monkeypatch.setattr(run, "_run", lambda trainer, *rest: seen.append(trainer))
    monkeypatch.setattr(run, "save", lambda *_: tmp_path)
    monkeypatch.setattr(run, "plot", lambda *_: None)
    config = settings(chat_model, rows_file, tmp_path / "out")
    train(config.model_copy(update={"quantization": "nf4"}))
    model = seen[0].model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    ids = torch.arange(3, 20).unsqueeze(0)

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trained))

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    model.train()
    for one, other in zip(before, gradients(), strict=True):
        torch.testing.assert_close(one, other)
