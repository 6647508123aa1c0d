"""The processes of a run, one a device: who is the first, what they agree on, and how they end together.

torchrun, `accelerate launch` and `veneer train --launch` start one process a device, each with its number (its rank)
in the environment. All of them read, check and load the same things; the first alone speaks and writes files. What one
of them finds wrong before training ends all of them with that error, said once; and a process that fails later leaves
a note for the others, so that they do not tell how they lost it.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from platform import node
from typing import Any, TypeVar

from veneer.errors import RunError, VeneerError
from veneer.train import zero

T = TypeVar("T")

_NOTE = "veneer/failed"
_OTHERS_NOTICE = 2.0  # seconds in which a process that fails has left its note, even if another notices first
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "ncclRemoteError")
FAILED, INTERRUPTED = 2, 130  # exit codes


class FailedElsewhere(RunError):
    """Another process of the run says what is wrong."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run. What takes others must be called by all of them."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """What each process has, in their order."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until all are here."""
        self.gather(None)

    def agree(self, check: Callable[[], T]) -> T:
        """What `check` returns, once it has returned in all processes.

        Where it raised in some, the first of those raises its error, naming itself if others found nothing wrong, and
        all others FailedElsewhere.
        """
        if self.count == 1:
            return check()
        found, problem = None, None
        try:
            found = check()
        except Exception as error:
            problem = error
        failed = [at for at, wrong in enumerate(self.gather(problem is not None)) if wrong]
        if not failed:
            return found  # type: ignore
        if problem is None or self.rank != failed[0]:
            raise FailedElsewhere(f"Process {failed[0]} of {self.count} says what is wrong.")
        if len(failed) < self.count and isinstance(problem, VeneerError):
            raise type(problem)(f"In process {self.rank} of {self.count}, on {node()}: {problem}") from problem
        raise problem

    def first_does(self, act: Callable[[], T]) -> T:
        """What the first process gets from `act`, which it alone calls; its error ends all."""
        made = self.agree(lambda: act() if self.is_first else None)
        return self.gather(made)[0]

    def must_equal(self, value: Any, what: str) -> None:
        """Raise RunError in each process if they have different values of `what`."""
        found = self.gather(value)
        other = next((at for at, one in enumerate(found) if one != found[0]), None)
        if other is not None:
            raise RunError(
                f"{what} differ between process 0 and process {other} of {self.count}. All must see the same files: "
                "use a folder that all machines share, or equal copies."
            )


def number() -> int:
    """How many processes the environment says the run has."""
    said = os.environ.get("WORLD_SIZE", "1")
    return int(said) if said.isdecimal() else 1


def is_first() -> bool:
    """Whether the environment says that this is the first process, or the only one."""
    return os.environ.get("RANK", "0") in ("0", "") or number() == 1


def join() -> Ranks:
    """Meet the other processes, if there are any; accelerate chooses device and backend."""
    if number() == 1:
        return Ranks()
    if zero.in_use():
        zero.make_ready(cpu=on_cpu())
    from accelerate import PartialState

    how: dict[str, Any] = {"cpu": on_cpu(), **_store_of_attempt()}
    if zero.in_use():
        if "store" in how:  # which DeepSpeed does not pass on; it takes the group that there is
            import torch.distributed as dist

            dist.init_process_group(backend(), timeout=timedelta(minutes=60), **_store_of_attempt())
        how = {"backend": backend()}  # DeepSpeed knows CPUs itself; accelerate has to be told what they talk by
    state = PartialState(timeout=timedelta(minutes=60), **how)
    return Ranks(state.process_index, state.num_processes)


def _store_of_attempt() -> dict[str, Any]:
    """Where processes meet that torchrun has started again: it keeps its store, with the addresses of those that ended.

    Under keys of its own an attempt finds none of them.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    import torch.distributed

    dist: Any = torch.distributed  # which exports stores by other names than it documents

    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*where, world_size=number(), is_master=False, timeout=timedelta(minutes=60))
    return {
        "store": dist.PrefixStore(f"veneer/attempt_{attempt}", store),
        "rank": int(os.environ["RANK"]),
        "world_size": number(),
    }


def on_cpu() -> bool:
    """Whether the processes of a run share the CPU: there is no accelerator whose kind can talk to others of it."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
        return True
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device is None or device.type == "mps"


def backend() -> str | None:
    """What the processes of a run under DeepSpeed talk by; None where accelerate finds it by the devices."""
    return "gloo" if on_cpu() else None


def shards_model() -> str | None:
    """What cuts the base into shards in this run: "FSDP", "ZeRO-3" or None, as accelerate's environment says."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        return "FSDP"
    return "ZeRO-3" if zero.stage() == 3 else None


def each_loads_all(init: bool | str) -> None:
    """Let every process read the base where the adapter's start is made from its weights.

    By default only the first process of a machine does under FSDP, and the others would start from empty memory.
    """
    if shards_model() == "FSDP" and init not in (True, False, "gaussian"):
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def lost_another(error: BaseException) -> bool:
    """Whether an error says no more than that another process is gone."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)


@contextmanager
def ending_together(report: Callable[[BaseException], int]) -> Iterator[None]:
    """Within the block a run is trained. The process ends with the others, and one of them alone tells of a failure.

    report  prints an error and returns the exit code. Not called in a run of one process, whose errors pass through.
    """
    if number() == 1:
        yield
        return
    try:
        yield
    except BaseException as error:
        code = report(error) if _is_ours_to_tell(error) else FAILED
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # at once: the others may never answer again, and a backend would wait for them
    _leave()


def _is_ours_to_tell(error: BaseException) -> bool:
    """Whether this process is the first to tell why the run ends. The first alone tells that it was interrupted."""
    if isinstance(error, FailedElsewhere):
        return False
    with suppress(Exception):
        return _note(error)
    return True  # no store to leave a note in


def _note(error: BaseException) -> bool:
    from torch.distributed.distributed_c10d import _get_default_store

    store, mine = _get_default_store(), os.environ.get("RANK", "0")
    if isinstance(error, KeyboardInterrupt):
        store.compare_set(_NOTE, "", "all")
        return mine == "0"
    if lost_another(error) or (isinstance(error, RunError) and isinstance(error.__cause__, RuntimeError)):
        until = time.monotonic() + _OTHERS_NOTICE
        while time.monotonic() < until and not store.check([_NOTE]):
            time.sleep(0.05)
    told_by = store.compare_set(_NOTE, "", mine).decode()
    return told_by == mine or (told_by == "all" and mine == "0")


def _leave() -> None:
    """End a run that went well: nothing is under way, so all can go."""
    import torch.distributed as dist

    from veneer.distributed.gloo import wait_for_gloo

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    wait_for_gloo()
