"""Sizes, measurement and the table of a run.

`pytest benchmarks --benchmark-enable`; without that option results are checked and nothing is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NoReturn

import measuring
import pytest
import report
import torch
from peers import Peer
from torch import Tensor

from td3_fast import ops

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
# Seconds spent on the rounds of one benchmark, and the most there may be.
ROUNDS_SECONDS = 0.6
ROUNDS = 25
# Variants that get more than one round however long they take.
NAMED = ("fused", "dense eager")

ROWS = pytest.StashKey[list[report.Row]]()
NOTES = pytest.StashKey[list[str]]()


def find_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and ops.has_fused("cuda") else "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sizes",
        choices=["small", "acceptance", "full"],
        default="small",
        help="small: about five minutes on two cores; acceptance: those that targets are set for; full: all",
    )
    parser.addoption("--full", dest="sizes", action="store_const", const="full", help="--sizes full")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS], config.stash[NOTES] = [], []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`dtype` as the device has them, then PARAMETERS of the module, the last varying fastest; `size` by --sizes."""
    device = find_device()
    if "dtype" in metafunc.fixturenames:
        dtypes = [torch.float32, torch.bfloat16] if device.type == "cuda" else [torch.float32]
        metafunc.parametrize("dtype", dtypes, ids=lambda dtype: str(dtype).removeprefix("torch."))
    for name, values in getattr(metafunc.module, "PARAMETERS", {}).items():
        if name not in metafunc.fixturenames:
            continue
        if name == "size":
            sizes = metafunc.config.getoption("sizes")
            values = values.get(f"{sizes} {device.type}", values.get(sizes, []))
            metafunc.parametrize(name, values, ids=lambda size: "x".join(map(str, size)))
        else:
            metafunc.parametrize(name, values, ids=str)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if hasattr(item.module, "PARAMETERS"):
            item.add_marker(pytest.mark.benchmark(timer=measuring.clock(find_device())))
            if item.callspec.params.get("variant", "fused") != "fused":  # peers warn of their own affairs
                item.add_marker(pytest.mark.filterwarnings("ignore"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    device = find_device()
    machine_info["device"] = (
        torch.cuda.get_device_name() if device.type == "cuda" else machine_info["cpu"].get("brand_raw", "cpu")
    )
    machine_info["threads"] = torch.get_num_threads()
    machine_info["torch"] = torch.__version__
    machine_info["float32_matmul_precision"] = torch.get_float32_matmul_precision()
    machine_info["td3_fast"] = ops.build_facts()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows, notes = config.stash[ROWS], config.stash[NOTES]
    if rows:
        threads = torch.get_num_threads()
        terminalreporter.section(
            f"medians, {find_device().type}, {threads} threads, torch {torch.__version__}"
        )
        for line in report.table(rows):
            terminalreporter.write_line(line)
    for line in notes:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return find_device()


@pytest.fixture
def add_row(request: pytest.FixtureRequest) -> Callable[[report.Row], None]:
    """Adds a row to the table that is printed after the run."""
    return request.config.stash[ROWS].append


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line to what is printed after the run."""
    return request.config.stash[NOTES].append


@pytest.fixture
def check_peer(device: torch.device, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Skips where a peer cannot run: an order that it does not have, a device, tensors of rows x items too large."""

    def check(peer: Peer, *, order: int, dense_bytes: int) -> None:
        if device.type not in peer.devices:
            pytest.skip(f"not for {device.type}")
        if order > peer.order:
            pytest.skip("not differentiable that often")
        if peer.compiled and request.config.getoption("sizes") == "small":
            pytest.skip("compilation takes longer than the small sizes")
        if peer.dense and dense_bytes > 0.7 * measuring.available_bytes(device):
            pytest.skip("tensors of rows x items do not fit")

    return check


def number_of_rounds(variant: str, seconds: float) -> int:
    fewest = 3 if seconds < 2 else 2 if variant in NAMED else 1
    return max(fewest, min(ROUNDS, int(ROUNDS_SECONDS / seconds)))


@pytest.fixture
def measure(
    benchmark: Any, device: torch.device, add_row: Callable[[report.Row], None], note: Callable[[str], None]
) -> Callable[..., None]:
    """Time a variant beside the fused op, round by round, once its results are right; and its peak memory.

    Every round runs the fused op, then the variant: whatever else the machine does meets both, and the ratio
    of the medians is of the same minute. A variant that gives other results than `expected` is not timed, and
    a peer that does not run here is left out; the lines after the table say so.
    """

    def measure(
        group: str,
        variant: str,
        run: Callable[[], tuple[Tensor, ...]],
        run_fused: Callable[[], tuple[Tensor, ...]],
        expected: tuple[Tensor, ...],
        *,
        dtype: torch.dtype = torch.float32,
        flops: float | None = None,
        compiled: bool = False,
    ) -> None:
        def left_out(why: str) -> NoReturn:
            note(f"{group}: {variant} {why}")
            pytest.fail(why) if variant == "fused" else pytest.skip(why)

        try:
            if compiled:
                run()  # its own compilation would count as its memory
            began = time.perf_counter()
            results, peak = measuring.with_peak(run, device)
            taken = time.perf_counter() - began
        except (RuntimeError, AssertionError) as error:
            left_out(f"does not run: {str(error).splitlines()[0]}")
        for actual, exact in zip(results, expected, strict=True):
            error = (actual - exact).abs().max() / exact.abs().max().clamp(min=1e-30)
            if not error < TOLERANCE[dtype]:
                left_out(f"is not timed: relative error {error:.2g}")
        del results
        if benchmark.disabled:
            benchmark.pedantic(lambda: None)
            return

        fused_times: list[float] = []

        def fused_round() -> None:
            fused_times.append(measuring.seconds(run_fused, device))

        interleaved = variant != "fused"
        rounds = number_of_rounds(variant, taken)
        benchmark.group = group
        benchmark.pedantic(run, setup=fused_round if interleaved else None, rounds=rounds)
        median = benchmark.stats.stats.median
        extra: dict[str, Any] = {"fused_median": statistics.median(fused_times) if interleaved else median}
        if flops is not None:
            rate = measuring.matrix_rate(device, dtype, group)
            extra |= {"flops": flops, "matrix_rate": rate, "dtype": str(dtype)}
        if peak is not None:
            extra["peak_mib"] = peak
        benchmark.extra_info.update(extra, variant=variant)
        add_row(report.Row(group, variant, median, extra))

    return measure
