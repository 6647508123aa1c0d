"""Each row of a batch with its own adapter: as if it had run alone."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import families
import tiny
import veneer
from veneer.errors import AdapterNameError, ArgumentError, AttachError, MergeError
from veneer.integrations import transformers as in_place
from veneer.layers import lineup
from veneer.layers.part import parts_of
from veneer.model.overlay import overlay_needed

BASE = "__base__"
LAYERS = ["q_proj", "down_proj"]


def config(*targets: str, **fields) -> veneer.LoraConfig:
    return veneer.LoraConfig(**{"r": 4, "target_modules": list(targets) or LAYERS, **fields})


def with_adapters(base: nn.Module, **configs: veneer.LoraConfig) -> veneer.PeftModel:
    """A model with these adapters, each with values of its own."""
    first, *others = configs
    model = veneer.get_peft_model(base, configs[first], first)
    for name in others:
        model.add_adapter(name, configs[name])
    for seed, name in enumerate(configs):
        model.set_adapter(name)
        tiny.shake(model, seed=seed)
    model.set_adapter(first)
    return model.eval()


def one_by_one(model: veneer.PeftModel, names: list[str], x: torch.Tensor, run) -> list[torch.Tensor]:
    """What each row gives by itself, with its adapter for the whole batch of one."""
    found = []
    before = model.active_adapters
    for name, row in zip(names, x, strict=True):
        if name == BASE:
            with model.disable_adapter():
                found.append(run(row.unsqueeze(0)))
        else:
            model.set_adapter(name)
            found.append(run(row.unsqueeze(0)))
    model.set_adapter(before)
    return found


NAMES = ["a", "b", BASE, "c", "a", "b"]


def llama(**configs: veneer.LoraConfig) -> veneer.PeftModel:
    return with_adapters(
        tiny.llama(dtype=torch.float64),
        **{"a": config(), "b": config(r=2, use_rslora=True), "c": config("v_proj", use_dora=True), **configs},
    )


CASES = {
    "LoRA, rsLoRA and DoRA": {},
    "DoRA on all": {name: config(use_dora=True, r=2 + i) for i, name in enumerate("abc")},
    "embedding": {"a": config("embed_tokens"), "b": config("embed_tokens", "q_proj", use_dora=True)},
    "trained heads": {"a": config(modules_to_save=["lm_head"]), "c": config("q_proj", modules_to_save=["lm_head"])},
    "own biases": {"b": config(lora_bias=True)},
}


@pytest.mark.parametrize("case", CASES)
def test_each_row_is_as_if_alone(case):
    model, x = llama(**CASES[case]), tiny.ids(rows=6)
    expected = one_by_one(model, NAMES, x, lambda row: model(row).logits)
    found = model(x, adapter_names=NAMES).logits
    assert_close(found, torch.cat(expected), rtol=0, atol=1e-9)
    assert len({tuple(row[0, -1].tolist()) for row in expected}) == 6
    assert torch.equal(model.base_model(x, adapter_names=tuple(NAMES)).logits, found)
    assert_close(model(x[:1]).logits, expected[0], msg="what acted before acts again")


def test_a_layer_stored_transposed():
    model = with_adapters(tiny.gpt2().double(), a=config("c_attn"), b=config("c_fc", use_dora=True))
    x, names = tiny.ids(), ["b", BASE, "a"]
    expected = one_by_one(model, names, x, lambda row: model(row).logits)
    assert_close(model(x, adapter_names=names).logits, torch.cat(expected), rtol=0, atol=1e-9)


def test_a_classifier_has_the_head_of_each_row():
    fields = {"task_type": "SEQ_CLS"}
    model = with_adapters(tiny.bert().double(), a=config("query", **fields), b=config("value", **fields))
    x, names = tiny.ids(rows=4), ["b", BASE, "a", "b"]
    expected = one_by_one(model, names, x, lambda row: model(row).logits)
    assert_close(model(input_ids=x, adapter_names=names).logits, torch.cat(expected), rtol=0, atol=1e-9)


def test_one_name_for_all_rows():
    model, x = llama(), tiny.ids()
    model.set_adapter("b")
    expected = model(x).logits
    model.set_adapter("a")
    assert torch.equal(model(x, adapter_names=["b"] * 3).logits, expected)
    with model.disable_adapter():
        expected = model(x).logits
    assert torch.equal(model(x, adapter_names=[BASE] * 3).logits, expected)


def test_dropout_is_each_adapters_own():
    model = with_adapters(tiny.Stack(), a=config("first", lora_dropout=0.9), b=config("first")).train()
    x = tiny.ids(20, rows=2)
    one, two = (model(x, adapter_names=["a", "b"]) for _ in range(2))
    assert not torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


class TestGenerating:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3, "num_return_sequences": 2}])
    def test_each_row_generates_as_if_alone(self, side, options):
        model, x, names = llama(), tiny.ids(), ["b", BASE, "a"]
        mask = torch.ones_like(x)
        padding = slice(0, 2) if side == "left" else slice(-2, None)
        x[1, padding], mask[1, padding] = 0, 0
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, **options}
        found = model.generate(x, attention_mask=mask, adapter_names=names, **options)
        masks = iter(mask)
        expected = one_by_one(
            model, names, x, lambda row: model.generate(row, attention_mask=next(masks)[None], **options)
        )
        assert torch.equal(found, torch.cat(expected))

    def test_prompts_by_keyword(self):
        model, x, names = llama(), tiny.ids(), ["b", BASE, "a"]
        options = {"max_new_tokens": 3, "do_sample": False, "adapter_names": names}
        assert torch.equal(model.generate(input_ids=x, **options), model.generate(x, **options))
        assert torch.equal(model.base_model.generate(x, **options), model.generate(x, **options))

    @pytest.mark.filterwarnings("ignore:.*share one weight")
    @pytest.mark.parametrize("family", ["t5", "whisper"])
    @pytest.mark.parametrize("beams", [1, 3])
    def test_an_encoder_has_fewer_rows_than_its_decoder(self, family, beams):
        base = families.FAMILIES[family].model().double()
        inputs = families.FAMILIES[family].inputs()
        key = "input_ids" if family == "t5" else "input_features"
        layers = ["q", "wo"] if family == "t5" else ["q_proj", "fc1", "proj_out"]
        model = with_adapters(base, a=config(*layers), b=config(*layers, use_dora=True))
        x = inputs[key] if family == "t5" else inputs[key].double()
        names = ["b", BASE, "a"][: len(x)]
        options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
        found = model.generate(**{key: x}, adapter_names=names, **options)
        expected = one_by_one(model, names, x, lambda row: model.generate(**{key: row}, **options))
        for mine, alone in zip(found, expected, strict=True):
            assert torch.equal(mine[: alone.shape[1]], alone[0])
            assert not mine[alone.shape[1] :].count_nonzero()
        assert not torch.equal(found, model.generate(**{key: x}, adapter_names=[BASE] * len(x), **options))


class TestTraining:
    def grads(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def both(self, checkpointing: bool | None) -> veneer.PeftModel:
        model = llama(c=config("v_proj", modules_to_save=["lm_head"]))
        if checkpointing is not None:
            model.activation_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        model.set_adapter(["a", "b", "c"])
        return model.train()

    @pytest.mark.parametrize("checkpointing", [None, False, True])
    def test_gradients_are_those_of_the_rows_alone(self, checkpointing):
        model, x = self.both(checkpointing), tiny.ids(rows=6)
        expected: dict[str, torch.Tensor] = {}
        for name, row in zip(NAMES, x, strict=True):
            model.zero_grad()
            if name == BASE:
                continue
            model.set_adapter(name)
            model(row.unsqueeze(0)).logits.square().sum().backward()
            for key, gradient in self.grads(model).items():
                expected[key] = expected.get(key, torch.zeros_like(gradient)) + gradient
        model.set_adapter(["a", "b", "c"])
        model.zero_grad()
        model(x, adapter_names=NAMES).logits.square().sum().backward()
        found = self.grads(model)
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            assert_close(found[key], gradient, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
            assert gradient.abs().max() > 0

    def test_an_adapter_that_rests_learns_if_it_is_let(self):
        model, x = llama().train(), tiny.ids(rows=2)
        model(x, adapter_names=["a", "b"]).logits.sum().backward()
        assert {name.split(".adapters.")[1][0] for name in self.grads(model)} == {"a"}
        model.zero_grad()
        model.set_requires_grad("b")
        model(x, adapter_names=["a", "b"]).logits.sum().backward()
        assert {name.split(".adapters.")[1][0] for name in self.grads(model)} == {"a", "b"}


class TestRefusals:
    @pytest.mark.parametrize(
        ("names", "error", "text"),
        [
            (["a", "b"], AdapterNameError, "has 2 names, but the batch has 3 rows"),
            (["a", "b", "typo"], AdapterNameError, "no adapter 'typo'"),
            ("abc", ArgumentError, "must be a list"),
            (["a", None, "b"], ArgumentError, "must be a list"),
        ],
    )
    def test_wrong_names(self, names, error, text):
        model, x = llama(), tiny.ids()
        for call in (model, model.generate):
            with pytest.raises(error, match=text):
                call(x, adapter_names=names)
        with pytest.raises(error, match=text):
            model(inputs_embeds=torch.zeros(3, 2, 32, dtype=torch.float64), adapter_names=names)

    def test_a_misspelt_name_gets_a_suggestion(self):
        model = with_adapters(tiny.Stack(), german=config("first"))
        with pytest.raises(AdapterNameError, match="did you mean 'german'"):
            model(tiny.ids(20), adapter_names=["germn"] * 3)

    def test_while_merged_or_disabled(self):
        model, x = llama(), tiny.ids(rows=2)
        model.merge_adapter()
        with pytest.raises(MergeError, match="unmerge_adapter"):
            model(x, adapter_names=["a", BASE])
        model.unmerge_adapter()
        with model.disable_adapter(), pytest.raises(AttachError, match="disabled"):
            model(x, adapter_names=["a", BASE])

    def test_biases_of_the_base_belong_to_all_rows(self):
        model = with_adapters(tiny.Stack(), a=config("first"), b=config("first", bias="all"))
        x = tiny.ids(20, rows=2)
        with pytest.raises(AttachError, match="'b' trains biases"):
            model(x, adapter_names=["a", "b"])
        model.set_adapter("b")
        with pytest.raises(AttachError, match="'b', active now, trains biases"):
            model(x, adapter_names=["a", BASE])
        model.set_adapter("a")
        model(x, adapter_names=["a", BASE])

    def test_layers_that_see_no_rows(self):
        class Mixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(4, 4)
                self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

            def forward(self, x):
                return self.experts[0](self.first(x))

        model = with_adapters(Mixed(), a=config("first"), b=config("experts.0"))
        x = torch.randn(3, 4)
        with pytest.raises(AttachError, match="'b' adapts experts.0: an expert sees"):
            model(x, adapter_names=["a", "b", "a"])
        model(x, adapter_names=["a", BASE, "a"])
        model(x, adapter_names=["b", "b", "b"])

    def test_tokens_before_rows(self):
        from transformers import XLNetConfig, XLNetLMHeadModel

        sizes = {"vocab_size": 20, "d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8}
        base = XLNetLMHeadModel(XLNetConfig(**sizes))
        model = with_adapters(base, a=config("layer_1"), b=config("layer_1"))
        with pytest.raises(AttachError, match="XLNetModel does not keep row after row"):
            model(tiny.ids(20, rows=2), adapter_names=["a", "b"])

    def test_a_name_that_means_the_base(self):
        model = with_adapters(tiny.Stack(), a=config("first"))
        with pytest.raises(AdapterNameError, match="means the base model"):
            model.add_adapter(BASE, config("first"))

    def test_a_layer_with_other_rows_stops_the_call_and_nothing_stays(self):
        class Halved(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                return self.second(self.first(x)[:1])

        model = with_adapters(Halved(), a=config("first", "second"), b=config("second"))
        x = torch.randn(3, 4)
        expected = model(x)
        with pytest.raises(AttachError, match="got 1 rows where the batch has 3"):
            model(x, adapter_names=["a", "b", BASE])
        assert torch.equal(model(x), expected)


def test_on_a_model_in_place():
    model = tiny.llama()
    in_place.add_adapter(model, config(init_lora_weights=False), "a")
    in_place.add_adapter(model, config(init_lora_weights=False, use_dora=True), "b")
    x, names = tiny.ids(), ["b", BASE, "a"]
    facade = veneer.PeftModel._over(copy.deepcopy(model))
    assert_close(model(x, adapter_names=names).logits, facade(x, adapter_names=names).logits)
    options = {"max_new_tokens": 3, "do_sample": False, "adapter_names": names}
    assert torch.equal(model.generate(x, **options), facade.generate(x, **options))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.generate(x, **options), facade.generate(x, **options))


def test_convolutions():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5)).double()
    model = with_adapters(base, a=config("0", "2"), b=config("0", r=2, use_dora=True))
    x, names = torch.randn(3, 3, 6, 6, dtype=torch.float64), ["b", BASE, "a"]
    expected = one_by_one(model, names, x, model)
    assert_close(model(x, adapter_names=names), torch.cat(expected), rtol=0, atol=1e-9)


class TestKeeping:
    """What a generation keeps of the adapters' factors, seen from outside."""

    OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}

    @pytest.fixture
    def made(self, monkeypatch) -> list[int]:
        found: list[int] = []
        stacked = lineup.stacked
        monkeypatch.setattr(lineup, "stacked", lambda *args, **named: found.append(1) or stacked(*args, **named))
        return found

    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize(("names", "orders"), [(["a", "b", BASE, "c"], 1), (["a", "b", "c", "b"], 2)])
    def test_no_stack_is_made_twice(self, names, orders, use_cache, made):
        """Where adapters have unlike numbers of rows, prompts and single tokens may want them in another order."""
        model = llama(c=config(use_dora=True))
        model.generate(tiny.ids(rows=4), adapter_names=names, use_cache=use_cache, **self.OPTIONS)
        layers = 2 * len(LAYERS)
        assert len(made) == layers * (orders if use_cache else 1)

    @pytest.mark.parametrize("names", [["a", "b", BASE, "c"], ["a", "b", "c", "b"]])
    def test_as_without_keeping(self, names, monkeypatch):
        model, x = llama(c=config(use_dora=True)), tiny.ids(rows=4)
        found = model.generate(x, adapter_names=names, **self.OPTIONS)
        monkeypatch.setattr(lineup, "KEPT_BYTES", 0)
        assert torch.equal(model.generate(x, adapter_names=names, **self.OPTIONS), found)

    @pytest.mark.parametrize("how", ["written", "scaled"])
    def test_another_thread_changes_an_adapter_meanwhile(self, how, monkeypatch):
        def change(model: veneer.PeftModel) -> None:
            if how == "written":
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        if ".adapters.a.lora_B" in name:
                            parameter.mul_(-30)
            else:
                model.bare.model.layers[0].self_attn.q_proj.set_scale("a", -30.0)

        def generated(changing: bool) -> torch.Tensor:
            model, steps = llama(), []

            def meanwhile(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                steps.append(1)
                if len(steps) == 3 and changing:
                    other = threading.Thread(target=change, args=[model])
                    other.start()
                    other.join()
                return scores

            names = ["a", "b", "c"]
            return model.generate(tiny.ids(), adapter_names=names, logits_processor=[meanwhile], **self.OPTIONS)

        found = generated(changing=True)
        assert not torch.equal(found, generated(changing=False))
        monkeypatch.setattr(lineup, "KEPT_BYTES", 0)
        assert torch.equal(generated(changing=True), found)

    def test_an_adapter_added_again_between_calls(self):
        model, x, names = llama(), tiny.ids(), ["a", "b", "c"]
        before = model.generate(x, adapter_names=names, **self.OPTIONS)
        model.delete_adapter("b")
        torch.manual_seed(9)
        model.add_adapter("b", config(init_lora_weights=False, lora_alpha=200))
        after = model.generate(x, adapter_names=names, **self.OPTIONS)
        assert torch.equal(after[[0, 2]], before[[0, 2]])
        model.set_adapter("b")
        alone = model.generate(x[1:2], **self.OPTIONS)[0]
        assert torch.equal(after[1], alone)
        assert not torch.equal(after[1], before[1])

    def test_between_calls_nothing_stays(self):
        model, x, names = llama(), tiny.ids(), ["a", "b", "c"]
        before = model.generate(x, adapter_names=names, **self.OPTIONS)
        for name, parameter in model.named_parameters():
            if ".adapters.a.lora_B" in name:
                parameter.data.mul_(-30)
        after = model.generate(x, adapter_names=names, **self.OPTIONS)
        assert not torch.equal(after[0], before[0])
        assert torch.equal(after[1:], before[1:])
        model.set_adapter("a")
        assert torch.equal(model.generate(x[:1], **self.OPTIONS)[0], after[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_in_one_piece():
    model = with_adapters(tiny.Stack(), a=config("first", "second"), b=config("first", r=2, lora_alpha=3))
    x, names = tiny.ids(20, rows=4), ["b", BASE, "a", "b"]
    compiled = torch.compile(model.bare, backend="eager", fullgraph=True)
    with torch.no_grad(), overlay_needed(model.bare).route.serving(parts_of([None, "a", "b", "b"])):
        assert_close(compiled(x), model.bare(x))
    with overlay_needed(model.bare).route.serving(parts_of([None if name == BASE else name for name in names])):
        assert_close(compiled(x), model.bare(x))


def test_every_thread_gets_the_adapters_that_it_asked_for():
    model, x = llama(), tiny.ids()
    asked = [["a"] * 3, ["a", "b", "c"], ["c", "__base__", "b"], None]
    model.set_adapter("b")
    given = [{} if names is None else {"adapter_names": names} for names in asked]
    alone = [model(x, **more).logits for more in given]
    found: list[list[torch.Tensor]] = [[] for _ in asked]
    inside = threading.Barrier(len(asked))

    def serve(which: int) -> None:
        inside.wait()
        for _ in range(20):
            found[which].append(model(x, **given[which]).logits)

    threads = [threading.Thread(target=serve, args=[which]) for which in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for logits, expected in zip(found, alone, strict=True):
        assert len(logits) == 20
        assert all(torch.equal(one, expected) for one in logits)


def test_an_adapter_chosen_within_a_call_acts_after_it():
    model, x = llama(), tiny.ids()
    names = ["a", "b", "c"]
    before = model(x, adapter_names=names).logits
    handle = model.bare.model.layers[0].register_forward_hook(lambda *_: model.set_adapter("c"))
    assert torch.equal(model(x, adapter_names=names).logits, before)
    handle.remove()
    assert model.active_adapters == ["c"]
    assert torch.equal(model(x).logits, model(x, adapter_names=["c"] * 3).logits)
