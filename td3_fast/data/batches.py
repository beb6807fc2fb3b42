"""Batches cut out of the flat arrays, their order, and the negatives of sampled evaluation."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from td3_fast.data.split import Examples

_ROWS_PER_BLOCK = 4096  # of negatives drawn at once: bounds the temporaries; part of what a seed means


class Batch(NamedTuple):
    """Histories padded on the right with item 0."""

    histories: Tensor  # (batch, longest) int64
    lengths: Tensor  # (batch,) int64, at least 1
    targets: Tensor  # (batch,) int64


def cut_batch(examples: Examples, index: ArrayLike, max_len: int) -> Batch:
    """Histories cut to their last `max_len` items; the batch is as wide as its longest history.

    Args:
        examples: what to cut from.
        index: (batch,) integers into `examples`.
        max_len: at least 1.
    """
    if max_len < 1:
        raise ValueError(f"max_len must be at least 1, not {max_len}")
    index = np.asarray(index, dtype=np.int64)
    items, offsets = examples.interactions.items, examples.interactions.offsets
    ends = examples.ends[index]
    starts = np.maximum(offsets[examples.users[index]], ends - max_len)
    lengths = ends - starts
    column = np.arange(lengths.max(initial=0))
    histories = np.zeros((len(index), len(column)), dtype=np.int64)
    inside = column < lengths[:, None]
    histories[inside] = items[(starts[:, None] + column)[inside]]
    return Batch(
        torch.from_numpy(histories),
        torch.from_numpy(lengths),
        torch.from_numpy(items[ends].astype(np.int64)),
    )


class ExamplesOnDevice:
    """Examples from which a device cuts the batches itself, so that the host neither cuts them nor waits for any.

    What `cut_batch` gives, except that every batch is as wide as the longest history of all examples.

    Args:
        examples: what to cut from; 4 bytes an interaction and 16 an example are held.
        max_len: at least 1.
        device: where the batches are made.
    """

    def __init__(self, examples: Examples, max_len: int, device: torch.device) -> None:
        if max_len < 1:
            raise ValueError(f"max_len must be at least 1, not {max_len}")
        log = examples.interactions
        self._items, self._firsts, self._ends = (
            torch.tensor(array, device="cpu").to(device)
            for array in (log.items, log.offsets[examples.users], examples.ends)
        )
        self._max_len = max_len
        self._width = min(int(examples.lengths.max(initial=0)), max_len)

    def shortest_first(self, index: Tensor) -> Tensor:
        """`index` (batch,) by the lengths of the histories before any cut; equal ones stay in order."""
        lengths = self._ends[index] - self._firsts[index]
        return index[lengths.argsort(stable=True)]

    def cut(self, index: Tensor) -> Batch:
        """The batch of the examples `index` (batch,), which lies on the device: histories (batch, longest of all)."""
        ends = self._ends[index]
        starts = torch.maximum(self._firsts[index], ends - self._max_len)
        places = starts.unsqueeze(1) + torch.arange(self._width, device=index.device)
        inside = places < ends.unsqueeze(1)
        items = self._items[torch.where(inside, places, 0)]
        return Batch(torch.where(inside, items, 0).long(), ends - starts, self._items[ends].long())


class FewNegativesWarning(UserWarning):
    """A catalogue is too small for as many distinct negatives as are asked for."""


def shuffled(num_examples: int, *, seed: int) -> NDArray[np.int64]:
    """A permutation of 0 .. num_examples - 1 that depends on the seed alone."""
    return _generator(seed).permutation(num_examples)


def sample_negatives(examples: Examples, count: int, *, seed: int) -> NDArray[np.int64]:
    """For each example `count` items that its user never interacted with, uniformly at random.

    The whole log of the user counts, target included. Items are distinct within a row; where fewer than
    `count` are left they are drawn with replacement. The same seed gives the same negatives. Memory
    O(examples x count + interactions): no examples x items array is made.

    Returns:
        (examples, count) int64.

    Raises:
        ValueError: a user has interacted with every item.

    Warns:
        FewNegativesWarning: some are drawn with replacement.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    log = examples.interactions
    # distinct interactions, sorted by user and item
    user_of = np.repeat(np.arange(log.num_users), log.lengths)
    seen = np.unique(user_of * log.num_items + log.items)
    seen_user, seen_item = np.divmod(seen, log.num_items)
    starts = np.searchsorted(seen_user, np.arange(log.num_users + 1))
    num_unseen = log.num_items - 1 - np.diff(starts)  # (users,)
    exhausted = examples.users[num_unseen[examples.users] == 0]
    if len(exhausted):
        raise ValueError(
            f"user {str(log.user_ids[exhausted[0]])!r} has interacted with every item, so that there is none to rank a "
            "target among: leave that user's interactions out of the data"
        )
    few = int(np.count_nonzero(num_unseen[examples.users] < count))
    if few:
        warnings.warn(
            f"{few:,} of {len(examples):,} examples are of users with fewer than {count} items that they have not met: "
            f"some of their {count} negatives are drawn more than once, and count as often; the full ranking has none "
            "twice",
            FewNegativesWarning,
            stacklevel=2,
        )
    # unseen items of the user that are smaller than each seen one: ascending inside a user, so that one
    # binary search over (user, unseen below) turns the r-th unseen item into an item number
    unseen_below = seen_item - 1 - (np.arange(len(seen)) - starts[seen_user])
    keys = seen_user * log.num_items + unseen_below

    generator = _generator(seed)
    negatives = np.empty((len(examples), count), dtype=np.int64)
    for first in range(0, len(examples), _ROWS_PER_BLOCK):
        users = examples.users[first : first + _ROWS_PER_BLOCK]
        ranks = _distinct_ranks(num_unseen[users], count, generator)
        skipped = (
            np.searchsorted(keys, users[:, None] * log.num_items + ranks, side="right")
            - starts[users][:, None]
        )
        negatives[first : first + _ROWS_PER_BLOCK] = ranks + 1 + skipped
    return negatives


