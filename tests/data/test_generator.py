from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from td3_fast.data import Examples, generate_interactions, leave_one_out


def hit_rate(scores: np.ndarray, examples: Examples, cutoff: int = 10) -> float:
    """HR among all items but padding and the history; ties count against."""
    log, targets = examples.interactions, examples.targets
    of_target = scores[np.arange(len(examples)), targets].copy()
    scores[:, 0] = -np.inf
    for row, (user, end) in enumerate(zip(examples.users, examples.ends, strict=True)):
        scores[row, log.items[log.offsets[user] : end]] = -np.inf
    scores[np.arange(len(examples)), targets] = of_target
    return float(((scores >= of_target[:, None]).sum(axis=1) <= cutoff).mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_transitions_tell_far_more_than_popularity(seed: int) -> None:
    log = generate_interactions(seed=seed)
    _, train, _, test = leave_one_out(log)
    popularity = np.bincount(train.targets, minlength=log.num_items).astype(float)
    transitions = np.zeros((log.num_items, log.num_items))
    np.add.at(transitions, (log.items[train.ends - 1], train.targets), 1)
    markov = transitions[log.items[test.ends - 1]] + 1e-6 * popularity
    by_popularity = hit_rate(np.tile(popularity, (len(test), 1)), test)
    assert by_popularity < 0.2
    assert hit_rate(markov, test) > by_popularity + 0.4


def test_default_size_suits_a_demonstration() -> None:
    log = generate_interactions(seed=0)
    assert log.num_users == 600
    assert 380 <= log.num_items - 1 <= 400
    assert 26 <= log.lengths.mean() <= 34
    assert log.lengths.min() >= 5


def test_same_seed_same_data() -> None:
    first = generate_interactions(seed=7, num_users=50)
    assert first.fingerprint == generate_interactions(seed=7, num_users=50).fingerprint
    assert first.fingerprint != generate_interactions(seed=8, num_users=50).fingerprint


def test_popularity_is_skewed_and_repeats_are_rare() -> None:
    log = generate_interactions(seed=0)
    counts = np.sort(np.bincount(log.items, minlength=log.num_items)[1:])[::-1]
    assert counts[: len(counts) // 10].sum() > 2 * counts.sum() / 10
    pairs = np.repeat(np.arange(log.num_users), log.lengths) * log.num_items + log.items
    assert len(pairs) - len(np.unique(pairs)) < 0.01 * len(pairs)


@pytest.mark.parametrize(
    "options",
    [
        {"num_users": 1, "num_items": 1, "num_clusters": 1, "mean_length": 5},
        {"num_users": 5, "num_items": 3, "num_clusters": 3, "mean_length": 20},
        {"num_users": 5, "num_items": 10, "mean_length": 1, "min_length": 1},
        {"num_users": 20, "follow": 1.0, "stray": 0.0},
        {"num_users": 20, "follow": 0.0, "stray": 1.0},
    ],
)
def test_extreme_arguments_work(options: dict[str, Any]) -> None:
    log = generate_interactions(seed=0, **options)
    assert log.num_users == options["num_users"]
    assert 1 <= log.items.min() <= log.items.max() <= log.num_items - 1 <= options.get("num_items", 400)


@pytest.mark.parametrize(
    "options",
    [
        {"num_users": 0},
        {"num_items": 5, "num_clusters": 6},
        {"mean_length": 3},
        {"num_successors": 0},
        {"follow": 0.8, "stray": 0.3},
        {"follow": -0.1},
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        generate_interactions(seed=0, **options)
