"""Steps in one call of a kernel: the bits of `InnerLoop`, step by step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_unroll import VARIANTS, small_distiller
from torch import Tensor

from td3_fast import ops, trajectory
from td3_fast.learners import build_learner
from td3_fast.ops import StepTensors, inner_steps_, kept_inner_steps, pull_back_inner_steps_
from td3_fast.summary import TuckerSummary
from td3_fast.unroll import FusedLoop, InnerLoop, fit_on_summary, fused, initial_state

pytestmark = pytest.mark.skipif(not ops.has_fused("cpu"), reason="needs the compiled kernels")

CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no dropout": {"inner_dropout": False},
    "last position alone": {"augmentation": False},
    "more middle positions": VARIANTS["more middle positions, no dropout"],
    "all users": {"users_per_step": 5},
    "cut short": {"growth_limit": 1.0001, "learner_lr": 1.0},
    "several learners": {"trajectories": 3},
}


@pytest.fixture(autouse=True)
def several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of the tests takes more than one."""
    monkeypatch.setattr(fused, "MOST_STEPS", 4)
    monkeypatch.setattr(fused, "MOST_KEPT_STEPS", 2)


def outer_step(limit: int | None = None, **changes: Any) -> tuple[list[Tensor], dict[str, float], type]:
    distiller, state = small_distiller(**changes)
    if limit is not None:
        distiller.follower.limits = replace(distiller.follower.limits, kept_states=limit)
    factors = [factor.detach() for factor in state.factors.parameters]
    _, mixture = distiller._mixture(factors)
    engine = distiller.follower._engine(distiller.draw(state), mixture, 0)
    return *distiller.meta_gradient(state, window=(1, 5)), type(engine)


@pytest.mark.parametrize("limit", [None, 0], ids=["kept whole", "checkpointed"])
@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_bits_of_steps_one_by_one(
    change: str, item_embedding: str, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"limit": limit, "item_embedding": item_embedding, **CHANGES[change]}
    gradients, figures, engine = outer_step(**options)
    assert engine is FusedLoop
    monkeypatch.setattr(trajectory, "may_be_fused", lambda *_: False)
    expected, expected_figures, engine = outer_step(**options)
    assert engine is InnerLoop
    assert figures == expected_figures
    assert (figures["window"] < 5) == (change == "cut short")
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("changes", [
    {"name": "BERT4Rec"},
    {"normalize": "none", "item_embedding": "trained"},
    VARIANTS["separate passes, dropout everywhere"],
], ids=["another encoder", "no probabilities", "separate passes"])  # fmt: skip
def test_other_steps_are_taken_one_by_one(changes: dict[str, Any]) -> None:
    assert outer_step(**changes)[2] is InnerLoop


def test_a_loss_that_overflows_is_pulled_back_through_as_far_as_without_a_limit() -> None:
    distiller, state = small_distiller(learner_lr=1e300, item_embedding="trained")
    assert distiller.meta_gradient(state, window=(2, 5))[1]["window"] == 5


@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
def test_training_on_a_summary(item_embedding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> tuple[list[Tensor], list[float], list[tuple[int, int, float]]]:
        learner = build_learner("SASRec", {"num_items": 40, "max_len": 9, "hidden": 8, "inner": 12}, seed=0)
        summary = TuckerSummary.initialise(
            users=5,
            positions=9,
            user_rank=3,
            position_rank=3,
            item_factors=learner.item_embeddings.detach(),
            seed=1,
        )
        heard: list[tuple[int, int, float]] = []
        losses = fit_on_summary(
            learner, summary, steps=11, learning_rate=0.01, batch_size=3, item_embedding=item_embedding,
            progress=lambda _, at, of, figures: heard.append((at, of, figures["loss"])),
        )  # fmt: skip
        return list(learner.state_dict().values()), losses, heard

    fast = trained()
    monkeypatch.setattr("td3_fast.unroll.fit.may_be_fused", lambda *_: False)
    expected = trained()
    assert all(torch.equal(a, b) for a, b in zip(fast[0], expected[0], strict=True))
    assert fast[1:] == expected[1:]
    assert [at for at, _, _ in fast[2]] == list(range(1, 12))


def setting(*, trained: bool) -> tuple[list[Tensor], StepTensors]:
    """A state and the inputs of three steps."""
    distiller, state = small_distiller(item_embedding="trained" if trained else "frozen")
    _, mixture = distiller._mixture([factor.detach() for factor in state.factors.parameters])
    drawn = distiller.draw(state)
    learner, items = initial_state(drawn.start), distiller.follower.items
    loop = FusedLoop(distiller.follower.inner_loop(drawn))
    return fused._flattened(learner), loop._steps(learner, items, mixture, until=3)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_schemas(trained: bool) -> None:
    state, steps = setting(trained=trained)
    _, _, kept = kept_inner_steps(state, steps)
    kernels, checks = torch.ops.td3_fast, ("test_schema", "test_faketensor")
    *inputs, shape = steps
    sizes = ops.inner_steps.packed_sizes(shape)
    opcheck = torch.library.opcheck
    opcheck(kernels.kept_inner_steps.default, (state, *inputs, sizes), test_utils=checks)
    source, items, users, targets, _, step_sizes, rates = inputs
    of_steps = (source, items, users, targets, step_sizes, rates, sizes)
    adjoint = [torch.ones_like(tensor) for tensor in state]
    opcheck(kernels.pull_back_inner_steps_.default, (adjoint, *kept, *of_steps), test_utils=checks)
    opcheck(kernels.inner_steps_.default, (state, *inputs, sizes), test_utils=checks)


def test_the_state_that_steps_are_kept_of_is_left_as_it_is() -> None:
    state, steps = setting(trained=True)
    before = [tensor.clone() for tensor in state]
    losses, after, _ = kept_inner_steps(state, steps)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
    assert torch.equal(inner_steps_(state, steps), losses)
    assert all(torch.equal(a, b) for a, b in zip(state, after, strict=True))


def test_what_does_not_go_together_is_refused() -> None:
    state, steps = setting(trained=True)
    for other, match in (
        (steps._replace(users=steps.users[:2]), "each of 3 steps"),
        (steps._replace(targets=steps.targets[:, :1]), "each of 3 steps"),
        (steps._replace(seeds=steps.seeds.repeat(1, 2)), "at most one seed"),
        (steps._replace(rates=[0.9]), "expected rates"),
        (steps._replace(source=steps.source[..., :-1]), "expected a source"),
        (steps._replace(source=steps.source.float()), "expected a source"),
    ):
        with pytest.raises(ValueError, match=match):
            inner_steps_(state, other)
    with pytest.raises(ValueError, match="two moments"):
        inner_steps_(state[:2], steps)
    with pytest.raises(IndexError, match="not one of the"):
        inner_steps_(state, steps._replace(targets=steps.targets * 0))
    _, _, kept = kept_inner_steps(state, steps)
    with pytest.raises(ValueError, match="what 3 steps kept"):
        pull_back_inner_steps_(state, kept._replace(saved=kept.saved[1:]), steps)
    state[0].requires_grad_()
    with pytest.raises(RuntimeError, match="not implemented"):
        kept_inner_steps(state, steps)[0].sum().backward()
