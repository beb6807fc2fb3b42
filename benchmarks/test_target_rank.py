"""Full-catalogue ranks with the users' histories left out, dense eager against the fused kernels, in float32."""

import pytest
import torch

from td3_fast import ops

# users, items, d
SIZES = {
    "small": [(1_000, 3_700, 64), (1_000, 20_000, 64)],
    "full": [(6_000, 3_700, 64), (10_000, 100_000, 64), (1_000, 1_000_000, 64)],
}
DENSE_BYTES = 4 << 30
HISTORY = 50


def make_run(size, backend, device):
    users, n, d = size
    generator = torch.Generator().manual_seed(0)
    # Small integers: scores, and so ranks, are exact in any order of summation.
    hidden, items = (
        torch.randint(-3, 4, (rows, d), generator=generator).float().to(device) for rows in (users, n)
    )
    target = torch.randint(1, n, (users,), generator=generator).to(device)
    offsets = torch.arange(0, (users + 1) * HISTORY, HISTORY).to(device)
    history = torch.randint(1, n, (users * HISTORY,), generator=generator).to(device)
    return lambda: (ops.target_rank(hidden, items, target, excluded=(offsets, history), backend=backend),)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_target_rank(backend, size, device, measure, benchmark):
    users, n, d = size
    dense = users * n * 5 <= DENSE_BYTES
    if backend == "reference" and not dense:
        pytest.skip("dense tensors of users x items are too large")
    benchmark.group = f"target_rank {users}x{n}x{d}"
    run = make_run(size, backend, device)
    expected = make_run(size, "reference", device)() if dense else run()
    measure(run, expected, tolerance=1e-12)
