"""What is freed stays with the process inside the block, and goes back after it."""

import os
import subprocess
import sys

import pytest
import torch

from veneer.train import freed_memory

SIZE = 2**26  # bytes


class Recorded:
    def __init__(self, most=2**40):
        self.said, self.most = [], most

    def mallopt(self, option, value):
        self.said.append((option, value))
        return not (option == -3 and value > self.most)

    def malloc_trim(self, pad):
        self.said.append("trim")


@pytest.mark.skipif(freed_memory._glibc() is None, reason="another C library than glibc")
def test_memory_that_was_freed_is_had_again_without_asking_for_it(monkeypatch):
    import resource

    for name in freed_memory._SAID_BY_USER:
        monkeypatch.delenv(name, raising=False)

    def faults() -> int:
        torch.empty(SIZE + 2**20, dtype=torch.int8).fill_(1)  # a little more, as what is around a block differs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(SIZE, dtype=torch.int8).fill_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    usual = faults()
    with freed_memory.kept():
        assert faults() < usual / 2
    assert faults() > usual / 2


@pytest.mark.skipif(freed_memory._glibc() is None, reason="another C library than glibc")
@pytest.mark.parametrize("mebibytes", [3, 60, 600])
def test_little_more_is_held_than_a_step_takes(mebibytes):
    program = f"""
import torch
from veneer.train import freed_memory

def resident():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) // 1024

before = resident()
with freed_memory.kept():
    for _ in range(6):
        blocks = [torch.empty({mebibytes} * 2**20, dtype=torch.int8).fill_(1) for _ in range(1200 // {mebibytes})]
        del blocks
    print(resident() - before)
"""
    told = {name: value for name, value in os.environ.items() if name not in freed_memory._SAID_BY_USER}
    done = subprocess.run([sys.executable, "-c", program], env=told, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.4 * 1200


def test_what_the_user_said_stands(monkeypatch):
    library = Recorded()
    monkeypatch.setattr(freed_memory, "_glibc", lambda: library)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    with freed_memory.kept():
        pass
    assert library.said == []


def test_it_ends_with_its_block_even_by_an_error(monkeypatch):
    library = Recorded()
    monkeypatch.setattr(freed_memory, "_glibc", lambda: library)
    for name in freed_memory._SAID_BY_USER:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ZeroDivisionError), freed_memory.kept():
        _ = 1 / (len(library.said) - 2)  # two things were said
    assert [option for option, _ in library.said[:4]] == [-3, -1, -1, -3]
    assert library.said[4] == "trim"


def test_older_versions_take_a_smaller_threshold(monkeypatch):
    library = Recorded(most=2**25)
    monkeypatch.setattr(freed_memory, "_glibc", lambda: library)
    for name in freed_memory._SAID_BY_USER:
        monkeypatch.delenv(name, raising=False)
    with freed_memory.kept():
        assert [value for option, value in library.said if option == -3] == [2**27, 2**25]


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(freed_memory, "_glibc", lambda: None)
    with freed_memory.kept():
        assert sys.modules
