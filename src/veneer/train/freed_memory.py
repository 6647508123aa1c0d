"""Freed memory that stays with the process while it trains, on a CPU under glibc.

Each step makes and frees the same activations. As it comes, glibc gives large blocks back to the system as soon as
they are freed, and gets them anew, page by page and each page cleared, in the next step.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# mallopt(3)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_SAID_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_KEPT = -1  # bytes at the end of the heap before any are given back: however many
# Bytes from which on a block comes from the system by itself, and goes back: glibc (2.36) often does not put a block of
# torch's where one as large was, which with blocks of 900 MiB came to four times the memory.
_LARGE = 2**27
_KEPT_AFTER, _LARGE_AFTER = 2**26, 2**25  # what glibc itself comes to, once a large block was freed


@contextmanager
def kept() -> Iterator[None]:
    """Inside the block, what is freed stays for what comes next; afterwards it goes back to the system.

    Does nothing where the C library knows no such thing (macOS, Windows, musl), or where the environment says what the
    allocator should do.
    """
    library = None if any(name in os.environ for name in _SAID_BY_USER) else _glibc()
    if library is None:
        yield
        return
    if not library.mallopt(_MMAP_THRESHOLD, _LARGE):  # before 2.35
        library.mallopt(_MMAP_THRESHOLD, _LARGE_AFTER)
    library.mallopt(_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        library.mallopt(_TRIM_THRESHOLD, _KEPT_AFTER)
        library.mallopt(_MMAP_THRESHOLD, _LARGE_AFTER)
        library.malloc_trim(0)


def _glibc() -> Any:
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None)
    return (
        library if all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim")) else None
    )
