"""What the benchmarks measure with: clocks, peak memory, the rate of a matrix product, derivatives of a peer."""

from __future__ import annotations

import ctypes
import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

STATUS = Path("/proc/self/status")
RESET_PEAK = Path("/proc/self/clear_refs")
MIB = 2**20
Result = TypeVar("Result")


class Moment:
    """A point of the GPU's own time; the difference of two is in seconds. A clock for pytest-benchmark.

    The host does not wait between two moments, so launches overlap with what runs before them.
    """

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def __sub__(self, earlier: Moment) -> float:
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


def clock(device: torch.device) -> Callable[[], object]:
    return Moment if device.type == "cuda" else time.perf_counter


def seconds(run: Callable[[], object], device: torch.device) -> float:
    now = clock(device)
    before = now()
    run()
    return now() - before


def resident(field: str) -> int:
    """A line of the process's memory status, in bytes: VmRSS as it is, VmHWM at its highest."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> int:
    """Let VmHWM count from now; returns the memory in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before and not given back would be at hand for free
    RESET_PEAK.write_text("5")
    return resident("VmRSS")


def with_peak(run: Callable[[], Result], device: torch.device) -> tuple[Result, float | None]:
    """The results of a call, and the MiB it adds at its peak to what is in use before.

    On a GPU these are the bytes of PyTorch's allocator; on the CPU the resident memory of the process, which also
    counts what libraries allocate for themselves. None where the system does not tell (only Linux does).
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run()
        torch.cuda.synchronize()
        return results, (torch.cuda.max_memory_allocated() - before) / MIB
    if not RESET_PEAK.exists():
        return run(), None
    before = forget_peak()
    results = run()
    return results, (resident("VmHWM") - before) / MIB


def available_bytes(device: torch.device) -> int:
    """Memory that a benchmark may fill."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype, group: str) -> float:
    """Floating-point operations a second of the faster of two large products, the median of three.

    Measured anew for every `group`; the highest of a run is the machine's.
    """
    rates = []
    for size in (4096, 8192) if device.type == "cuda" else (1024, 2048):
        a = torch.randn(size, size, device=device, dtype=dtype)
        torch.mm(a, a)
        taken = statistics.median(seconds(lambda a=a: torch.mm(a, a), device) for _ in range(3))
        rates.append(2 * size**3 / taken)
    return max(rates)


def differentiated(
    function: Callable[..., Tensor],
    order: int,
    inputs: Sequence[Tensor],
    *,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    upstream: Tensor | None,
    cotangents: Sequence[Tensor],
) -> Callable[[], tuple[Tensor, ...]]:
    """A call of `function` and of its derivatives up to `order`, from the beginning.

    Order 0 is the value alone, 1 adds its gradients towards `first`, 2 the gradients of those, weighted by
    `cotangents`, towards `second`.
    """
    for x in {*first, *second}:
        x.requires_grad_(order > 0)

    def run() -> tuple[Tensor, ...]:
        value = function(*inputs)
        if order == 0:
            return (value,)
        gradients = torch.autograd.grad(value, first, upstream, create_graph=order > 1)
        if order == 1:
            return value.detach(), *gradients
        return torch.autograd.grad(gradients, second, cotangents)

    return run
