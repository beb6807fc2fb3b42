from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from td3_fast.data import Examples, generate_interactions, leave_one_out, load_interactions

# Ten rows. Rina's times tie: c, d, e keep the order of the rows. Sven has 3 interactions, Tom 2, Uma 1.
ROWS = [
    ("rina", "c", 7),
    ("sven", "a", 5),
    ("rina", "d", 7),
    ("tom", "a", 2),
    ("rina", "a", 1),
    ("sven", "b", 4),
    ("uma", "b", 1),
    ("rina", "e", 7),
    ("tom", "c", 1),
    ("sven", "c", 9),
]


@pytest.fixture
def log():
    return load_interactions(pd.DataFrame(ROWS, columns=["user", "item", "timestamp"]))


def readable(examples: Examples) -> list[tuple[str, str, str]]:
    """(user, history, target), one letter an item."""
    log = examples.interactions
    return [
        (
            str(log.user_ids[user]),
            "".join(log.item_ids[log.items[log.offsets[user] : end]]),
            str(log.item_ids[log.items[end]]),
        )
        for user, end in zip(examples.users, examples.ends, strict=True)
    ]


def test_split_of_ten_rows(log) -> None:
    interactions, train, validation, test = leave_one_out(log)
    assert interactions is log
    assert readable(test) == [("rina", "acd", "e"), ("sven", "ba", "c")]
    assert readable(validation) == [("rina", "ac", "d"), ("sven", "b", "a")]
    # sven's training part is a single item: no example; tom and uma train with all they have
    assert readable(train) == [("rina", "a", "c"), ("tom", "c", "a")]


def test_examples_know_their_targets_and_lengths(log) -> None:
    test = leave_one_out(log).test
    assert len(test) == 2
    assert log.item_ids[test.targets].tolist() == ["e", "c"]
    assert test.targets.dtype == np.int64
    assert test.lengths.tolist() == [3, 2]
    assert repr(test) == "Examples(2 of 'DataFrame')"


@pytest.mark.parametrize("index", [[1], np.array([1]), np.array([False, True])])
def test_subset_takes_indices_and_masks(log, index) -> None:
    assert readable(leave_one_out(log).test.subset(index)) == [("sven", "ba", "c")]


def test_empty_subset_is_empty(log) -> None:
    assert len(leave_one_out(log).test.subset([])) == 0


def test_every_interaction_but_the_first_of_a_user_is_a_target_once() -> None:
    log = generate_interactions(seed=0, num_users=50, num_items=40, mean_length=8)
    _, train, validation, test = leave_one_out(log)
    ends = np.concatenate([train.ends, validation.ends, test.ends])
    assert sorted(ends.tolist()) == sorted(set(range(log.num_interactions)) - set(log.offsets[:-1].tolist()))
    for part in (train, validation, test):
        assert (log.offsets[part.users] < part.ends).all()
        assert (part.ends < log.offsets[part.users + 1]).all()


def test_data_of_short_users_only_have_no_test() -> None:
    frame = pd.DataFrame({"user": ["a", "a", "b"], "item": ["x", "y", "x"]})
    split = leave_one_out(load_interactions(frame))
    assert len(split.test) == len(split.validation) == 0
    assert readable(split.train) == [("a", "x", "y")]


def test_item_counts_of_a_training_part_are_its_interactions() -> None:
    log = generate_interactions(seed=0, num_users=50, num_items=40, mean_length=8)
    counts = np.zeros(log.num_items, dtype=np.int64)
    for user in range(log.num_users):
        items = log.items[log.offsets[user] : log.offsets[user + 1]]
        np.add.at(counts, items[: len(items) - 2], 1)
    assert leave_one_out(log).train.item_counts.tolist() == counts.tolist()
