"""Leave-one-out: the last interaction of a user tests, the one before validates, the rest trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from td3_fast.data.interactions import Interactions

MIN_LENGTH = 3  # one interaction to train on, one to validate, one to test


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Examples:
    """(history, next item) pairs as two integers each; `batches.cut_batch` cuts the histories out.

    Example `k` has the target `items[ends[k]]` and the history `items[offsets[users[k]]:ends[k]]`, never
    empty.
    """

    interactions: Interactions
    users: NDArray[np.int64]  # (examples,)
    ends: NDArray[np.int64]  # (examples,) index into interactions.items

    def __len__(self) -> int:
        return len(self.ends)

    def __repr__(self) -> str:
        return f"Examples({len(self):,} of {self.interactions.name!r})"

    @property
    def targets(self) -> NDArray[np.int64]:
        """The item to predict, (examples,)."""
        return self.interactions.items[self.ends].astype(np.int64)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Items in each history before any cut, (examples,)."""
        return self.ends - self.interactions.offsets[self.users]

    @property
    def item_counts(self) -> NDArray[np.int64]:
        """How often each item is a target or the first item of a user, (num_items,).

        For a training part, where every item but a user's first is the target of one example, its popularity among
        users who have an example.
        """
        log = self.interactions
        first = log.items[log.offsets[np.unique(self.users)]]
        return np.bincount(self.targets, minlength=log.num_items) + np.bincount(
            first, minlength=log.num_items
        )

    def subset(self, index: ArrayLike) -> Examples:
        """The examples at `index` (integers or a mask), in that order."""
        index = np.asarray(index)
        if index.size == 0:
            index = index.astype(np.int64)
        return Examples(interactions=self.interactions, users=self.users[index], ends=self.ends[index])


class Split(NamedTuple):
    """The parts of leave-one-out; `interactions` is what they were cut from."""

    interactions: Interactions
    train: Examples
    validation: Examples
    test: Examples


def leave_one_out(interactions: Interactions) -> Split:
    """Split by time inside each user; equal times keep the order of the file.

    Training examples: every prefix of a user's training part with at least one item of history. The history
    of a test example contains the validation item. A user with fewer than 3 interactions has neither
    validation nor test, and all of them train.
    """
    lengths = interactions.lengths
    tested = np.flatnonzero(lengths >= MIN_LENGTH)
    last = interactions.offsets[tested + 1] - 1

    trains = np.ones(interactions.num_interactions, dtype=bool)
    trains[last] = False
    trains[last - 1] = False
    everything = every_prefix(interactions)

    def examples(users: NDArray[np.int64], ends: NDArray[np.int64]) -> Examples:
        return Examples(interactions=interactions, users=users, ends=ends)

    return Split(
        interactions,
        everything.subset(trains[everything.ends]),
        examples(tested, last - 1),
        examples(tested, last),
    )


def every_prefix(interactions: Interactions) -> Examples:
    """All of a log as training examples: every interaction but a user's first is the target of what is before it."""
    lengths = interactions.lengths
    user_of = np.repeat(np.arange(interactions.num_users), lengths)  # (interactions,)
    is_target = np.ones(interactions.num_interactions, dtype=bool)
    is_target[interactions.offsets[:-1][lengths > 0]] = False  # no history before the first
    ends = np.flatnonzero(is_target)
    return Examples(interactions=interactions, users=user_of[ends], ends=ends)
