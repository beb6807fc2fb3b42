"""One outer step at the size of ml-100k: 50 × 50 summary, 4096 real examples, 80 + 40 inner steps.

Against `engine="higher"`: S formed at every inner step, the window's graph kept whole, one attention pass a loss term;
"at every position" with attention and feed-forward everywhere, as the paper's base library runs them, instead of at the
asked positions alone. And against two others on the same problem, S formed and a pass a loss term: `torchopt.MetaAdam`,
and `torch.func` with the adjoint's products with second derivatives by jvp of grad (outer_step_peers.py).
Peak memory stands beside the time in `extra_info`, in MiB above what was in use before the step. All but "at every
position", whose dropout falls elsewhere, must give the meta-gradient of the native engine before they are timed.

On a GPU, 160 + 40 inner steps: captured as CUDA graphs, launched kernel by kernel, 16 trajectories side by side, and
`higher`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import outer_step_peers
import pytest
import torch
from measuring import with_peak
from outer_step_problem import make_distiller, spread_state
from report import Row
from torch import Tensor

from td3_fast.data import generate_interactions, leave_one_out
from td3_fast.distill import Distiller
from td3_fast.distill_config import Semantics
from td3_fast.learners import SASRec
from td3_fast.ops import DropoutStream
from td3_fast.recipes import recipe_named
from td3_fast.unroll import called

WINDOW = (80, 40)
WINDOW_ON_GPU = (160, 40)
# Those that stand in the place of `pull_back_with_higher`.
PEERS: dict[str, Callable[..., outer_step_peers.Gradients]] = {
    "torchopt": outer_step_peers.pull_back_with_torchopt,
    "torch.func jvp of grad": outer_step_peers.pull_back_with_torch_func,
}
ENGINES = ["native", "higher with one pass", "higher", "higher at every position", *PEERS]
LEFT_OUT_OF_SMALL = ("higher with one pass", "higher at every position")
USERS, ITEMS, LENGTH = 943, 1682, 106
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}  # relative, of each factor's gradient

# by group, the native engine's median
native_medians: dict[str, float] = {}


class EverywhereSASRec(SASRec):
    """A SASRec whose last block, too, is computed at every position."""

    def encode(
        self, inputs_embeds: Tensor, positions: Tensor, *, dropout: DropoutStream | None = None
    ) -> Tensor:
        batch, length, d = inputs_embeds.shape
        everywhere = torch.arange(length).expand(batch, length)
        hidden = super().encode(inputs_embeds, everywhere, dropout=dropout)
        return hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, d))


@pytest.fixture(scope="module")
def distillers() -> Callable[..., Distiller]:
    split = leave_one_out(generate_interactions(num_users=USERS, num_items=ITEMS, mean_length=LENGTH, seed=0))
    recipe = recipe_named("ml-100k").sized("50x50")

    def make(device: str = "cpu", **changes: object) -> Distiller:
        return make_distiller(split, replace(recipe.distill, **changes), recipe.learner, device=device)

    return make


@pytest.fixture
def put_in_place(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Puts a peer in the place of `higher`; gives the name by which a configuration has the engine."""

    def put(engine: str) -> str:
        if engine not in PEERS:
            return engine.split()[0]
        if engine == "torchopt":
            pytest.importorskip("torchopt", reason='needs torchopt: pip install "td3-fast[bench]"')
        # by its name, which the package gives to a function of the module as well
        monkeypatch.setattr(
            importlib.import_module("td3_fast.trajectory"), "pull_back_with_higher", PEERS[engine]
        )
        return "higher"

    return put


def assert_same_gradient(distiller: Distiller, other: Distiller, window: tuple[int, int]) -> None:
    ours, theirs = (d.meta_gradient(spread_state(d), window=window)[0] for d in (distiller, other))
    for a, b in zip((gradient.cpu() for gradient in ours), theirs, strict=True):
        assert torch.linalg.vector_norm(b) > 0
        assert torch.linalg.vector_norm(a - b) <= TOLERANCE[b.dtype] * torch.linalg.vector_norm(b)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
