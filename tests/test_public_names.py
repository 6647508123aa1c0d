import inspect
import subprocess
import sys

import pytest

import veneer

LIGHT = """
import sys
import veneer
veneer.__version__
{then}
print(sorted(name for name in ("torch", "transformers", "huggingface_hub", "peft") if name in sys.modules))
"""


def loaded_by(then: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", LIGHT.format(then=then)], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def test_all_is_sorted_and_without_repetition():
    assert list(veneer.__all__) == sorted(set(veneer.__all__))
    assert dir(veneer) == list(veneer.__all__)


def test_all_names_everything_that_is_loaded_on_use():
    assert set(veneer.__all__) == {*veneer._HOMES, "__version__"}


@pytest.mark.parametrize("name", veneer.__all__)
def test_each_name_can_be_imported(name):
    assert getattr(veneer, name) is not None


@pytest.mark.parametrize("name", [name for name in veneer.__all__ if name != "__version__"])
def test_each_name_says_what_it_is(name):
    assert inspect.getdoc(getattr(veneer, name))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'veneer' has no attribute 'LoraConfg'"):
        _ = veneer.LoraConfg


def test_the_version_is_the_distribution_s():
    assert veneer.__version__.count(".") == 2


@pytest.mark.parametrize("then", ["", "veneer.LoraConfig(r=4)", "import veneer.storage.header"])
def test_importing_the_package_loads_nothing_heavy(then):
    assert loaded_by(then) == "[]"


def test_what_attaches_an_adapter_loads_torch_and_no_library_of_models():
    assert loaded_by("from veneer import LoraConfig, get_peft_model") == "['torch']"
