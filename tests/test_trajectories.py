"""Several learners per outer step: their mean gradient, what each of them has of its own, and resuming."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from test_unroll import small_distiller

from td3_fast.distill import Distiller, Trajectory
from td3_fast.distill_config import Semantics
from td3_fast.distill_state import DistillState

COUNT = 3


class SingleDistiller(Distiller):
    """A distillation with one learner per outer step, and that one given."""

    given: Trajectory

    def draw(
        self, state: DistillState, trajectory: int = 0, *, window: tuple[int, int] | None = None
    ) -> Trajectory:
        return self.given


@pytest.mark.parametrize("engine", ["native", "higher"])
@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
@pytest.mark.parametrize("start", ["pool", "fresh"])
def test_the_gradient_is_the_mean_of_separate_runs(item_embedding: str, engine: str, start: str) -> None:
    options: dict[str, Any] = {"item_embedding": item_embedding, "start": start}
    together, state = small_distiller(**options, trajectories=COUNT)
    state.step = 1
    single, _ = small_distiller(**options, engine=engine)
    single.__class__ = SingleDistiller
    separate = []
    for index in range(COUNT):
        single.given = together.draw(state, index)
        separate.append(single.meta_gradient(state))
    gradients, losses = together.meta_gradient(state)
    for i, gradient in enumerate(gradients):
        expected = sum(run[0][i] for run in separate) / COUNT
        assert torch.linalg.vector_norm(gradient - expected) <= 1e-9 * torch.linalg.vector_norm(expected)
    for name in ("loss", "cross_entropy", "alignment"):
        assert losses[name] == pytest.approx(sum(run[1][name] for run in separate) / COUNT, rel=1e-10)


def test_engines_agree_on_several_learners() -> None:
    native, state = small_distiller(trajectories=COUNT)
    higher, _ = small_distiller(trajectories=COUNT, engine="higher")
    (ours, losses), (theirs, other_losses) = (d.meta_gradient(state) for d in (native, higher))
    assert losses["loss"] == pytest.approx(other_losses["loss"], rel=1e-10)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.linalg.vector_norm(a - b) <= 1e-9 * torch.linalg.vector_norm(b)


def test_each_learner_has_its_own_draws() -> None:
    distiller, state = small_distiller(trajectories=8, batch_size=20)
    drawn = [distiller.draw(state, index) for index in range(8)]
    assert len({trajectory.seed for trajectory in drawn}) == 8
    assert len({trajectory.warm_up for trajectory in drawn}) > 1
    assert len({tuple(trajectory.examples.tolist()) for trajectory in drawn}) == 8
    pool = [items for _, items in distiller.pool]
    starts = [trajectory.start[1] for trajectory in drawn]
    assert all(any(torch.equal(start, items) for items in pool) for start in starts)
    fresh, state = small_distiller(trajectories=2, start="fresh")
    first, second = (fresh.draw(state, index).start[0] for index in range(2))
    assert not torch.equal(first, second)


def test_the_first_learner_is_that_of_a_distillation_with_one() -> None:
    single, state = small_distiller()
    several, _ = small_distiller(trajectories=COUNT)
    ours, theirs = single.draw(state), several.draw(state)
    assert ours.seed == theirs.seed
    assert ours.warm_up == theirs.warm_up
    assert np.array_equal(ours.examples, theirs.examples)
    assert torch.equal(ours.start[0], theirs.start[0])


@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_every_learner_meets_all_examples_in_an_epoch(count: int) -> None:
    distiller, _ = small_distiller(trajectories=count, batch_size=20)
    batches = distiller.steps_per_epoch
    assert 2 < batches < 50
    for index in (0, count - 1):
        met = [distiller.batch_index(step, index) for step in range(batches, 2 * batches)]
        assert sorted(np.concatenate(met)) == list(range(len(distiller.split.train)))
    for step in range(batches):
        drawn = {tuple(distiller.batch_index(step, index)) for index in range(count)}
        assert len(drawn) == min(count, batches)


@pytest.mark.parametrize("reload_learner", ["step", "epoch"])
def test_a_run_with_several_learners_goes_on_with_the_same_bits(reload_learner: str) -> None:
    distiller, _ = small_distiller(
        trajectories=COUNT,
        epochs=2,
        batch_size=90,
        inner_steps=6,
        window=3,
        semantics=Semantics(reload_learner=reload_learner),
    )
    states: list[DistillState] = []
    whole = distiller.run(on_step=lambda state: states.append(copy.deepcopy(state)))
    assert len(states) == 2 * distiller.steps_per_epoch
    if reload_learner == "epoch":
        assert whole.carried is not None
        assert len(whole.carried) == 2 * COUNT
    for state in states[:-1]:
        resumed = distiller.run(copy.deepcopy(state))
        assert resumed.history == whole.history
        for a, b in zip(resumed.factors.parameters, whole.factors.parameters, strict=True):
            assert torch.equal(a, b)


def test_learners_that_are_carried_over_are_each_ones_own() -> None:
    distiller, state = small_distiller(
        trajectories=2, batch_size=20, semantics=Semantics(reload_learner="epoch")
    )
    distiller.outer_step(state)
    assert state.carried is not None
    for index in range(2):
        start = distiller.draw(state, index).start
        for tensor, carried in zip(start, state.carried[2 * index : 2 * index + 2], strict=True):
            assert torch.equal(tensor, carried)
    assert not torch.equal(state.carried[0], state.carried[2])


def test_at_least_one_learner_is_needed() -> None:
    with pytest.raises(ValueError, match="trajectories must be at least 1"):
        small_distiller(trajectories=0)
