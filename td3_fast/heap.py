"""What the C library keeps of memory that was given back to it."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from pathlib import Path

KEPT = 256 * 2**20  # bytes that a process may grow by before its holes are looked for
STATUS = Path("/proc/self/statm")


class HeapTrimmer:
    """Gives freed memory back to the system whenever the process has grown by more than `KEPT` bytes since.

    For loops whose tensors differ in size from one round to the next: freed blocks then seldom fit what is asked for
    next, aligned as PyTorch has it, and the heap grows by holes. BERT4Rec's training on ml-100k, where a batch masks
    as many items as the draw has it, came to 4.5 GB, of which 130 MiB were in use. Where there is no glibc, or no
    /proc, nothing is done.
    """

    def __init__(self) -> None:
        self._trim = _malloc_trim() if STATUS.exists() else None
        self._before = self._resident()

    def __call__(self) -> None:
        if self._trim is not None and self._resident() - self._before > KEPT:
            self._trim(0)
            self._before = self._resident()

    def _resident(self) -> int:
        return 0 if self._trim is None else int(STATUS.read_text().split()[1]) * mmap.PAGESIZE


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, another system
        return None
