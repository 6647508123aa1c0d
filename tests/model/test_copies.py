"""Copies of an adapted model are whole and independent, and threads may change models at the same time."""

import copy
import io
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import tiny
import veneer
from veneer.errors import AdapterNameError, VeneerWarning
from veneer.integrations.transformers import add_adapter
from veneer.layers import swap
from veneer.layers.attach import Adapted
from veneer.model.apply import activate
from veneer.model.overlay import overlay_of
from veneer.model.state_dict import LoadResult

FIELDS = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
X = tiny.ids()


def config(**fields) -> veneer.LoraConfig:
    return veneer.LoraConfig(**{**FIELDS, **fields})


def facade(**fields) -> veneer.PeftModel:
    return veneer.get_peft_model(tiny.llama(), config(**fields)).eval()


def transformers_in_place() -> nn.Module:
    model = tiny.llama()
    add_adapter(model, config())
    return model


def checkpointing() -> nn.Module:
    model = facade()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.bare.disable_input_require_grads()  # a hook of transformers' that cannot be pickled
    return model.train()


def two_adapters() -> nn.Module:
    model = facade()
    model.add_adapter("b", config(target_modules=["up_proj"]))
    model.base_model.set_adapter(["b", "default"])
    return model


def merged() -> nn.Module:
    model = facade()
    model.merge_adapter()
    return model


def prepared() -> nn.Module:
    model = facade()
    veneer.prepare_model_for_compiled_hotswap(model, target_rank=4)
    return model


MODELS = {
    "facade": facade,
    "lora model": lambda: facade().base_model,
    "in place": lambda: veneer.inject_adapter_in_model(config(), tiny.llama()),
    "transformers in place": transformers_in_place,
    "dora": lambda: facade(use_dora=True),
    "embedding": lambda: facade(target_modules=["embed_tokens"]),
    "saved modules": lambda: facade(modules_to_save=["lm_head"]),
    "pissa": lambda: facade(init_lora_weights="pissa"),
    "loftq": lambda: facade(init_lora_weights="loftq"),
    "checkpointing": checkpointing,
    "two adapters": two_adapters,
    "merged": merged,
    "prepared": prepared,
}


def saved_by_torch(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_by_torch,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::veneer.errors.VeneerWarning")
def test_a_copy_is_whole_and_independent(name, way):
    model = MODELS[name]()
    before = model(input_ids=X).logits.detach().clone()
    twin = WAYS[way](model)
    assert type(twin) is type(model)
    assert torch.equal(twin(input_ids=X).logits, before)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    other_memory = {p.untyped_storage().data_ptr() for p in twin.parameters()}
    assert not other_memory & {p.untyped_storage().data_ptr() for p in model.parameters()}

    handle = twin if isinstance(twin, veneer.PeftModel | veneer.LoraModel) else veneer.LoraModel(twin)
    with handle.disable_adapter():
        assert torch.equal(twin(input_ids=X).logits, tiny.llama().train(twin.training)(input_ids=X).logits)
    assert_close(twin(input_ids=X).logits, before)
    handle.unload()
    assert torch.equal(twin(input_ids=X).logits, tiny.llama().train(twin.training)(input_ids=X).logits)
    assert torch.equal(model(input_ids=X).logits, before)  # whatever was done to the copy
    assert veneer.get_model_status(model).enabled is True


def test_a_copy_with_biases_and_its_training():
    model = tiny.shake(veneer.get_peft_model(tiny.Stack(), veneer.LoraConfig(target_modules=["first"], bias="all")))
    x = tiny.ids(20)
    before = model(x)
    twin = copy.deepcopy(model)
    twin(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert torch.equal(model(x), before)
    with twin.disable_adapter():
        assert torch.equal(twin(x), tiny.Stack()(x))


def test_a_copied_checkpoint_follows_the_copys_own_route():
    model = checkpointing()
    twin = copy.deepcopy(model)
    loss = twin(input_ids=X).logits.sum()
    twin.disable_adapter_layers()  # between forward and backward
    loss.backward()
    model(input_ids=X).logits.sum().backward()
    ours, theirs = (one.bare.model.layers[0].self_attn.q_proj.adapters["default"] for one in (model, twin))
    assert_close(theirs.lora_A.grad, ours.lora_A.grad)


class Slowly(type):
    """Makes classes so slowly that other threads come in between."""

    def __new__(cls, *args):
        time.sleep(0.01)
        return super().__new__(cls, *args)


class Base(nn.Linear, metaclass=Slowly):
    pass


def test_one_class_for_one_base_in_all_threads(monkeypatch):
    """Two classes for one base, and a layer could not be taken back or copied."""
    monkeypatch.setattr(swap, "_MADE", {})
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: swap.made_class(Adapted, Base), range(8)))) == 1


