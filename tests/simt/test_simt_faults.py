"""The shim finds the faults that it exists to find."""

import ctypes

import pytest
import torch


def run(library, which, source):
    out = torch.zeros(64)
    library.simt_faulty.restype = ctypes.c_char_p
    error = library.simt_faulty(which, ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(source.data_ptr()))
    return out, None if error is None else error.decode()


@pytest.mark.parametrize("reverse", [0, 1])
def test_a_missing_barrier_or_wait_gives_nan(simt, guarded, reverse):
    source = guarded(torch.arange(64.0))
    simt.simt_reverse(reverse)
    for sound, faulty, expected in ((0, 1, source.roll(-1)), (2, 3, source)):
        out, error = run(simt, sound, source)
        assert error is None
        assert torch.equal(out, expected)
        out, error = run(simt, faulty, source)
        assert error is None
        assert out.isnan().any()


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (4, "thread 0 of block (0, 0): block barrier; from thread 40 of block (0, 0): left the kernel"),
        (5, "shuffle_xor"),
        (6, "thread 63 of block (0, 0) leaves the shared memory"),
        (7, "thread 63 of block (0, 0) leaves the global memory"),
    ],
)
def test_what_cannot_go_on_is_named(simt, guarded, which, message):
    source = guarded(torch.arange(64.0))
    _, error = run(simt, which, source)
    assert message in error
    # The next launch starts afresh.
    assert torch.equal(run(simt, 0, source)[0], source.roll(-1))
