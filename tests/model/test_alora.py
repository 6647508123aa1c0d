"""Activated LoRA: what stands before the invocation is the base model's, what follows it is the adapter's."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import DynamicCache

import families
import tiny
import veneer
from veneer.errors import ArgumentError, AttachError, ConfigError, MergeError, VeneerWarning
from veneer.integrations import transformers as in_place
from veneer.layers.part import parts_of
from veneer.layers.route import Prompt
from veneer.model.invocation import NEVER, _positions, last_occurrence

INVOCATION = [7, 9]
FIELDS = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4}


def plain(**fields) -> veneer.LoraConfig:
    return veneer.LoraConfig(**{**FIELDS, **fields})


def activated(**fields) -> veneer.LoraConfig:
    return plain(**{"alora_invocation_tokens": INVOCATION, **fields})


def twins(**fields) -> veneer.PeftModel:
    """An activated adapter, active, and a plain one with the same values."""
    model = veneer.get_peft_model(tiny.llama(dtype=torch.float64), activated(**fields), "activated")
    tiny.shake(model)
    model.add_adapter("plain", plain(**fields))
    model.set_adapter("plain")
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            if ".plain." in name:
                value.copy_(values[name.replace(".plain.", ".activated.")])
    model.set_adapter("activated")
    return model.eval()


def prompts(*, uninvoked: bool = True) -> torch.Tensor:
    """Invoked once, twice, at the very end, and never."""
    x = tiny.ids(rows=4, tokens=8)
    x[(x == 7) | (x == 9)] = 11
    x[0, 2:4] = x[1, 1:3] = x[1, 5:7] = x[2, -2:] = torch.tensor(INVOCATION)
    return x if uninvoked else x[:3]


STARTS = [2, 5, 6, 8]


def by_definition(model: veneer.PeftModel, row: torch.Tensor, start: int) -> torch.Tensor:
    """Logits of one row: the base model fills a cache up to the invocation, the plain adapter goes on from there."""
    before = model.active_adapters
    model.set_adapter("plain")
    cache, logits = DynamicCache(), []
    if start:
        with model.disable_adapter():
            logits.append(model(row[None, :start], past_key_values=cache).logits)
    if start < len(row):
        logits.append(model(row[None, start:], past_key_values=cache).logits)
    model.set_adapter(before)
    return torch.cat(logits, 1)[0]


def test_the_last_occurrence():
    x = torch.tensor([[7, 7, 9, 1, 7, 9, 7], [9, 7, 1, 1, 1, 9, 7], [7, 9, 7, 9, 7, 7, 9]])
    assert last_occurrence(x, INVOCATION).tolist() == [4, NEVER, 5]
    assert last_occurrence(x, [7, 9, 7]).tolist() == [4, NEVER, 2]
    assert last_occurrence(x[:, :1], INVOCATION).tolist() == [NEVER] * 3


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True, "lora_bias": True}], ids=str)
def test_forward_is_the_definition(fields):
    model, x = twins(**fields), prompts()
    found = model(x).logits
    for row, start, logits in zip(x, STARTS, found, strict=True):
        assert_close(logits, by_definition(model, row, start), rtol=0, atol=1e-10)
    with model.disable_adapter():
        base = model(x).logits
    assert torch.equal(found[3], base[3])
    assert (found[:3, -1] - base[:3, -1]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_are_of_activated_tokens_only(reentrant):
    model, x = twins(), prompts(uninvoked=False)
    model.set_adapter("plain")
    for row, start in zip(x, STARTS, strict=False):
        cache = DynamicCache()
        with torch.no_grad(), model.disable_adapter():
            model(row[None, :start], past_key_values=cache)
        model(row[None, start:], past_key_values=cache).logits.square().sum().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.set_adapter("activated")
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    logits = model.train()(input_ids=x).logits
    after = torch.arange(x.shape[1]) >= torch.tensor(STARTS[:3]).unsqueeze(1)
    logits[after].square().sum().backward()
    assert len(expected) == 12
    for name, gradient in expected.items():
        found = model.get_parameter(name.replace(".plain.", ".activated.")).grad
        assert_close(found, gradient, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


class TestGenerating:
    OPTIONS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}

    def expected(self, model: veneer.PeftModel, x: torch.Tensor) -> torch.Tensor:
        """Greedy generation, each step from the whole row by definition."""
        rows = []
        for row, start in zip(x, STARTS, strict=True):
            grown = row
            for _ in range(5):
                start_now = start if start < len(row) else len(grown)
                grown = torch.cat([grown, by_definition(model, grown, start_now)[-1].argmax()[None]])
            rows.append(grown)
        return torch.stack(rows)

    @pytest.mark.parametrize(
        "options",
        [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}],
        ids=str,
    )
    def test_greedy(self, options):
        model, x = twins(), prompts()
        found = model.generate(x, **self.OPTIONS, **options)
        assert torch.equal(found, self.expected(model, x))
        with model.disable_adapter():
            base = model.generate(x, **self.OPTIONS)
        assert not torch.equal(found[:3], base[:3])
        assert torch.equal(found[3], base[3])

    def test_a_generated_invocation_does_not_invoke(self):
        model, x = twins(alora_invocation_tokens=[7]), prompts()
        x[x == 7] = 11
        force = {"prefix_allowed_tokens_fn": lambda batch, ids: [7]}
        for use_cache in (True, False):
            options = {**self.OPTIONS, "return_dict_in_generate": True, "output_logits": True, "use_cache": use_cache}
            found = torch.stack(model.generate(x, **options, **force).logits)
            with model.disable_adapter():
                base = torch.stack(model.generate(x, **options, **force).logits)
            assert torch.equal(found, base)

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_beams(self, use_cache):
        model, x = twins(), prompts()
        options = {**self.OPTIONS, "num_beams": 3, "num_return_sequences": 2, "use_cache": use_cache}
        found = model.generate(x, **options)
        alone = [model.generate(row.unsqueeze(0), **options) for row in x]
        assert torch.equal(found, torch.cat(alone))

    def test_padding_before_prompts(self):
        model, x = twins(), prompts()
        padded = torch.cat([torch.zeros(4, 3, dtype=x.dtype), x], 1)
        found = model.generate(padded, attention_mask=(padded != 0).long(), **self.OPTIONS)
        assert torch.equal(found[:, 3:], model.generate(x, **self.OPTIONS))

    def test_a_cache_filled_by_the_base(self):
        model, x = twins(), prompts()[:1]
        cache = DynamicCache()
        with torch.no_grad(), model.disable_adapter():
            model(x[:, :2], past_key_values=cache)
        found = model.generate(x, past_key_values=cache, **self.OPTIONS)
        assert torch.equal(found, model.generate(x, **self.OPTIONS))

    def test_embeddings_need_offsets(self):
        model, x = twins(), prompts()
        embedded = model.get_input_embeddings()(x)
        with pytest.raises(AttachError, match="no input_ids to find them in"):
            model.generate(inputs_embeds=embedded, **self.OPTIONS)
        found = model.generate(inputs_embeds=embedded, alora_offsets=[6, 3, 2, None], **self.OPTIONS)
        assert torch.equal(found, model.generate(x, **self.OPTIONS)[:, 8:])

    def test_with_plain_rows(self):
        model, x = twins(), prompts()
        names = ["activated", "plain", "__base__", "activated"]
        found = model.generate(x, adapter_names=names, **self.OPTIONS)
        for i, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model.generate(x[i : i + 1], **self.OPTIONS)
            else:
                model.set_adapter(name)
                alone = model.generate(x[i : i + 1], **self.OPTIONS)
            assert torch.equal(found[i : i + 1], alone)


def test_rows_of_several_adapters():
    model, x = twins(), prompts()
    model.add_adapter("other", activated(alora_invocation_tokens=[11], target_modules=["k_proj"]))
    model.set_adapter("other")
    tiny.shake(model, seed=4)
    x[:, 4] = 11
    names = ["other", "activated", "plain", "other"]
    found = model(x, adapter_names=names).logits
    for i, name in enumerate(names):
        model.set_adapter(name)
        assert_close(found[i : i + 1], model(x[i : i + 1]).logits, rtol=0, atol=1e-10)
    model.set_adapter(["other", "activated"])
    both = model(x).logits
    assert not torch.allclose(both[0], found[0])


class TestOffsets:
    def test_given_ones_rule(self):
        model, x = twins(), prompts()
        assert torch.equal(model(x, alora_offsets=[6, 3, 2, None]).logits, model(x).logits)
        found = model(x, alora_offsets=[8, None, 1, 99]).logits
        for row, start, logits in zip(x, [0, 8, 7, 0], found, strict=True):
            assert_close(logits, by_definition(model, row, start), rtol=0, atol=1e-10)

    def test_a_loop_of_ones_own(self):
        model, x = twins(), prompts()
        cache = DynamicCache()
        model(x, past_key_values=cache)
        more = torch.tensor([[3], [4], [5], [6]])
        with pytest.raises(AttachError, match="may have had them in the tokens of the cache"):
            model(more, past_key_values=cache)
        found = model(more, past_key_values=cache, alora_offsets=[1, 1, 1, None]).logits
        x = torch.cat([x, more], 1)
        for row, start, logits in zip(x, [2, 5, 6, 9], found, strict=True):
            assert_close(logits[-1], by_definition(model, row, start)[-1], rtol=0, atol=1e-10)

    @pytest.mark.parametrize("offsets", [[1, 2], [1, 2, 3, -1], [1, 2, 3, 1.5], [True, 1, 1, 1], 3])
    def test_wrong_ones(self, offsets):
        model, x = twins(), prompts()
        for call in (model, model.generate):
            with pytest.raises(ArgumentError, match="alora_offsets"):
                call(x, alora_offsets=offsets)

    def test_without_effect(self):
        model, x = twins(), prompts()
        model.set_adapter("plain")
        with pytest.raises(ArgumentError, match="no effect"):
            model(x, alora_offsets=[1] * 4)


class TestTheModel:
    def hooks(self, model: veneer.PeftModel | nn.Module) -> int:
        bare = model.bare if isinstance(model, veneer.PeftModel) else model
        tables = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
        return sum(len(getattr(bare, table)) for table in (*tables, "_forward_pre_hooks_with_kwargs"))

    def test_is_hooked_while_an_activated_adapter_is_there(self):
        model = twins()
        assert self.hooks(model) == 5
        model.add_adapter("second", activated())
        assert self.hooks(model) == 5
        model.delete_adapter("second")
        assert self.hooks(model) == 5
        with pytest.warns(VeneerWarning, match="was active"):
            model.delete_adapter("activated")
        assert self.hooks(model) == 0
        model.add_adapter("activated", activated())
        assert self.hooks(model.unload()) == 0

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_can_be_copied(self, copied):
        model, x = twins(), prompts()
        expected = model(x).logits
        again = copied(model)
        model.delete_adapter("plain")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(again(x).logits, expected)
        assert self.hooks(again.unload()) == 0

    def test_by_every_door(self):
        model, x = twins(), prompts()
        expected = model(x).logits
        assert torch.equal(model.bare(x).logits, expected)
        assert torch.equal(model.bare(input_ids=x).logits, expected)
        bare = tiny.llama(dtype=torch.float64)
        in_place.add_adapter(bare, activated(), "activated")
        values = model.state_dict()
        bare.load_state_dict({k: values[f"base_model.model.{k}"] for k in bare.state_dict()})
        assert torch.equal(bare(x).logits, expected)
        assert torch.equal(bare(x, alora_offsets=[6, 3, 2, None]).logits, expected)
        options = TestGenerating.OPTIONS
        assert torch.equal(bare.generate(x, **options), model.generate(x, **options))

    def test_its_parts_do_not_know_the_tokens(self):
        model, x = twins(), prompts()
        with pytest.raises(AttachError, match="call that, not a part"):
            model.bare.model(x)
        model(x)
        with pytest.raises(AttachError, match="call that, not a part"):
            model.bare.model(x)
        model.set_adapter("plain")
        model.bare.model(x)
        model.add_adapter("second", activated())
        route = model.bare._veneer_overlay.route
        parts = parts_of(["activated", "second", "plain", None])
        with route.serving(parts), pytest.raises(AttachError, match="call that, not a part"):
            model.bare.model(x)

    @pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
    def test_an_error_inside_leaves_nothing(self, error):
        model, x = twins(), prompts()
        expected = model(x).logits

        def stop(*_):
            raise error

        handle = model.bare.model.layers[1].register_forward_pre_hook(stop)
        for call in (
            lambda: model(x),
            lambda: model.generate(x, max_new_tokens=2),
            lambda: model(x[:1], alora_offsets=[2]),
        ):
            with pytest.raises(error):
                call()
        handle.remove()
        assert torch.equal(model(x).logits, expected)
        assert model.bare._veneer_overlay.route.prompt is None

    def test_is_the_base_while_disabled(self):
        model, x = twins(), prompts()
        with model.disable_adapter():
            base = model(x).logits
        assert torch.equal(tiny.llama(dtype=torch.float64)(x).logits, base)

    def test_a_head_that_sees_the_last_tokens_only(self):
        model, x = twins(target_modules=["q_proj", "lm_head"]), prompts()
        full = model(x).logits
        assert_close(model(x, logits_to_keep=3).logits, full[:, -3:])
        assert not torch.allclose(full[3], by_definition(model, x[3], 0))
        with pytest.raises(AttachError, match="logits_to_keep names single tokens"):
            model(x, logits_to_keep=torch.tensor([1, 5]))
        without = twins()
        assert_close(without(x, logits_to_keep=torch.tensor([1, 5])).logits, without(x).logits[:, [1, 5]])

    def test_trains_by_trainer(self, tmp_path):
        from transformers import Trainer, TrainingArguments

        bare = tiny.llama()
        in_place.add_adapter(bare, activated())
        rows = [{"input_ids": row, "labels": row} for row in prompts(uninvoked=False)]
        before = {n: p.clone() for n, p in bare.named_parameters() if "lora_A" in n or "lora_B" in n}
        options = {"max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.1}
        Trainer(bare, TrainingArguments(str(tmp_path), save_strategy="no", **options), train_dataset=rows).train()
        assert all(not torch.equal(bare.get_parameter(n), value) for n, value in before.items())


class TestRefusals:
    def test_merging(self):
        model = twins()
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(MergeError, match="would act on every token"):
                merge()
        model.merge_adapter(["plain"])

    @pytest.mark.parametrize(
        ("base", "fields", "text"),
        [
            (tiny.llama, {"target_modules": ["embed_tokens"]}, "a layer of kind embedding"),
            (families.FAMILIES["t5"].model, {"target_modules": ["q"]}, "an encoder and a decoder"),
        ],
    )
    def test_where_it_cannot_go(self, base, fields, text):
        with pytest.raises(AttachError, match=text):
            veneer.get_peft_model(base(), activated(**fields))

    def test_layers_that_mix_rows(self):
        from transformers import XLNetConfig, XLNetLMHeadModel

        class Mixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.experts = nn.ModuleList([nn.Linear(4, 4)])

        with pytest.raises(AttachError, match="an expert sees tokens of several rows"):
            veneer.get_peft_model(Mixed(), activated(target_modules=["experts.0"]))
        sizes = {"vocab_size": 20, "d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 8}
        with pytest.raises(AttachError, match="does not keep row after row"):
            veneer.get_peft_model(XLNetLMHeadModel(XLNetConfig(**sizes)), activated(target_modules=["layer_1"]))

    def test_guidance_by_a_second_text(self):
        model, x = twins(), prompts()
        with pytest.raises(AttachError, match="guidance_scale"):
            model.generate(x, guidance_scale=1.5, max_new_tokens=2)

    @pytest.mark.parametrize("tokens", [[], [-1], "7 9", [1.5]])
    def test_what_is_no_sequence_of_tokens(self, tokens):
        with pytest.raises(ConfigError, match="alora_invocation_tokens"):
            activated(alora_invocation_tokens=tokens)

    def test_embeddings_without_tokens(self):
        model, x = twins(), prompts()
        embedded = model.get_input_embeddings()(x)
        with pytest.raises(AttachError, match="no input_ids to find them in"):
            model(inputs_embeds=embedded, attention_mask=torch.ones_like(x))
        found = model(inputs_embeds=embedded, alora_offsets=[6, 3, 2, None]).logits
        assert_close(found, model(x).logits)

    def test_rows_packed_into_one(self):
        model, x = twins().train(), prompts(uninvoked=False)[:1]
        with pytest.raises(AttachError, match="without packing"):
            model(x, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))
        model(x, position_ids=torch.tensor([[1, 1, 0, 1, 2, 3, 4, 5]]))


class TestWarnings:
    def test_of_rows_that_train_nothing(self):
        model, x = twins().train(), prompts()
        with pytest.warns(VeneerWarning, match=r"'activated': 1 row\(s\) of this batch lack"):
            model(x)
        model(x, adapter_names=["activated"] * 3 + ["plain"])
        with torch.no_grad():
            model(x)

    def test_of_another_task(self):
        with pytest.warns(VeneerWarning, match="for causal language models; task_type is None"):
            veneer.get_peft_model(tiny.llama(), activated(task_type=None))

    def test_of_what_acts_on_every_token(self):
        with pytest.warns(VeneerWarning, match="modules_to_save: what is trained in full acts on every token"):
            model = veneer.get_peft_model(tiny.llama(), activated(modules_to_save=["lm_head"]))
        tiny.shake(model)
        head = model.bare.lm_head.modules_to_save["default"].weight
        hidden = model(prompts(), output_hidden_states=True)
        assert_close(hidden.logits, hidden.hidden_states[-1] @ head.T)


@pytest.mark.parametrize(("tokens", "first"), [(1, 5), (6, 0)])
def test_without_a_cache_that_counts_a_pass_has_the_whole_row_or_what_follows_the_prompt(tokens, first):
    ids = torch.ones(1, tokens, dtype=torch.long)
    found = _positions(Prompt({}, 5, generating=True), {"input_ids": ids})
    assert found.tolist() == list(range(first, first + tokens))