class TestThreads:
    THREADS = 8

    @pytest.fixture
    def folders(self, tmp_path):
        for at in range(self.THREADS):
            model = tiny.shake(facade(r=at + 1), seed=at)
            model.save_pretrained(tmp_path / f"a{at}")
        return [tmp_path / f"a{at}" for at in range(self.THREADS)]

    def at_once(self, work: Callable[[int], object]) -> list[object]:
        """What each thread's work gave, or the exception it raised."""
        start = threading.Barrier(self.THREADS)

        def run(at: int) -> object:
            start.wait()
            try:
                return work(at)
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.THREADS) as pool:
            return list(pool.map(run, range(self.THREADS)))

    def test_loading_adapters_into_one_model(self, folders):
        for _ in range(3):
            model = veneer.PeftModel.from_pretrained(tiny.llama(), folders[0], "first")
            results = self.at_once(lambda at, model=model: model.load_adapter(folders[at], f"a{at}"))
            assert results == [LoadResult([], [])] * self.THREADS
            assert set(model.peft_config) == {"first", *(f"a{at}" for at in range(self.THREADS))}
            for at in range(self.THREADS):
                model.set_adapter(f"a{at}")
                alone = veneer.PeftModel.from_pretrained(tiny.llama(), folders[at])
                assert torch.equal(model(X).logits, alone(X).logits)
            model.unload()
            assert type(model.bare.model.layers[0].self_attn.q_proj) is nn.Linear

    def test_the_first_adapters_of_one_model(self):
        for _ in range(5):
            base = tiny.llama()
            results = self.at_once(
                lambda at, base=base: veneer.inject_adapter_in_model(config(r=at + 1), base, f"a{at}")
            )
            assert all(result is base for result in results)
            assert [len(layer.available_adapters) for layer in veneer.get_layer_status(base)] == [self.THREADS] * 4

    def test_one_name_is_given_once(self, folders):
        model = veneer.PeftModel.from_pretrained(tiny.llama(), folders[0], "first")
        results = self.at_once(lambda at: model.load_adapter(folders[at], "same"))
        assert results.count(LoadResult([], [])) == 1
        assert [type(result) for result in results].count(AdapterNameError) == self.THREADS - 1
        winner = results.index(LoadResult([], []))
        assert model.peft_config["same"].r == winner + 1
        model.set_adapter("same")
        alone = veneer.PeftModel.from_pretrained(tiny.llama(), folders[winner])
        assert torch.equal(model(X).logits, alone(X).logits)

    def test_coming_going_and_swapping(self, folders):
        model = veneer.PeftModel.from_pretrained(tiny.llama(), folders[0], "first")
        expected = model(X).logits

        def work(at: int) -> None:
            for _ in range(4):
                model.load_adapter(folders[at], f"a{at}")
                veneer.hotswap_adapter(model, folders[at // 2], f"a{at}")
                model.set_scale(f"a{at}", 2)
                assert overlay_of(model.bare).configs[f"a{at}"].r == at // 2 + 1
                model.delete_adapter(f"a{at}")

        assert self.at_once(work) == [None] * self.THREADS
        assert list(model.peft_config) == ["first"]
        assert torch.equal(model(X).logits, expected)

    def test_models_of_their_own(self, folders):
        def work(at: int) -> torch.Tensor:
            model = veneer.PeftModel.from_pretrained(tiny.llama(), folders[at])
            activate(model.bare, ["default"])
            return veneer.get_peft_model_state_dict(model)[
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
            ]

        values = self.at_once(work)
        for at, value in enumerate(values):
            stored = veneer.load_peft_weights(folders[at])
            assert torch.equal(value, stored["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])


def test_two_adapters_with_a_copy_of_one_module_act_with_a_warning():
    model = veneer.get_peft_model(tiny.llama(), veneer.LoraConfig(modules_to_save=["lm_head"]), "a")
    model.add_adapter("b", veneer.LoraConfig(modules_to_save=["lm_head"]))
    model.add_adapter("c", veneer.LoraConfig())
    with pytest.warns(VeneerWarning, match="lm_head is trained in full .* the copy of 'b', .* that of a does not"):
        model.set_adapter(["a", "b"])
    model.set_adapter(["a", "c"])
    model.set_adapter(["b"])