def test_peers_give_the_meta_gradient_of_the_native_engine(
    item_embedding: str, peer: str, put_in_place: Callable[[str], str], request: pytest.FixtureRequest
) -> None:
    # by which torchopt takes the bias of moments out
    request.addfinalizer(functools.partial(torch.set_default_dtype, torch.get_default_dtype()))
    torch.set_default_dtype(torch.float64)
    split = leave_one_out(generate_interactions(num_users=30, num_items=23, mean_length=9, seed=3))
    recipe = recipe_named("ml-100k").sized("6x8")
    changes: dict[str, Any] = {"item_embedding": item_embedding, "users_per_step": 4, "batch_size": 40}
    native, other = (
        make_distiller(
            split,
            replace(recipe.distill, **changes, engine=engine, semantics=Semantics(separate_passes=True)),
            {"max_len": 9, "hidden": 8, "inner": 12, "layers": 2, "heads": 2},
            dtype=torch.float64,
        )
        for engine in ("native", put_in_place(peer))
    )
    assert_same_gradient(native, other, (3, 5))


def report(benchmark: Any, engine: str, peak: float | None, add_row: Callable[[Row], None]) -> None:
    """A row of the table, beside the native engine of its group."""
    benchmark.extra_info.update(variant=engine, **({} if peak is None else {"peak_mib": round(peak)}))
    if not benchmark.disabled:
        median = benchmark.stats.stats.median
        native = native_medians.setdefault(benchmark.group, median) if engine == "native" else None
        benchmark.extra_info["fused_median"] = native or native_medians.get(benchmark.group)
        add_row(Row(benchmark.group, engine, median, dict(benchmark.extra_info)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
def test_outer_step(
    benchmark: Any,
    distillers: Callable[..., Distiller],
    engine: str,
    item_embedding: str,
    put_in_place: Callable[[str], str],
    add_row: Callable[[Row], None],
    request: pytest.FixtureRequest,
) -> None:
    small = request.config.getoption("sizes") == "small"
    if small and engine in LEFT_OUT_OF_SMALL:
        pytest.skip("left out of the small sizes")
    separate = engine not in ("native", "higher with one pass")
    options: dict[str, Any] = {
        "item_embedding": item_embedding,
        "semantics": Semantics(separate_passes=separate),
    }
    distiller = distillers(engine=put_in_place(engine), **options)
    if engine == "higher at every position":
        distiller.teacher.__class__ = EverywhereSASRec
    else:
        other = distillers(engine="higher" if engine == "native" else "native", **options)
        assert_same_gradient(distiller, other, (2, 3))
    state = spread_state(distiller)

    def step() -> object:
        return distiller.meta_gradient(state, window=WINDOW)

    _, peak = with_peak(step, torch.device("cpu"))
    benchmark.group = f"outer step, ml-100k size, {item_embedding} items"
    rounds = 9 if engine == "native" else 1 if small else 3
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=0)
    report(benchmark, engine, peak, add_row)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("engine", ["native", "native, no graphs", "native, 16 trajectories", "higher"])
@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
def test_outer_step_on_a_gpu(
    benchmark: Any,
    distillers: Callable[..., Distiller],
    engine: str,
    item_embedding: str,
    add_row: Callable[[Row], None],
) -> None:
    device = torch.device("cuda")
    separate = engine == "higher"
    options: dict[str, Any] = {
        "item_embedding": item_embedding,
        "semantics": Semantics(separate_passes=separate),
        "trajectories": 16 if engine == "native, 16 trajectories" else 1,
    }
    distiller = distillers("cuda", engine=engine.split(",")[0], **options)
    if engine == "native, no graphs":
        distiller.follower.recorder = lambda: called
    assert_same_gradient(distiller, distillers(**options), (2, 3))
    state = spread_state(distiller)

    def step() -> object:
        return distiller.meta_gradient(state, window=WINDOW_ON_GPU)

    _, peak = with_peak(step, device)  # with what it captures
    benchmark.group = f"outer step on a GPU, ml-100k size, {item_embedding} items"
    benchmark.pedantic(step, rounds=5 if engine == "native" else 2, warmup_rounds=0)
    report(benchmark, engine, peak, add_row)
