from __future__ import annotations

import pytest
import torch

from td3_fast import heap
from td3_fast.heap import HeapTrimmer

GLIBC = pytest.mark.skipif(
    heap._malloc_trim() is None or not heap.STATUS.exists(), reason="needs glibc and /proc"
)
BLOCK = 2**16  # bytes, fewer than those that are mapped on their own


@GLIBC
def test_what_is_freed_between_blocks_in_use_goes_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "KEPT", 64 * 2**20)
    heap._malloc_trim()(0)  # or the blocks take what earlier tests left, and the process does not grow
    trim = HeapTrimmer()
    before = trim._resident()
    blocks = [torch.ones(BLOCK, dtype=torch.uint8) for _ in range(2048)]
    in_use = blocks[::64]
    del blocks
    left = trim._resident() - before
    trim()
    assert trim._resident() - before < left - 64 * 2**20
    assert all(bool(block.all()) for block in in_use)


@GLIBC
def test_a_process_that_has_not_grown_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: int) -> int:
        raise AssertionError("trimmed")

    monkeypatch.setattr(heap, "_malloc_trim", lambda: never)
    HeapTrimmer()()


def test_without_glibc_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_malloc_trim", lambda: None)
    monkeypatch.setattr(heap, "KEPT", -1)
    HeapTrimmer()()
