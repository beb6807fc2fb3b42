"""A window of which only some states are kept: the same bits as one that is kept whole."""

from __future__ import annotations

import pytest
import torch
from test_unroll import CASES, NUM_ITEMS, VARIANTS, small_distiller
from torch import Tensor

from td3_fast.unroll import CachedMixture, adam_adjoint_, adam_step_, initial_state, mixture
from td3_fast.unroll.adam import AdamConfig, AdamState, step_size
from td3_fast.unroll.window import stride_of

WARM_UP, WINDOW = 2, 10


def pulled_back(name: str, variant: str, item_embedding: str, *, kept_limit: int) -> list[Tensor]:
    """The state after a window, and what its adjoint gives."""
    distiller, state = small_distiller(name=name, item_embedding=item_embedding, **VARIANTS[variant])
    _, made_of = distiller._mixture([f.detach() for f in state.factors.parameters])
    trajectory = distiller.draw(state, window=(WARM_UP, WINDOW))
    loop = distiller.follower.inner_loop(trajectory)
    learner, _ = loop.run(initial_state(trajectory.start), distiller.items, made_of, until=WARM_UP)
    learner, window = loop.run_window(
        learner, distiller.items, made_of, until=WARM_UP + WINDOW, kept_limit=kept_limit
    )
    assert len(window.checkpoints) == (2 if kept_limit == 0 else 0)
    assert len(window.steps) == (2 if kept_limit == 0 else WINDOW)
    cotangents = tuple(p.sin() for p in learner.parameters)
    gradient = loop.pull_back(window, cotangents, made_of)
    assert not window.steps
    assert not window.checkpoints
    return [*learner.parameters, *learner.first_moments, *learner.second_moments, gradient]


@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_checkpointed_window_has_the_bits_of_one_kept_whole(
    name: str, variant: str, item_embedding: str
) -> None:
    whole, checkpointed = (
        pulled_back(name, variant, item_embedding, kept_limit=limit) for limit in (2**30, 0)
    )
    assert float(whole[-1].abs().max()) > 0
    for a, b in zip(whole, checkpointed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kept_limit", [2**30, 0])
@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
def test_a_window_whose_adjoint_grows_is_cut_short(item_embedding: str, kept_limit: int) -> None:
    distiller, state = small_distiller(item_embedding=item_embedding, learner_lr=0.1)
    trajectory = distiller.draw(state, window=(WARM_UP, WINDOW))
    loop = distiller.follower.inner_loop(trajectory)
    end = WARM_UP + WINDOW

    def gradient(length: int, growth_limit: float | None = None) -> tuple[Tensor, int]:
        """Of the last steps, so many; and how many were pulled back."""
        _, made_of = distiller._mixture([f.detach() for f in state.factors.parameters])
        learner, _ = loop.run(initial_state(trajectory.start), distiller.items, made_of, until=end - length)
        learner, window = loop.run_window(learner, distiller.items, made_of, until=end, kept_limit=kept_limit)
        cotangents = tuple(p.sin() for p in learner.parameters)
        pulled = loop.pull_back(window, cotangents, made_of, growth_limit=growth_limit)
        assert not window.steps
        assert not window.checkpoints
        return pulled, window.pulled_back

    lengths = set()
    for limit in (1.5, 4.0, 16.0, 1e9):
        cut, length = gradient(WINDOW, limit)
        short, taken = gradient(length)
        assert taken == length
        torch.testing.assert_close(cut, short, rtol=1e-12, atol=0)
        lengths.add(length)
    assert min(lengths) < max(lengths) == WINDOW


@pytest.mark.parametrize(
    ("steps", "limit", "stride"),
    [(40, 40 * 4 * 12, 40), (40, 40 * 4 * 12 - 1, 7), (9, 0, 3), (10, 0, 4), (1, 0, 1), (0, 0, 1)],
)
def test_what_is_kept_is_decided_by_bytes(steps: int, limit: int, stride: int) -> None:
    assert stride_of(steps, 12, limit) == stride


@pytest.mark.parametrize("limit", [0, 700, 2**28])
def test_cotangents_that_wait_are_bounded(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((4, 6, 5), (NUM_ITEMS, 5))
    )
    notes = [
        (torch.tensor(users), torch.randn(2, 6, 7, dtype=torch.float64, generator=generator), items)
        for users in ([0, 1], [2, 3], [0, 1], [3, 0])
        for items in torch.randn(2, NUM_ITEMS, 7, dtype=torch.float64, generator=generator)
    ]
    expected = CachedMixture(queries, keys)
    for note in notes:
        expected.note(*note)
    monkeypatch.setattr(mixture, "NOTED_LIMIT", limit)
    bounded = CachedMixture(queries, keys)
    for note in notes:
        bounded.note(*note)
        assert bounded._noted_bytes <= limit
    torch.testing.assert_close(bounded.gradient(), expected.gradient())
    assert not bounded.gradient().any()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_large_tensors_are_stepped_in_parts(weight_decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    p, m, g, *cotangents = (torch.randn(13, 5, dtype=torch.float64, generator=generator) for _ in range(6))
    v = torch.rand(13, 5, dtype=torch.float64, generator=generator)
    config = AdamConfig(learning_rate=0.1, weight_decay=weight_decay)

    def stepped(size: float | Tensor) -> list[Tensor]:
        to_p, to_m, to_v = (c.clone() for c in cotangents)
        state = AdamState((p.clone(),), (m.clone(),), (v.clone(),), 2)
        adjoint = adam_adjoint_((p, m, v), g, (to_p, to_m, to_v), size, config)
        after = adam_step_(state, (g,), config, size)
        return [*(t for group in after[:3] for t in group), adjoint, to_p, to_m, to_v]

    size = step_size(3, config)
    whole = stepped(size)
    monkeypatch.setattr("td3_fast.unroll.adam.ELEMENTS_AT_ONCE", 8)
    for same in (size, torch.tensor(size, dtype=torch.float64)):
        for a, b in zip(whole, stepped(same), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)
