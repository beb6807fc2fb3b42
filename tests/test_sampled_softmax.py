"""Sampled softmax: exact where every item is drawn, unbiased where not."""

from __future__ import annotations

import math

import pytest
import torch

from td3_fast.ops import item_cross_entropy
from td3_fast.sampled_softmax import (
    PROPOSALS,
    Negatives,
    NegativeSampler,
    expected_draws,
    sampled_cross_entropy,
)

NUM_ITEMS, ROWS, WIDTH = 40, 7, 5
COUNTS = torch.tensor([0, 900, *((13 * i) % 37 for i in range(NUM_ITEMS - 2))])


def problem(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, items = (torch.randn(rows, WIDTH, generator=generator, dtype=dtype) for rows in (ROWS, NUM_ITEMS))
    return hidden, items, torch.randint(NUM_ITEMS, (ROWS,), generator=generator)


def in_double(negatives: Negatives) -> Negatives:
    return Negatives(negatives.items, negatives.log_expected.double())


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_with_every_item_drawn_it_is_the_full_softmax(proposal: str) -> None:
    hidden, items, target = problem()
    negatives = NegativeSampler(COUNTS, num_sampled=NUM_ITEMS, proposal=proposal).draw(seed=3)
    assert sorted(negatives.items.tolist()) == list(range(NUM_ITEMS))
    inputs = [x.requires_grad_() for x in (hidden, items)]
    ours = sampled_cross_entropy(hidden, items, target, in_double(negatives))
    full = item_cross_entropy(hidden, items, target)
    torch.testing.assert_close(ours, full, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x.sum(), inputs) for x in (ours, full)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("num_sampled", [1, 6, 39])
def test_the_sum_over_items_is_estimated_without_bias(proposal: str, num_sampled: int) -> None:
    hidden, items, target = problem()
    sampler = NegativeSampler(COUNTS, num_sampled=num_sampled, proposal=proposal)
    own = (hidden * items[target]).sum(-1)
    draws = torch.stack(
        [
            (sampled_cross_entropy(hidden, items, target, in_double(sampler.draw(seed=seed))) + own).exp()
            for seed in range(3000)
        ]
    )
    exact = (hidden @ items.T).exp().sum(-1)
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() <= 4.5 * error).all()


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_items_are_drawn_as_often_as_expected(proposal: str) -> None:
    sampler = NegativeSampler(COUNTS, num_sampled=12, proposal=proposal)
    times = torch.zeros(NUM_ITEMS, dtype=torch.float64)
    expected: dict[int, float] = {}
    for seed in range(4000):
        negatives = sampler.draw(seed=seed)
        times += torch.bincount(negatives.items, minlength=NUM_ITEMS)
        expected |= dict(zip(negatives.items.tolist(), negatives.log_expected.exp().tolist(), strict=True))
    assert sum(expected.values()) == pytest.approx(12)
    for item, number in expected.items():
        assert times[item] / 4000 == pytest.approx(number, abs=4.5 * math.sqrt(number / 4000))
    assert max(expected, key=expected.__getitem__) == 1  # the most popular


@pytest.mark.parametrize("num_sampled", [1, 3, 5, 6])
def test_expected_draws_are_capped_at_one_and_in_proportion_below(num_sampled: int) -> None:
    weights = torch.tensor([100.0, 50.0, 4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    expected = expected_draws(weights, num_sampled)
    assert float(expected.sum()) == pytest.approx(num_sampled)
    assert (expected <= 1).all()
    below = expected < 1
    if below.any():
        shares = expected[below] / weights[below]
        torch.testing.assert_close(shares, shares[:1].expand_as(shares))
        assert (weights[~below] * shares[0] >= 1 - 1e-12).all()


def test_accidental_hits_do_not_count() -> None:
    hidden, items, target = problem()
    others = Negatives(torch.tensor([2, 5]), torch.zeros(2, dtype=torch.float64))
    with_hits = Negatives(
        torch.cat([others.items, target[:1]]), torch.cat([others.log_expected, torch.zeros(1)])
    )
    row = slice(0, 1)
    torch.testing.assert_close(
        sampled_cross_entropy(hidden[row], items, target[row], others),
        sampled_cross_entropy(hidden[row], items, target[row], with_hits),
    )
    only_hits = Negatives(target[:1], torch.zeros(1, dtype=torch.float64))
    one = hidden[row].requires_grad_()
    alone = sampled_cross_entropy(one, items, target[row], only_hits)
    assert float(alone.detach()) == 0.0
    assert torch.equal(torch.autograd.grad(alone.sum(), one)[0], torch.zeros_like(one))


def test_it_is_differentiable_twice() -> None:
    hidden, items, target = problem()
    negatives = in_double(NegativeSampler(COUNTS, num_sampled=9).draw(seed=0))
    inputs = tuple(x.requires_grad_() for x in (hidden, items))

    def loss(hidden: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        return sampled_cross_entropy(hidden, items, target, negatives)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_a_seed_says_what_is_drawn() -> None:
    sampler = NegativeSampler(COUNTS, num_sampled=9)
    assert torch.equal(sampler.draw(seed=1).items, sampler.draw(seed=1).items)
    assert not torch.equal(sampler.draw(seed=1).items, sampler.draw(seed=2).items)


@pytest.mark.parametrize("num_sampled", [0, NUM_ITEMS + 1])
def test_numbers_out_of_range_are_refused(num_sampled: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the number of items"):
        NegativeSampler(COUNTS, num_sampled=num_sampled)
    with pytest.raises(ValueError, match="unigram, log-uniform"):
        NegativeSampler(COUNTS, num_sampled=1, proposal="uniform")
