import threading
import time
from pathlib import Path

import pytest

from veneer.distributed import gloo


def task(folder: Path, name: str, state: str, switches: int, thread: str = "pt_gloo_runloop") -> None:
    (folder / name).mkdir(exist_ok=True)
    whole = folder / name / "new"
    whole.write_text(f"Name:\t{thread}\nState:\t{state} (what it means)\nvoluntary_ctxt_switches:\t{switches}\n")
    whole.replace(folder / name / "status")  # at once, as the kernel's


@pytest.fixture
def threads(tmp_path, monkeypatch):
    monkeypatch.setattr(gloo, "_THREADS", tmp_path)
    return tmp_path


def test_returns_at_once_where_no_thread_is_gloos(threads):
    task(threads, "1", "R", 7, thread="python")
    gloo.wait_for_gloo(seconds=30)


@pytest.mark.parametrize("state", ["R", "D"])
def test_waits_while_a_thread_has_work(threads, state):
    task(threads, "1", "S", 7)
    task(threads, "2", state, 7)
    waiting = threading.Thread(target=gloo.wait_for_gloo, args=(60,))
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive()
    task(threads, "2", "S", 8)
    waiting.join(30)
    assert not waiting.is_alive()


def test_a_thread_that_fell_asleep_again_was_awake(threads, monkeypatch):
    task(threads, "1", "S", 7)
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) < 4:
            task(threads, "1", "S", 7 + len(looks))

    monkeypatch.setattr(gloo.time, "sleep", sleep)
    gloo.wait_for_gloo(seconds=30)
    assert len(looks) == 4


def test_gives_up_in_time(threads):
    task(threads, "1", "R", 7)
    begun = time.monotonic()
    gloo.wait_for_gloo(seconds=0.2)
    assert time.monotonic() - begun >= 0.2
