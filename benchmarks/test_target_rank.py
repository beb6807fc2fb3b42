"""Full-catalogue ranks with the users' histories left out, in float32."""

from __future__ import annotations

import torch
from peers import CHUNK_BYTES, Peer

from td3_fast import ops

PARAMETERS = {
    # users, items, d
    "size": {
        "small": [(1_000, 3_700, 64), (1_000, 20_000, 64)],
        "acceptance": [(1_000, 100_000, 64)],
        "full": [(6_000, 3_700, 64), (10_000, 100_000, 64), (1_000, 1_000_000, 64)],
    },
    "variant": ["fused", "dense eager", "chunked eager"],
}
HISTORY = 50


def make_run(variant, size, device):
    users, n, d = size
    generator = torch.Generator().manual_seed(0)
    # Small integers: scores, and so ranks, are exact in any order of summation.
    hidden, items = (
        torch.randint(-3, 4, (rows, d), generator=generator).float().to(device) for rows in (users, n)
    )
    target = torch.randint(1, n, (users,), generator=generator).to(device)
    history = torch.randint(1, n, (users, HISTORY), generator=generator).to(device)

    def ranks(begin, end, backend):
        rows = slice(begin, end)
        offsets = torch.arange(0, len(target[rows]) * HISTORY + 1, HISTORY, device=device)
        excluded = offsets, history[rows].flatten()
        return ops.target_rank(hidden[rows], items, target[rows], excluded=excluded, backend=backend)

    def run():
        if variant == "fused":
            return (ranks(0, users, "fused"),)
        size = max(1, CHUNK_BYTES[device.type] // (4 * n)) if variant == "chunked eager" else users
        return (torch.cat([ranks(begin, begin + size, "reference") for begin in range(0, users, size)]),)

    return run


def test_target_rank(size, variant, device, measure, check_peer):
    users, n, d = size
    check_peer(
        Peer(function=ops.target_rank, dense=variant == "dense eager"), order=0, dense_bytes=users * n * 6
    )
    measure(
        f"target_rank {users} x {n} x {d} float32",
        variant,
        make_run(variant, size, device),
        make_run("fused", size, device),
        make_run("chunked eager", size, device)(),
        flops=2 * users * n * d,
    )
