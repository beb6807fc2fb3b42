"""Cross-entropy over items against its peers: value, + backward, + double backward.

Targets are soft embeddings, as in the inner loop, with items frozen or trained; or item ids, as in the outer loss.
"""

from __future__ import annotations

import functools

import pytest
import torch
from measuring import differentiated
from peers import ITEM_CROSS_ENTROPY, LINEAR_CROSS_ENTROPY, chunked_cross_entropy

from td3_fast.ops import kept_score_bytes

ALL = [(rows, n, d) for n in (3_700, 100_000, 1_000_000) for rows in (50, 100, 2500) for d in (32, 64, 128)]
PEERS = ITEM_CROSS_ENTROPY | LINEAR_CROSS_ENTROPY
PARAMETERS = {
    # rows, items, d; the first is what an inner step of ml-100k asks for
    "size": {
        "small": [(50, 1_683, 32), (100, 20_000, 64)],
        "acceptance": [(100, 100_000, 64)],
        "acceptance cuda": [(100, 100_000, 64), (100, 1_000_000, 64), (2500, 1_000_000, 64)],
        "full": ALL,
        "full cuda": [*ALL, *((rows, 10_000_000, d) for rows in (50, 100, 2500) for d in (32, 64, 128))],
    },
    "target": ["soft, items frozen", "soft, items trained", "ids, items trained"],
    "order": [0, 1, 2],
    "variant": list(PEERS),
}
ORDERS = ["forward", "+ backward", "+ double backward"]
DENSE_COPIES = (2, 3, 6)


def flops(size: tuple[int, int, int], order: int, *, trained: bool, kept: float) -> float:
    """Of the products that the fused kernels make, in units of rows x items x d products.

    The forward pass: scores, and once differentiated the expected item row, which is the gradient towards
    hidden. Trained items: scores and their gradient. Second order: scores, u and the gradient towards hidden;
    trained, scores and the expected cotangent (2), scores and the two parts of u (3), and three gradients. Scores
    of the share of rows whose probabilities are `kept` are made in the forward pass alone.
    """
    rows, n, d = size
    first = 2 + trained * (2 - kept)
    second = 8 - 2 * kept if trained else 3
    return 2 * rows * n * d * (1, first, first + second)[order]


def make_run(function, size, target, order, dtype, device, *, compute=None):
    """`compute` is the dtype that the same values are worked on in."""
    rows, n, d = size
    generator = torch.Generator().manual_seed(0)

    def values(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype).to(compute or dtype)

    hidden, items, soft = (values(count, d, scale=d**-0.5) for count in (rows, n, rows))
    ids = torch.randint(n, (rows,), generator=generator).to(device)
    is_soft = target.startswith("soft")
    first = [hidden] if target.endswith("frozen") else [hidden, items]
    return differentiated(
        function,
        order,
        [hidden, items, soft if is_soft else ids],
        first=first,
        second=[*first, soft] if is_soft else first,
        upstream=None,
        cotangents=[values(*x.shape) for x in first],
    )


@functools.lru_cache(maxsize=1)
def expected_results(size, target, order, dtype, device):
    return make_run(chunked_cross_entropy, size, target, order, dtype, device, compute=torch.float32)()


def test_item_cross_entropy(size, dtype, target, order, variant, device, measure, check_peer):
    rows, n, d = size
    if variant in LINEAR_CROSS_ENTROPY and target.startswith("soft"):
        pytest.skip("takes item ids alone")
    peer = PEERS[variant]
    trained = target.endswith("trained")
    on_cpu = trained and device.type == "cpu"
    kept = min(kept_score_bytes(rows, n, d, 4, dtype.itemsize) / (rows * n * 4), 1.0) if on_cpu else 0.0
    check_peer(peer, order=order, dense_bytes=rows * n * dtype.itemsize * DENSE_COPIES[order])
    run, run_fused = (
        make_run(PEERS[name].function, size, target, order, dtype, device) for name in (variant, "fused")
    )
    measure(
        f"item_cross_entropy {rows} x {n} x {d} {str(dtype).removeprefix('torch.')}, {target}, {ORDERS[order]}",
        variant,
        run,
        run_fused,
        expected_results(size, target, order, dtype, device),
        dtype=dtype,
        flops=flops(size, order, trained=trained, kept=kept),
        compiled=peer.compiled,
    )
