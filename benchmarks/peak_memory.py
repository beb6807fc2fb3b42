"""Peak memory of one op on the CPU, beside what its inputs, outputs and gradients take.

    python benchmarks/peak_memory.py soft_embedding 2500 1000000 64

prints, for each order in a process of its own, what the tensors take that the caller asked for, how far resident
memory rose above that of the process before it made its inputs, what is allowed (1.1 times the former and 32 MiB), and
the whole process at its peak. Linux alone tells.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator

import torch
from measuring import MIB, forget_peak, resident
from torch import Tensor

from td3_fast import ops

OPS = ("soft_embedding", "item_cross_entropy")
ORDERS = ("forward", "+ backward", "+ double backward")
ALLOWED_FACTOR, ALLOWED_MORE = 1.1, 32 * MIB


def total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def run(op: str, rows: int, n: int, d: int, order: int) -> Iterator[tuple[Tensor, ...]]:
    """The op's inputs, its outputs, and what each order adds: cotangents and gradients in every input."""
    counts = (rows, n, n) if op == "soft_embedding" else (rows, n, rows)
    inputs = tuple(torch.randn(count, d).mul_(d**-0.5).requires_grad_(order > 0) for count in counts)
    yield inputs
    outputs = ops.soft_embedding(*inputs) if op == "soft_embedding" else (ops.item_cross_entropy(*inputs),)
    yield tuple(outputs)
    if order == 0:
        return
    upstream = tuple(torch.randn_like(x).requires_grad_(order > 1) for x in outputs)
    first = torch.autograd.grad(outputs, inputs, upstream, create_graph=order > 1)
    yield upstream + first
    if order == 1:
        return
    cotangents = tuple(torch.randn_like(x) for x in first)
    yield cotangents + torch.autograd.grad(first, (*inputs, *upstream), cotangents)


def measure_here(op: str, rows: int, n: int, d: int, order: int) -> dict[str, int]:
    """Bytes: `tensors` that the caller asked for, `peak` above the process before, `allowed`, whole `process`."""
    for _ in run(op, 64, 256, d, order):  # libraries, threads
        pass
    before = forget_peak()
    asked_for = [x for step in run(op, rows, n, d, order) for x in step]
    tensors, highest = total_bytes(asked_for), resident("VmHWM")
    return {
        "tensors": tensors,
        "peak": highest - before,
        "allowed": int(ALLOWED_FACTOR * tensors) + ALLOWED_MORE,
        "process": highest,
    }


def measure(op: str, rows: int, n: int, d: int, order: int) -> dict[str, int]:
    """`measure_here` in a process of its own, so that no earlier call has left memory at hand."""
    command = [sys.executable, __file__, op, *map(str, (rows, n, d)), "--order", str(order), "--json"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output)


def describe(op: str, rows: int, n: int, d: int, order: int, figures: dict[str, int]) -> str:
    sizes = ", ".join(f"{name} {value / MIB:.0f}" for name, value in figures.items())
    return f"{op} {rows} x {n} x {d}, {ORDERS[order]}, MiB: {sizes}; S once: {rows * n * 4 / MIB:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of one op on the CPU.")
    parser.add_argument("op", choices=OPS)
    for name in ("rows", "n", "d"):
        parser.add_argument(name, type=int)
    parser.add_argument("--order", type=int, choices=[0, 1, 2], help="this order alone")
    parser.add_argument("--json", action="store_true", help="of --order, in this process")
    given = parser.parse_args()
    case = given.op, given.rows, given.n, given.d
    if given.json:
        print(json.dumps(measure_here(*case, given.order)))
        return
    for order in [0, 1, 2] if given.order is None else [given.order]:
        print(describe(*case, order, measure(*case, order)), flush=True)


if __name__ == "__main__":
    main()
