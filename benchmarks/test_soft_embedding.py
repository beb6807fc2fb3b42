"""Soft embedding against its peers: value, + backward, + double backward in every input."""

from __future__ import annotations

import functools

import torch
from measuring import differentiated
from peers import SOFT_EMBEDDING, chunked_embedding

ALL = [(rows, n, d) for n in (3_700, 100_000, 1_000_000) for rows in (50, 100, 2500) for d in (32, 64, 128)]
PARAMETERS = {
    # rows, items, width of keys and of values
    "size": {
        "small": [(50, 3_700, 32), (100, 20_000, 64), (500, 20_000, 64)],
        "acceptance": [(100, 100_000, 64), (2500, 100_000, 64)],
        "acceptance cuda": [
            (100, 1_000_000, 64),
            (2500, 100_000, 64),
            (2500, 1_000_000, 64),
            (2500, 10_000_000, 64),
        ],
        "full": ALL,
        "full cuda": [*ALL, *((rows, 10_000_000, d) for rows in (50, 100, 2500) for d in (32, 64, 128))],
    },
    "order": [0, 1, 2],
    "variant": list(SOFT_EMBEDDING),
}
ORDERS = ["forward", "+ backward", "+ double backward"]
# Tensors of rows x items that a dense peer holds at once.
DENSE_COPIES = (2, 4, 9)


def flops(size: tuple[int, int, int], order: int) -> float:
    """Of the products that S is never formed without.

    Widths, rank + d: the forward pass 1 + 1; the backward 3 + 2 (scores, dQ, dK; w, dW); the row means 3 + 2
    (scores, u; w, s) and the pass after them as much again and 4 + 3 (its five gradients).
    """
    rows, n, d = size
    return 2 * rows * n * d * (2, 2 + 5, 2 + 5 + 17)[order]


def make_run(function, size, order, dtype, device, *, compute=None):
    """`compute` is the dtype that the same values are worked on in."""
    rows, n, d = size
    generator = torch.Generator().manual_seed(0)

    def values(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype).to(compute or dtype)

    inputs = [values(count, d, scale=d**-0.5) for count in (rows, n, n)]
    upstream = values(rows, d)
    cotangents = [values(*x.shape) for x in inputs]
    return differentiated(
        function,
        order,
        inputs,
        first=inputs,
        second=[*inputs, upstream],
        upstream=upstream,
        cotangents=cotangents,
    )


@functools.lru_cache(maxsize=1)
def expected_results(size, order, dtype, device):
    return make_run(chunked_embedding, size, order, dtype, device, compute=torch.float32)()


def test_soft_embedding(size, dtype, order, variant, device, measure, check_peer):
    rows, n, _ = size
    peer = SOFT_EMBEDDING[variant]
    check_peer(peer, order=order, dense_bytes=rows * n * dtype.itemsize * DENSE_COPIES[order])
    run, run_fused = (
        make_run(SOFT_EMBEDDING[name].function, size, order, dtype, device) for name in (variant, "fused")
    )
    measure(
        f"soft_embedding {rows} x {n} x {size[2]} {str(dtype).removeprefix('torch.')}, {ORDERS[order]}",
        variant,
        run,
        run_fused,
        expected_results(size, order, dtype, device),
        dtype=dtype,
        flops=flops(size, order),
        compiled=peer.compiled,
    )