def history_csr(examples: Examples) -> tuple[Tensor, Tensor]:
    """The whole history of every example, which full ranking leaves out of the candidates.

    Returns:
        offsets (examples + 1,) and items (total,), both int64. Memory is the sum of the history lengths:
        meant for validation and test, one example per user.
    """
    lengths = examples.lengths
    offsets = np.zeros(len(examples) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    starts = examples.interactions.offsets[examples.users]
    position = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    items = examples.interactions.items[position].astype(np.int64)
    return torch.from_numpy(offsets), torch.from_numpy(items)


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def _distinct_ranks(
    sizes: NDArray[np.int64], count: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """(rows, count): in row i, integers below sizes[i], distinct when sizes[i] >= count."""
    ranks = generator.integers(0, sizes[:, None], size=(len(sizes), count))
    # few to choose from: a shuffle; redrawing collisions would take long
    tight = np.flatnonzero((sizes >= count) & (sizes < 2 * count))
    if len(tight):
        keys = generator.random((len(tight), 2 * count))
        keys[np.arange(2 * count) >= sizes[tight][:, None]] = 2.0
        ranks[tight] = np.argsort(keys, axis=1, kind="stable")[:, :count]
    # plenty: keep the first of equal values and draw the others again, which is sampling without replacement
    rows = np.flatnonzero(sizes >= 2 * count)
    while len(rows):
        order = np.argsort(ranks[rows], axis=1, kind="stable")
        ordered = np.take_along_axis(ranks[rows], order, axis=1)
        repeated = np.zeros(ordered.shape, dtype=bool)
        np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
        where, column = np.nonzero(repeated)
        ranks[rows[where], column] = generator.integers(0, sizes[rows[where]])
        rows = rows[np.unique(where)]
    return ranks
