import pytest

from veneer.config.init_names import DATA_DRIVEN, INIT_NAMES, OPTIONS_FIELD, SUBTRACTING, known_init, split_name
from veneer.config.sub_configs import SUB_CONFIGS
from veneer.errors import ConfigError
from veneer.init import _STATS, INITS


@pytest.mark.parametrize("name", INIT_NAMES)
def test_every_name_is_a_method(name):
    assert name in INITS
    assert split_name(name) == (name, None)
    assert known_init(name)


@pytest.mark.parametrize("number", [1, 4, 16, 999])
def test_pissa_may_have_a_number(number):
    assert split_name(f"pissa_niter_{number}") == ("pissa", number)
    assert known_init(f"pissa_niter_{number}")


@pytest.mark.parametrize(
    "value", ["pissa_niter_0", "pissa_niter_", "pissa_niter_-1", "pissa_niter_1.5", "pissa_niter_04", "pissa_niter_٣",
              "pissa_niter_1000", "pissa_niter_4\n", "pissa_iter_4", "olora_niter_4", "", "kaiming", "PiSSA"],
)  # fmt: skip
def test_names_that_are_none(value):
    assert not known_init(value)
    with pytest.raises(ConfigError):
        split_name(value)


@pytest.mark.parametrize("value", [None, 0, 1, 1.0, ["pissa"], b"pissa"])
def test_values_that_are_no_names(value):
    assert not known_init(value)


@pytest.mark.parametrize("value", [True, False])
def test_the_plain_starts(value):
    assert known_init(value)


def test_a_misspelt_name_is_recognised():
    with pytest.raises(ConfigError, match="did you mean 'lora_ga'"):
        split_name("lora-ga")
    with pytest.raises(ConfigError, match="whole number"):
        split_name("pissa_niter_x")


def test_the_lists_are_of_names_and_fields_that_exist():
    assert set(SUBTRACTING) | set(DATA_DRIVEN) | set(OPTIONS_FIELD) <= set(INIT_NAMES)
    assert set(_STATS) == set(DATA_DRIVEN)
    assert set(OPTIONS_FIELD.values()) == set(SUB_CONFIGS) - {"runtime_config"}
