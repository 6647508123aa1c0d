"""What the processes of a run, its ranks, agree upon before they go on together.

It goes through the store by which they found each other, not through collectives: it works whatever the backend, and
also where one rank is not where the others are, which in a collective would be a hang.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from veneer.errors import RankError, bullet_list, shortened

PATIENCE = 300.0  # seconds; less than the time after which torch gives up a collective
_MEETINGS: Counter[tuple[int, ...]] = Counter()
_LEFT: dict[tuple[int, ...], list[str]] = {}  # the keys that this rank has set and not yet taken back


@contextmanager
def all_ranks(what: str, ranks: Sequence[int] | None = None, *, seconds: float = PATIENCE) -> Iterator[None]:
    """Within the block each rank does its own part, without collectives; if one fails, all of them raise.

        with all_ranks("reading the data"):
            rows = read(file_of_this_rank)

    what     what they do, for the error
    ranks    the ranks that take part; None: all
    seconds  to wait for the others, from when this one is done

    The rank that failed raises its own error, the others RankError that tells it; so does every rank if one of them
    does not come in time, or is somewhere else. Without a process group there is one rank, and nothing to agree upon.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    try:
        _meet(what, ranks, failure, seconds)
    except RankError:
        if failure is None:
            raise
    if failure is not None:
        raise failure


def told_by_first(what: str, value: Any, ranks: Sequence[int] | None = None, *, seconds: float = PATIENCE) -> Any:
    """What the first rank has for `value`, which must be JSON. Raises RankError."""
    ranks = _taking_part(ranks)
    if len(ranks) == 1:
        return value
    key = _new_meeting(ranks)
    if dist.get_rank() == ranks[0]:
        _leave(ranks, f"{key}/{ranks[0]}", value)
        return value
    if _absent(key, ranks[:1], seconds):
        raise RankError(_did_not_come(what, ranks[:1], seconds))
    return json.loads(_store().get(f"{key}/{ranks[0]}"))


def is_first(ranks: Sequence[int] | None = None) -> bool:
    """Whether this is the first of these ranks, the one that writes files."""
    ranks = _taking_part(ranks)
    return len(ranks) == 1 or dist.get_rank() == ranks[0]


def _taking_part(ranks: Sequence[int] | None) -> list[int]:
    if not (dist.is_available() and dist.is_initialized()):
        return [0]
    return list(range(dist.get_world_size())) if ranks is None else list(ranks)


def _meet(what: str, ranks: Sequence[int] | None, failure: Exception | None, seconds: float) -> None:
    """Come together; the first rank hears all others and tells what came of it. Raises RankError."""
    ranks = _taking_part(ranks)
    if len(ranks) == 1:
        return
    key, me, store = _new_meeting(ranks), dist.get_rank(), _store()
    before = _LEFT.pop(tuple(ranks), [])
    said = {"what": what, "failure": None if failure is None else f"{type(failure).__name__}: {failure}"}
    _leave(ranks, f"{key}/{me}", said)
    if me == ranks[0]:
        absent = _absent(key, ranks, seconds)
        heard = {rank: json.loads(store.get(f"{key}/{rank}")) for rank in ranks if rank not in absent}
        verdict = _verdict(what, heard, absent, seconds)
        _leave(ranks, f"{key}/verdict", verdict)
    elif _absent(key, ranks[:1], seconds) or _absent(key, ["verdict"], seconds + 30):
        raise RankError(_did_not_come(what, ranks[:1], seconds))
    else:
        verdict = json.loads(store.get(f"{key}/verdict"))
    if verdict is not None:
        raise RankError(verdict)
    for old in before:  # all are here, so all have read what was said before
        store.delete_key(old)


def _verdict(what: str, heard: Mapping[int, Mapping[str, Any]], absent: list[Any], seconds: float) -> str | None:
    """What every rank is told to raise; None if all is well."""
    failed = [f"rank {rank}: {said['failure']}" for rank, said in heard.items() if said["failure"]]
    if failed:
        return bullet_list(f"Stopped while {what}, for another process of this run failed:", shortened(failed))
    if absent:
        return _did_not_come(what, absent, seconds)
    elsewhere = [f"rank {rank} is at: {said['what']}" for rank, said in heard.items() if said["what"] != what]
    if elsewhere:
        headline = f"The processes of this run are not at the same place. The first one is at: {what}. Call it on all:"
        return bullet_list(headline, shortened(elsewhere))
    return None


def _did_not_come(what: str, absent: Sequence[Any], seconds: float) -> str:
    who = ", ".join(map(str, shortened(list(map(str, absent)))))
    return (
        f"Stopped while {what}: rank {who} did not come within {seconds:g} seconds. Every process of the run must make "
        "this call (not only the first: no `if rank == 0:` around it), or one has ended; its own output says why."
    )


def _new_meeting(ranks: list[int]) -> str:
    """Where in the store this meeting of these ranks is, the next one each time."""
    if dist.get_rank() not in ranks:
        raise RankError(f"This process is rank {dist.get_rank()}, which is not among those of the mesh: {ranks}.")
    _MEETINGS[tuple(ranks)] += 1
    return f"veneer/{ranks[0]}-{ranks[-1]}-{len(ranks)}/{_MEETINGS[tuple(ranks)]}"


def _leave(ranks: list[int], key: str, value: Any) -> None:
    _store().set(key, json.dumps(value))
    _LEFT.setdefault(tuple(ranks), []).append(key)


def _absent(key: str, names: Sequence[Any], seconds: float) -> list[Any]:
    """Which of these have left no word there in time."""
    store = _store()
    try:
        store.wait([f"{key}/{name}" for name in names], timedelta(seconds=seconds))
    except dist.DistStoreError:  # it took too long
        return [name for name in names if not store.check([f"{key}/{name}"])]
    return []


def _store() -> Any:
    """The store of the process group, for which torch has no public name."""
    return dist.distributed_c10d._get_default_store()
