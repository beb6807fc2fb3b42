"""How time and peak memory of one outer step grow, from a base point, with each of what a distillation is sized by.

n items, ζ positions of μ synthetic users (half of them in an inner step), M inner steps, the last W of them
differentiated, K trajectories; 128 real examples, width 32. The native engine and `engine="higher"`, both with a pass a
loss term; at every point they must give the same meta-gradient before the second is timed.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from measuring import with_peak
from memory_per_process import log_of
from outer_step_problem import make_distiller, spread_state
from report import Row
from torch import Tensor

from td3_fast.data import Split, leave_one_out
from td3_fast.distill import Distiller
from td3_fast.distill_config import DistillConfig, Engine, Semantics
from td3_fast.unroll.inner import ItemEmbedding

TOLERANCE = 1e-3  # relative, of each factor's gradient
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Point:
    """The sizes of one outer step."""

    n: int = 5000
    ζ: int = 25
    μ: int = 20
    W: int = 5
    M: int = 20
    K: int = 1

    def __str__(self) -> str:
        """What differs from the base point."""
        other = [f"{name} = {value}" for name, value in asdict(self).items() if value != getattr(BASE, name)]
        return ", ".join(other) or "base"


BASE = Point()
FACTORS = {"small": (2,), "acceptance": (2, 4), "full": (2, 4)}
ENGINES = ("native", "higher")

# Filled on the way: the first engine of a point gives what the second is compared with, the base point comes first.
gradients_at: dict[tuple[Point, str], tuple[Tensor, ...]] = {}
native_medians: dict[tuple[Point, str], float] = {}
at_base: dict[tuple[str, str], dict[str, float]] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    factors = FACTORS[metafunc.config.getoption("sizes")]
    scaled = [replace(BASE, **{name: value * x}) for name, value in asdict(BASE).items() for x in factors]
    cases = [(item_embedding, point) for item_embedding in ("frozen", "trained") for point in (BASE, *scaled)]
    metafunc.parametrize(
        ("item_embedding", "point", "engine"),
        [(*case, engine) for case in cases for engine in ENGINES],
        ids=str,
    )


@functools.cache
def real_examples(num_items: int) -> Split:
    return leave_one_out(log_of(num_items))


def distiller_at(point: Point, engine: Engine, item_embedding: ItemEmbedding) -> Distiller:
    config = DistillConfig(
        users=point.μ,
        positions=point.ζ,
        user_rank=8,
        position_rank=8,
        batch_size=128,
        users_per_step=point.μ // 2,
        summary_lr=0.03,
        learner_lr=0.005,
        inner_steps=point.M,
        window=point.W,
        trajectories=point.K,
        engine=engine,
        item_embedding=item_embedding,
        semantics=Semantics(separate_passes=True),
    )
    longest = BASE.ζ * max(max(factors) for factors in FACTORS.values())
    return make_distiller(real_examples(point.n), config, {"max_len": longest, "hidden": 32, "inner": 64})


def meta_gradient(distiller: Distiller, window: tuple[int, int]) -> tuple[Tensor, ...]:
    return distiller.meta_gradient(spread_state(distiller), window=window)[0]


@functools.cache
def warm_up(engine: Engine, item_embedding: ItemEmbedding) -> None:
    """What libraries set up on their first call belongs to no point."""
    meta_gradient(distiller_at(BASE, engine, item_embedding), (1, 1))


def assert_same_gradient(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.linalg.vector_norm(a - b) <= TOLERANCE * torch.linalg.vector_norm(b)


def test_growth(
    benchmark: Any,
    point: Point,
    engine: Engine,
    item_embedding: ItemEmbedding,
    add_row: Callable[[Row], None],
) -> None:
    distiller = distiller_at(point, engine, item_embedding)
    warm_up(engine, item_embedding)

    def step() -> tuple[Tensor, ...]:
        return meta_gradient(distiller, (point.M - point.W, point.W))

    began = time.perf_counter()
    gradients, peak = with_peak(step, CPU)
    taken = time.perf_counter() - began
    assert_same_gradient(gradients, gradients_at.setdefault((point, item_embedding), gradients))
    if benchmark.disabled:
        benchmark.pedantic(lambda: None)
        return
    benchmark.group = f"outer step as it grows, {item_embedding} items"
    benchmark.pedantic(step, rounds=5 if taken < 0.5 else 3 if taken < 1 else 2)
    median = benchmark.stats.stats.median
    base = at_base.setdefault((engine, item_embedding), {"median": median, "peak": peak or 0.0})
    figures = {
        "variant": f"{point}, {engine}",
        "fused_median": native_medians.setdefault((point, item_embedding), median),
        "base_median": base["median"],
        **({} if peak is None else {"peak_mib": peak, "base_peak_mib": base["peak"]}),
    }
    benchmark.extra_info.update(figures)
    add_row(Row(benchmark.group, figures["variant"], median, figures))
