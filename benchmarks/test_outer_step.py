"""One outer step at the size of ml-100k: 50 × 50 summary, 4096 real examples, 80 + 40 inner steps.

Against `engine="higher"`: S formed at every inner step, the window's graph kept whole, one attention pass a loss term;
"at every position" with attention and feed-forward everywhere, as the paper's base library runs them, instead of at the
asked positions alone.
Peak memory stands beside the time in `extra_info`, in MiB above what was in use before the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from measuring import with_peak
from report import Row
from torch import Tensor

from td3_fast.data import generate_interactions, leave_one_out
from td3_fast.distill import Distiller, Semantics
from td3_fast.learners import SASRec, SASRecConfig
from td3_fast.ops import DropoutStream
from td3_fast.recipes import recipe_named
from td3_fast.training import Pretrained

WINDOW = (80, 40)
ENGINES = ["native", "higher with one pass", "higher", "higher at every position"]
USERS, ITEMS, LENGTH = 943, 1682, 106


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
    learner = SASRec(SASRecConfig(num_items=split.interactions.num_items, **recipe.learner), seed=0)
    state = {name: value.detach() for name, value in learner.state_dict().items()}
    pretrained = Pretrained(
        learner_name="SASRec",
        learner_config=learner.hyperparameters(),
        best=state,
        pool=[state],
        history=[],
        best_epoch=0,
    )

    def make(**changes: object) -> Distiller:
        return Distiller(split, pretrained, replace(recipe.distill, **changes), seed=0)

    return make


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
def test_outer_step(
    benchmark: Any,
    distillers: Callable[..., Distiller],
    engine: str,
    item_embedding: str,
    add_row: Callable[[Row], None],
    request: pytest.FixtureRequest,
) -> None:
    if engine not in ("native", "higher") and request.config.getoption("sizes") == "small":
        pytest.skip("left out of the small sizes")
    separate = engine in ("higher", "higher at every position")
    semantics = Semantics(separate_passes=separate)
    distiller = distillers(engine=engine.split()[0], item_embedding=item_embedding, semantics=semantics)
    if engine == "higher at every position":
        distiller.teacher.__class__ = EverywhereSASRec
    state = distiller.initial_state()
    for factor in state.factors.parameters:
        factor.mul_(20)
    if not separate:
        other = distillers(engine="higher" if engine == "native" else "native", item_embedding=item_embedding)
        ours, theirs = (d.meta_gradient(state, window=(2, 3))[0] for d in (distiller, other))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.linalg.vector_norm(a - b) <= 1e-3 * torch.linalg.vector_norm(b)

    def step() -> object:
        return distiller.meta_gradient(state, window=WINDOW)

    _, peak = with_peak(step, torch.device("cpu"))
    benchmark.group = f"outer step, ml-100k size, {item_embedding} items"
    quick = engine != "native" and request.config.getoption("sizes") == "small"
    benchmark.pedantic(step, rounds=1 if quick else 3, warmup_rounds=0)
    benchmark.extra_info.update(variant=engine, **({} if peak is None else {"peak_mib": round(peak)}))
    if not benchmark.disabled:
        median = benchmark.stats.stats.median
        add_row(Row(benchmark.group, engine, median, dict(benchmark.extra_info)))
