"""Sampled softmax: the cross-entropy of the next item over a few items instead of all.

The negatives of a batch are drawn once for all its examples, and every score enters with the logarithm of how often its
item was to be expected among them (the logQ correction), so that the sum over items that stands in the softmax is
estimated without bias. The target is always in that sum and needs no correction.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from td3_fast.ops import seeded_generator

Proposal = Literal["unigram", "log-uniform"]
PROPOSALS: tuple[Proposal, ...] = ("unigram", "log-uniform")


class Negatives(NamedTuple):
    """Items to compare with; one that was drawn twice stands there twice."""

    items: Tensor  # (m,) int64
    log_expected: Tensor  # (m,), log of the expected number of times that the item is drawn


class NegativeSampler:
    """Draws `num_sampled` items at a time, popular ones more often.

    The expected number of times that item i is drawn is min(1, c q_i), c such that these numbers add up to
    `num_sampled`: with as many draws as items every item comes once. "unigram": q_i grows with the count of the item
    plus one, so that an item nobody has met can be drawn; "log-uniform": q = log((r + 2) / (r + 1)) at the 0-based
    place r in the order of popularity. Draws are stratified over that order, which takes variance from the estimate and
    leaves its expectation. Memory O(items); a draw costs O(num_sampled log items).

    Args:
        counts: (n,) interactions of each item, the padding item included.
        num_sampled: from 1 to n.
        proposal: which q.

    Raises:
        ValueError: `num_sampled` is out of range, or the proposal is unknown.
    """

    def __init__(self, counts: Tensor, *, num_sampled: int, proposal: Proposal = "unigram") -> None:
        if not 1 <= num_sampled <= len(counts):
            raise ValueError(
                f"num_sampled must lie between 1 and the number of items ({len(counts)}), got {num_sampled}: "
                'lower it, or take loss="full"'
            )
        order = torch.argsort(counts, descending=True, stable=True)
        if proposal == "unigram":
            weights = counts[order].to(torch.float64) + 1
        elif proposal == "log-uniform":
            weights = torch.log1p(
                1 / torch.arange(1, len(counts) + 1, dtype=torch.float64, device=counts.device)
            )
        else:
            raise ValueError(f"unknown proposal {proposal!r}: expected one of {', '.join(PROPOSALS)}")
        expected = expected_draws(weights, num_sampled)
        self.num_sampled = num_sampled
        self._order = order
        self._log_expected = expected.log().float()
        self._ends = expected.cumsum(0)  # items that are certain come first and so fill a stratum each

    def draw(self, *, seed: int) -> Negatives:
        """`num_sampled` items; the same seed draws the same ones."""
        generator = seeded_generator(seed, "negatives")
        within = torch.rand(self.num_sampled, dtype=torch.float64, generator=generator, device="cpu")
        points = torch.arange(self.num_sampled, dtype=torch.float64, device="cpu") + within
        places = torch.searchsorted(self._ends, points, right=True).clamp_(max=len(self._ends) - 1)
        return Negatives(self._order[places], self._log_expected[places])


def expected_draws(weights: Tensor, num_sampled: int) -> Tensor:
    """min(1, c weights), c such that the sum is `num_sampled`; weights (n,) are positive and descend."""
    if num_sampled == len(weights):
        return torch.ones_like(weights)
    behind = weights.flip(0).cumsum(0).flip(0)  # the weight of an item and of all after it
    before = torch.arange(len(weights), dtype=weights.dtype, device=weights.device)
    left = num_sampled - before  # draws, if all before it come once
    certain = int((left * weights < behind).to(torch.int8).argmax())  # the first whose share stays below 1
    expected = torch.ones_like(weights)
    expected[certain:] = weights[certain:] * (left[certain] / behind[certain])
    return expected


def sampled_cross_entropy(
    hidden: Tensor,  # (rows, d)
    item_embeddings: Tensor,  # (n, d)
    target: Tensor,  # (rows,) int64
    negatives: Negatives,
) -> Tensor:
    """``log(exp(s_t) + sum of exp(s_j) / expected_j over negatives j != t) - s_t``, one value per row, s = scores.

    The sum is an unbiased estimate of the sum of exp(s) over all items, so the value tends to
    `item_cross_entropy(hidden, item_embeddings, target)` with more negatives and equals it where every item is drawn
    once. Forms (rows, m) scores, none of size rows × n. Differentiable to any order in hidden and item_embeddings.
    """
    # F.embedding sums the gradients of repeated rows in a fixed order
    own = (hidden * F.embedding(target, item_embeddings)).sum(-1, keepdim=True)
    others = hidden @ F.embedding(negatives.items, item_embeddings).T - negatives.log_expected
    others = others.masked_fill(negatives.items == target.unsqueeze(1), -torch.inf)  # accidental hits
    return torch.cat([own, others], dim=1).logsumexp(-1) - own.squeeze(1)
