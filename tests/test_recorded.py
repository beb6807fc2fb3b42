"""Recorded steps: the results of `InnerLoop`, and when they are replayed the bits of steps that are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_unroll import CASES, VARIANTS, small_distiller
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from td3_fast.distill import Distiller
from td3_fast.distill_state import DistillState
from td3_fast.training import fresh_like
from td3_fast.unroll import Lanes, Recorder, called, fit_on_summary, initial_state

HOST_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


class Tape(TorchDispatchMode):
    """A CUDA graph for the CPU: the operators that a step calls, to be called again on the same tensors.

    A host value that the step depended on stays what it was, as it would in a graph.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        step()  # as a graph's warm-up does
        with self:
            step()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in HOST_READS, f"{func} reads a tensor on the host"
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self._calls:
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif not any(r.alias_info for r in func._schema.returns):  # a view sees what has changed
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


def taped(step: Callable[[], None]) -> Callable[[], None]:
    return Tape(step).replay


def outer_steps(
    name: str, record: Recorder | None, count: int = 2, lanes: int = 1, **changes: object
) -> tuple[list[Tensor], list[dict[str, float]]]:
    """Meta-gradients and figures of outer steps that differ in seeds, window and summary."""
    distiller, state = small_distiller(name=name, **changes)
    distiller.follower.recorder = None if record is None else lambda: record
    distiller.lanes = Lanes(torch.device("cpu"), lanes)
    gradients, figures = [], []
    for _ in range(count):
        by_factor, losses = distiller.meta_gradient(state)
        gradients += by_factor
        figures.append(losses)
        distiller.outer_step(state)
    return gradients, figures


@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_recorded_steps_give_the_meta_gradient_and_replayed_ones_its_bits(
    name: str, variant: str, item_embedding: str
) -> None:
    options = {"item_embedding": item_embedding, "inner_steps": 6, "window": 3, **VARIANTS[variant]}
    (expected, expected_figures), by_call, by_tape = (
        outer_steps(name, record, **options) for record in (None, called, taped)
    )
    for a, b, replayed in zip(by_call[0], expected, by_tape[0], strict=True):
        assert float(b.abs().max()) > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert torch.equal(replayed, a)
    for ours, theirs in zip(by_call[1], expected_figures, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-10)
    assert by_tape[1] == by_call[1]


@pytest.mark.parametrize("normalize", ["none", "softmax"])
@pytest.mark.parametrize("trajectories", [1, 3])
def test_mixtures_and_trajectories(normalize: str, trajectories: int) -> None:
    changes = {"item_embedding": "trained", "normalize": normalize, "trajectories": trajectories}
    expected, _ = outer_steps("SASRec", None, **changes)
    actual, _ = outer_steps("SASRec", taped, **changes)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
@pytest.mark.parametrize("lanes", [2, 3])
def test_trajectories_side_by_side_have_the_bits_of_one_after_another(
    lanes: int, item_embedding: str
) -> None:
    changes = {"item_embedding": item_embedding, "trajectories": 3}
    expected, figures = outer_steps("SASRec", taped, lanes=1, **changes)
    actual, own_figures = outer_steps("SASRec", taped, lanes=lanes, **changes)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert own_figures == figures


@pytest.mark.parametrize(("bytes_each", "lanes"), [(0, 16), (2**28, 16), (2**30, 4), (2**40, 1)])
def test_no_more_lanes_than_memory_is_meant_for(bytes_each: int, lanes: int) -> None:
    assert Lanes(torch.device("cpu"), 100, bytes_each=bytes_each).count == lanes


