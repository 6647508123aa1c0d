"""How a process that talked over gloo ends."""

import time
from pathlib import Path

_THREADS = Path("/proc/self/task")
_NAME = "pt_gloo_runloop"


def wait_for_gloo(seconds: float = 60) -> None:
    """Wait until gloo's threads have let go of the last collective's tensors. The last act of a program that used it.

    A thread of torch's that drops a tensor made in Python needs the interpreter. Where that has begun to end, Python
    before 3.14 ends the thread instead, in the middle of a destructor: "terminate called without an active exception",
    and a run that had finished counts as failed. `destroy_process_group` joins the threads only if nothing holds the
    group any more, and caches of torch's DTensor do. Only Linux tells what a thread does; elsewhere it waits a moment.

    seconds: to wait at most.
    """
    until = time.monotonic() + seconds
    before = _at_work()
    while time.monotonic() < until:
        time.sleep(0.005)  # the interpreter is free: a thread that wants it gets it, and is seen to have run
        now = _at_work()
        if now == before and all(state == "S" for state, _ in now.values()):
            return
        before = now


def _at_work() -> dict[str, tuple[str, str]]:
    """What each of gloo's threads does, S for asleep, and how often it fell asleep so far."""
    found = {}
    for status in _THREADS.glob("*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:  # it ended meanwhile
            continue
        if lines["Name"].strip() == _NAME:
            found[status.parent.name] = (lines["State"].split()[0], lines["voluntary_ctxt_switches"].strip())
    return found
