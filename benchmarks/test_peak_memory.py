"""No order takes more than 1.1 times its inputs, outputs and gradients, and 32 MiB. See peak_memory.py."""

from __future__ import annotations

import pytest
from measuring import RESET_PEAK
from peak_memory import OPS, describe, measure

PARAMETERS = {
    "size": {
        "small": [(2500, 20_000, 64)],
        "acceptance": [(100, 100_000, 64), (2500, 100_000, 64)],
        # The last takes minutes on two cores.
        "full": [(2500, 3_700, 64), (100, 1_000_000, 64), (2500, 1_000_000, 64)],
    },
    "op": list(OPS),
    "order": [0, 1, 2],
}
PROCESS_BYTES = 4 << 30


@pytest.mark.skipif(not RESET_PEAK.exists(), reason="peak memory is read from /proc")
def test_peak_memory(op, size, order, note):
    figures = measure(op, *size, order)
    note(describe(op, *size, order, figures))
    assert figures["peak"] <= figures["allowed"]
    assert figures["process"] <= PROCESS_BYTES
