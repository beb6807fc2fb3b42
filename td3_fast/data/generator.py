"""Sequential data with planted structure, so that everything runs with no file at all."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from td3_fast.data.interactions import Interactions, assemble
from td3_fast.data.raw_log import RawLog

_PROPOSALS = 8  # attempts at an item that the user has not had; then a repeat is accepted


def generate_interactions(
    *,
    num_users: int = 600,
    num_items: int = 400,
    mean_length: float = 30.0,
    seed: int,
    num_clusters: int = 10,
    num_successors: int = 4,
    follow: float = 0.7,
    stray: float = 0.1,
    popularity_exponent: float = 1.0,
    min_length: int = 5,
    name: str = "synthetic",
) -> Interactions:
    """Users who walk around a cycle of item clusters along planted item-to-item transitions.

    Every item has `num_successors` successors in the next cluster of the cycle. The next item of a user is,
    with probability `follow`, a successor of the last one (the first of them most often); with probability
    `stray`, a popular item of any cluster; else a popular item of the next cluster. Popularity is Zipf's: the
    k-th item has weight k^-popularity_exponent. Users rarely meet an item twice. So a sequential learner has
    much to learn, a popularity count little, and similarity without direction (an item is as close to what
    comes before it as to what comes after) only a part. Memory O(interactions + items).

    Args:
        num_users: users.
        num_items: items without padding; those that nobody meets are left out.
        mean_length: mean interactions of a user; lengths are `min_length` plus a geometric variable.
        seed: the same seed and arguments give the same data.
        num_clusters, num_successors, follow, stray, popularity_exponent: as above.
        min_length: interactions of a user at least.
        name: what to call the data.

    Raises:
        ValueError: an argument out of range.
    """
    if num_users < 1 or num_items < 1 or not 1 <= num_clusters <= num_items:
        raise ValueError("num_users and num_items must be at least 1, num_clusters between 1 and num_items")
    if min_length < 1 or not min_length <= mean_length < float("inf") or num_successors < 1:
        raise ValueError(
            "min_length and num_successors must be at least 1, mean_length finite and at least min_length"
        )
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if min(follow, stray) < 0 or follow + stray > 1:
        raise ValueError("follow and stray must be probabilities with a sum of at most 1")
    generator = np.random.Generator(np.random.Philox(seed))

    # cluster c owns the items bounds[c] .. bounds[c + 1] - 1
    cluster_of = np.sort(np.arange(num_items) % num_clusters)
    bounds = np.searchsorted(cluster_of, np.arange(num_clusters + 1))
    weights = (1.0 + generator.permutation(num_items)) ** -popularity_exponent
    mass = np.concatenate([[0.0], np.cumsum(weights)])
    following = (cluster_of + 1) % num_clusters
    sizes = np.diff(bounds)[following, None]
    successors = bounds[following, None] + generator.integers(0, sizes, (num_items, num_successors))
    preference = np.cumsum(1.0 / np.arange(1, num_successors + 1))
    preference /= preference[-1]

    def popular(cluster: NDArray[np.int64]) -> NDArray[np.int64]:
        first, last = bounds[cluster], bounds[cluster + 1] - 1
        draw = mass[first] + (mass[last + 1] - mass[first]) * generator.random(len(cluster))
        return np.clip(np.searchsorted(mass, draw, side="right") - 1, first, last)  # rounding at the ends

    def propose(previous: NDArray[np.int64]) -> NDArray[np.int64]:
        kind = generator.random(len(previous))
        rank = np.searchsorted(preference, generator.random(len(previous)), side="right")
        anywhere = generator.integers(0, num_clusters, len(previous))
        cluster = np.where(kind >= 1.0 - stray, anywhere, following[previous])
        return np.where(kind < follow, successors[previous, rank], popular(cluster))

    lengths = min_length - 1 + generator.geometric(1.0 / (1.0 + mean_length - min_length), num_users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = np.empty(offsets[-1], dtype=np.int64)
    items[offsets[:-1]] = popular(generator.integers(0, num_clusters, num_users))
    for step in range(1, int(lengths.max())):
        start = offsets[:-1][lengths > step]
        previous = items[start + step - 1]
        chosen = propose(previous)
        history = items[start[:, None] + np.arange(step)]
        for _ in range(_PROPOSALS):
            again = np.flatnonzero((history == chosen[:, None]).any(axis=1))
            if not len(again):
                break
            chosen[again] = propose(previous[again])
        items[start + step] = chosen

    log = RawLog(
        users=np.repeat(np.arange(num_users, dtype=np.int32), lengths),
        items=items.astype(np.int32),
        times=None,
        user_ids=[f"u{user + 1}" for user in range(num_users)],
        item_ids=[f"i{item + 1}" for item in range(num_items)],
    )
    return assemble(log, np.arange(len(items)), name, timed=True)