@pytest.mark.parametrize("limit", [1.01, 1.5, 4.0, 1e9])
@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
def test_a_window_is_cut_short_where_the_adjoint_grows(item_embedding: str, limit: float) -> None:
    changes = {"item_embedding": item_embedding, "learner_lr": 0.1, "growth_limit": limit, "window": 9}
    expected, expected_figures = outer_steps("SASRec", None, **changes)
    actual, figures = outer_steps("SASRec", taped, **changes)
    assert [f["window"] for f in figures] == [f["window"] for f in expected_figures]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_what_overflows_beyond_the_cut_is_left_out() -> None:
    """The adjoint goes on growing where the window is gone through to its end."""
    changes = {"item_embedding": "trained", "learner_lr": 30.0, "growth_limit": 2.0}
    changes |= {"inner_steps": 60, "window": 60, "normalize": "none"}
    expected, figures = outer_steps("SASRec", None, count=1, **changes)
    actual, _ = outer_steps("SASRec", called, count=1, **changes)
    assert figures[0]["window"] < 60
    for a, b in zip(actual, expected, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
def test_training_on_a_summary_may_be_recorded(item_embedding: str) -> None:
    distiller, state = small_distiller(item_embedding=item_embedding)
    summary = distiller.summary(state.factors.parameters)
    trained, losses = [], []
    for record in (None, called, taped):
        learner = fresh_like(distiller.teacher, seed=1)
        losses.append(
            fit_on_summary(learner, summary, seed=2, record=record, **distiller.config.fit_options())
        )
        trained.append([p.detach() for p in learner.parameters()])
    assert losses[1] == losses[2] == pytest.approx(losses[0], rel=1e-10)
    for direct, by_call, by_tape in zip(*trained, strict=True):
        torch.testing.assert_close(by_call, direct, rtol=1e-9, atol=1e-12)
        assert torch.equal(by_call, by_tape)


def test_a_window_too_large_to_be_kept_is_not_recorded() -> None:
    distiller, state = small_distiller(item_embedding="trained")
    distiller.follower.limits = type(distiller.limits)(**{**vars(distiller.limits), "kept_states": 1})

    def refuse(step: Callable[[], None]) -> Callable[[], None]:
        raise AssertionError("recorded")

    distiller.follower.recorder = lambda: refuse
    distiller.meta_gradient(state)


def test_another_kind_of_loop_is_refused() -> None:
    distiller, state = small_distiller()
    distiller.follower.recorder = lambda: called
    distiller.meta_gradient(state)
    recorded = distiller.follower.recorded[0]
    assert recorded is not None
    other, other_state = small_distiller(users_per_step=2)
    _, mixture = other._mixture([f.detach() for f in other_state.factors.parameters])
    with pytest.raises(ValueError, match="differ in seed"):
        recorded.begin(other.follower.inner_loop(other.draw(other_state)), mixture)


def test_more_steps_than_were_provided_for_are_refused() -> None:
    distiller, state = small_distiller()
    distiller.follower.recorder = lambda: called
    distiller.meta_gradient(state)
    recorded = distiller.follower.recorded[0]
    assert recorded is not None
    _, mixture = distiller._mixture([f.detach() for f in state.factors.parameters])
    start = initial_state(distiller.draw(state).start)
    with pytest.raises(ValueError, match="recorded for 12 steps of which 5 are kept, asked for 13 "):
        recorded.run(start, distiller.items, mixture, until=13)
    with pytest.raises(ValueError, match="asked for 6 of which 6 are"):
        recorded.run_window(start, distiller.items, mixture, until=6)


def on_gpu(**changes: object) -> tuple[Distiller, DistillState]:
    """`small_distiller` with its tables on the GPU."""
    distiller, state = small_distiller(**changes)
    moved = Distiller(
        distiller.split, distiller.pretrained.to(torch.device("cuda")), distiller.config, seed=distiller.seed
    )
    return moved, state.to(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("trajectories", [1, 4])
@pytest.mark.parametrize("items", ["frozen", "frozen bfloat16", "trained"])
def test_graphs_on_a_gpu(items: str, trajectories: int) -> None:
    """Replays have the bits of calls, side by side or not, and are what the CPU gives; bfloat16 apart, in float64."""
    item_embedding, _, dtype = items.partition(" ")
    changes: dict[str, object] = {"item_embedding": item_embedding, "trajectories": trajectories}
    if dtype:
        changes["item_dtype"] = dtype
    distiller, state = small_distiller(**changes)
    expected, _ = distiller.meta_gradient(state)
    results = []
    for record in (None, called):
        moved, moved_state = on_gpu(**changes)
        if record is not None:
            moved.lanes = Lanes(torch.device("cuda"), 1)
            moved.follower.recorder = lambda: called
        moved.meta_gradient(moved_state)  # records
        results.append(moved.meta_gradient(moved_state)[0])
    for replayed, by_call, theirs in zip(*results, expected, strict=True):
        assert torch.equal(replayed, by_call)
        if dtype:
            torch.testing.assert_close(
                replayed.cpu(), theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max())
            )
        else:
            torch.testing.assert_close(replayed.cpu(), theirs, rtol=1e-8, atol=1e-11)
