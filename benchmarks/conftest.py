import platform

import pytest
import torch

from td3_fast import ops


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="every size of the op benchmarks, not only small ones"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = getattr(metafunc.module, "SIZES", None)
    if sizes is not None and "size" in metafunc.fixturenames:
        chosen = sizes["full" if metafunc.config.getoption("--full") else "small"]
        metafunc.parametrize("size", chosen, ids=lambda size: "x".join(map(str, size)))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and ops.has_fused("cuda") else "cpu")


@pytest.fixture
def measure(benchmark, device):
    """Time ``run`` once its result is within ``tolerance`` of ``expected``; GPU work is waited for."""

    def measure(run, expected, *, tolerance=1e-3):
        for a, b in zip(run(), expected, strict=True):
            error = (a - b).abs().max() / b.abs().max().clamp(min=1e-30)
            assert error < tolerance, f"not timed: relative error {error:.2g}"

        def timed():
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        benchmark.extra_info["device"] = (
            torch.cuda.get_device_name()
            if device.type == "cuda"
            else platform.processor() or platform.machine()
        )
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["torch"] = torch.__version__
        benchmark.pedantic(timed, rounds=5, warmup_rounds=1)
        if device.type == "cuda":
            benchmark.extra_info["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20

    return measure


@pytest.fixture
def matrix_product(benchmark, device):
    """The peer for the rate of arithmetic: one large float32 product."""
    a = torch.randn(2048, 2048, device=device)

    def run():
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["flops"] = 2 * 2048**3
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
