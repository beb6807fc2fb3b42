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
    switch: float = 0.1,
    popularity_exponent: float = 1.0,
    min_length: int = 5,
    name: str = "synthetic",
) -> Interactions:
    """Users who walk through clusters of items along planted item-to-item transitions.

    Every item belongs to one cluster and has `num_successors` successors in it. The next item of a user is,
    with probability `follow`, a successor of the last one (the first successor most often); with
    probability `switch`, a popular item of the cluster that comes next in a fixed cycle; otherwise a
    popular item of the same cluster. Popularity is Zipf's: the k-th item has weight 1 /
    k^popularity_exponent. Users rarely meet an item twice. A sequential learner can use all of it, a
    popularity count next to nothing. Memory O(interactions + items).

    Args:
        num_users, num_items: without padding; items that nobody met are left out.
        mean_length: mean interactions of a user; lengths are `min_length` plus a geometric variable.
        seed: the only source of randomness; the same arguments give the same data.
    """
    if num_users < 1 or num_items < 1 or not 1 <= num_clusters <= num_items:
        raise ValueError("num_users and num_items must be positive, num_clusters between 1 and num_items")
    if min_length < 1 or mean_length < min_length or num_successors < 1:
        raise ValueError("min_length and num_successors must be at least 1, mean_length at least min_length")
    if follow < 0 or switch < 0 or follow + switch > 1:
        raise ValueError("follow and switch must be probabilities that sum to at most 1")
    generator = np.random.Generator(np.random.Philox(seed))

    # items sorted by cluster: cluster c owns bounds[c] .. bounds[c + 1] - 1; `mass` is cumulative popularity
    cluster_of = np.sort(np.arange(num_items) % num_clusters)
    bounds = np.searchsorted(cluster_of, np.arange(num_clusters + 1))
    weights = (1.0 + generator.permutation(num_items)) ** -popularity_exponent
    mass = np.concatenate([[0.0], np.cumsum(weights)])

    def popular(cluster: NDArray[np.int64]) -> NDArray[np.int64]:
        low, high = mass[bounds[cluster]], mass[bounds[cluster + 1]]
        draw = low + (high - low) * generator.random(len(cluster))
        item = np.searchsorted(mass, draw, side="right") - 1
        return np.clip(item, bounds[cluster], bounds[cluster + 1] - 1)  # rounding at the upper end

    sizes = np.diff(bounds)[cluster_of]
    successors = bounds[cluster_of][:, None] + generator.integers(
        0, sizes[:, None], (num_items, num_successors)
    )
    preference = np.cumsum(1.0 / np.arange(1, num_successors + 1))
    preference /= preference[-1]

    extra = mean_length - min_length
    lengths = np.full(num_users, min_length)
    if extra > 0:
        lengths += generator.geometric(1.0 / (1.0 + extra), num_users) - 1
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = np.empty(offsets[-1], dtype=np.int64)
    last = popular(generator.integers(0, num_clusters, num_users))
    items[offsets[:-1]] = last

    def propose(users: NDArray[np.int64]) -> NDArray[np.int64]:
        previous, kind = last[users], generator.random(len(users))
        rank = np.searchsorted(preference, generator.random(len(users)), side="right")
        moved = (cluster_of[previous] + (kind >= 1.0 - switch)) % num_clusters
        return np.where(kind < follow, successors[previous, rank], popular(moved))

    for step in range(1, int(lengths.max())):
        active = np.flatnonzero(lengths > step)
        chosen = propose(active)
        for _ in range(_PROPOSALS):
            history = items[offsets[active][:, None] + np.arange(step)]
            again = np.flatnonzero((history == chosen[:, None]).any(axis=1))
            if not len(again):
                break
            chosen[again] = propose(active[again])
        items[offsets[active] + step] = chosen
        last[active] = chosen

    log = RawLog(
        users=np.repeat(np.arange(num_users, dtype=np.int32), lengths),
        items=items.astype(np.int32),
        times=None,
        user_ids=[f"u{user + 1}" for user in range(num_users)],
        item_ids=[f"i{item + 1}" for item in range(num_items)],
    )
    return assemble(log, np.arange(len(items)), name)
