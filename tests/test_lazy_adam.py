"""Lazy Adam: Adam on the rows that have a gradient, nothing on the others."""

from __future__ import annotations

import torch

from td3_fast.unroll import AdamConfig, AdamState, adam_step_, initial_state, lazy_adam_step_

CONFIG = AdamConfig(learning_rate=0.1, weight_decay=0.01)
ROWS = torch.tensor([4, 1])


def started() -> AdamState:
    generator = torch.Generator().manual_seed(0)
    return initial_state([torch.randn(shape, generator=generator) for shape in ((3,), (6, 2))])


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in ((3,), (6, 2))]


def test_with_a_gradient_for_every_row_it_is_adam() -> None:
    ours, theirs = started(), started()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for step in range(4):
        theta, table = gradients(step)
        ours = lazy_adam_step_(ours, (theta, table[order]), order, CONFIG)
        theirs = adam_step_(theirs, (theta, table), CONFIG)
    assert ours.step == theirs.step == 4
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_rows_without_a_gradient_keep_their_values_and_moments() -> None:
    theta, table = gradients(0)
    state = adam_step_(started(), (theta, table), CONFIG)
    before = state.clone()
    after = lazy_adam_step_(state, (theta, table[ROWS]), ROWS, CONFIG)
    others = torch.tensor([0, 2, 3, 5])
    for old, new in zip(before[:3], after[:3], strict=True):
        assert torch.equal(old[1][others], new[1][others])
        assert not torch.equal(old[0], new[0])
        assert (old[1][ROWS] != new[1][ROWS]).any(1).all()


def test_rows_with_a_gradient_take_the_step_of_adam() -> None:
    theta, table = gradients(1)
    ours = lazy_adam_step_(started(), (theta, table[ROWS]), ROWS, CONFIG)
    theirs = adam_step_(started(), (theta, table), CONFIG)
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert torch.equal(a[1][ROWS], b[1][ROWS])
