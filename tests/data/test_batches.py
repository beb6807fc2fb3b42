from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from td3_fast.data import (
    ExamplesOnDevice,
    FewNegativesWarning,
    Interactions,
    cut_batch,
    generate_interactions,
    history_csr,
    leave_one_out,
    load_interactions,
    sample_negatives,
    shuffled,
)


@pytest.fixture(scope="module")
def log() -> Interactions:
    return generate_interactions(seed=0, num_users=60, num_items=50, mean_length=12, num_clusters=5)


@pytest.mark.parametrize("max_len", [1, 3, 10, 1000])
def test_batches_hold_the_last_items_of_each_history(log: Interactions, max_len: int) -> None:
    train = leave_one_out(log).train
    index = shuffled(len(train), seed=1)[:37]
    batch = cut_batch(train, index, max_len)
    longest = 0
    for row, k in enumerate(index):
        history = log.items[log.offsets[train.users[k]] : train.ends[k]][-max_len:].tolist()
        longest = max(longest, len(history))
        padded = history + [0] * (batch.histories.shape[1] - len(history))
        assert batch.histories[row].tolist() == padded
        assert batch.lengths[row] == len(history)
        assert batch.targets[row] == log.items[train.ends[k]]
    assert batch.histories.shape == (37, longest)
    assert {tensor.dtype for tensor in batch} == {torch.int64}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("max_len", [1, 3, 10, 1000])
def test_a_device_cuts_the_same_batches_as_wide_as_the_longest_history(
    device: str, log: Interactions, max_len: int
) -> None:
    train = leave_one_out(log).train
    index = np.concatenate([shuffled(len(train), seed=1)[:37], [len(train) - 1]])
    there = ExamplesOnDevice(train, max_len, torch.device(device))
    order = there.shortest_first(torch.from_numpy(index).to(device))
    by_length = index[np.argsort(train.lengths[index], kind="stable")]
    assert order.tolist() == by_length.tolist()
    histories, lengths, targets = (tensor.cpu() for tensor in there.cut(order))
    expected = cut_batch(train, by_length, max_len)
    width = expected.histories.shape[1]
    assert histories.shape == (38, min(train.lengths.max(), max_len))
    assert torch.equal(histories[:, :width], expected.histories)
    assert not histories[:, width:].any()
    assert torch.equal(lengths, expected.lengths)
    assert torch.equal(targets, expected.targets)
    assert {tensor.dtype for tensor in (histories, lengths, targets)} == {torch.int64}


def test_an_empty_batch_is_empty(log: Interactions) -> None:
    batch = cut_batch(leave_one_out(log).train, [], 10)
    assert batch.histories.shape == (0, 0)
    assert batch.lengths.shape == batch.targets.shape == (0,)
    there = ExamplesOnDevice(leave_one_out(log).train, 10, torch.device("cpu"))
    none = there.shortest_first(torch.arange(0))
    assert [tensor.shape for tensor in there.cut(none)] == [(0, 10), (0,), (0,)]


def test_max_len_must_be_positive(log: Interactions) -> None:
    with pytest.raises(ValueError, match="max_len must be at least 1"):
        cut_batch(leave_one_out(log).train, [0], 0)
    with pytest.raises(ValueError, match="max_len must be at least 1"):
        ExamplesOnDevice(leave_one_out(log).train, 0, torch.device("cpu"))


def test_shuffled_is_a_permutation_of_its_seed() -> None:
    first = shuffled(1000, seed=5)
    assert sorted(first.tolist()) == list(range(1000))
    np.testing.assert_array_equal(first, shuffled(1000, seed=5))
    assert (first != shuffled(1000, seed=6)).any()


@pytest.mark.parametrize("count", [1, 5, 20, 35])
def test_negatives_are_distinct_items_that_the_user_never_met(log: Interactions, count: int) -> None:
    test = leave_one_out(log).test
    negatives = sample_negatives(test, count, seed=0)
    assert negatives.shape == (len(test), count)
    assert negatives.dtype == np.int64
    assert 1 <= negatives.min() <= negatives.max() < log.num_items
    for user, row in zip(test.users, negatives, strict=True):
        met = set(log.items[log.offsets[user] : log.offsets[user + 1]].tolist())
        assert not met & set(row.tolist())
        if log.num_items - 1 - len(met) >= count:
            assert len(set(row.tolist())) == count


def test_negatives_are_a_function_of_the_seed(log: Interactions) -> None:
    test = leave_one_out(log).test
    first = sample_negatives(test, 10, seed=3)
    np.testing.assert_array_equal(first, sample_negatives(test, 10, seed=3))
    assert (first != sample_negatives(test, 10, seed=4)).any()


def one_user(num_items: int, met: int) -> Interactions:
    """User "a" met the first `met` of the items; user "all" makes sure that there are `num_items`."""
    rows = [("all", f"i{item}") for item in range(num_items)] + [("a", f"i{item}") for item in range(met)]
    return load_interactions(pd.DataFrame(rows, columns=["user", "item"]))


@pytest.mark.parametrize(("num_items", "count"), [(30, 5), (30, 12), (30, 20), (30, 27), (30, 40)])
def test_negatives_are_uniform(num_items: int, count: int) -> None:
    """Plenty to choose from, few, as many as asked for, and fewer than that."""
    log = one_user(num_items, 3)
    test = leave_one_out(log).test
    rows = 4000
    negatives = sample_negatives(test.subset(np.full(rows, 1)), count, seed=0)
    frequency = np.bincount(negatives.ravel(), minlength=log.num_items)
    assert frequency[:4].sum() == 0
    unseen = num_items - 3
    expected = rows * count / unseen
    assert abs(frequency[4:] - expected).max() < 6 * np.sqrt(expected) + 1e-9
    if count == unseen:
        assert (np.sort(negatives) == np.arange(4, log.num_items)).all()
    # no place within a row prefers an item either
    first = np.bincount(negatives[:, 0], minlength=log.num_items)[4:]
    last = np.bincount(negatives[:, -1], minlength=log.num_items)[4:]
    for place in (first, last):
        assert abs(place - rows / unseen).max() < 6 * np.sqrt(rows / unseen)


def test_a_user_who_met_every_item_has_no_negative() -> None:
    test = leave_one_out(one_user(10, 3)).test
    with pytest.raises(ValueError, match=r"user 'all' has interacted with every item.*leave that user"):
        sample_negatives(test, 1, seed=0)
    with pytest.raises(ValueError, match="count must be at least 1"):
        sample_negatives(test.subset([1]), 0, seed=0)


def test_history_csr_holds_whole_histories(log: Interactions) -> None:
    test = leave_one_out(log).test.subset([5, 2, 9])
    offsets, items = history_csr(test)
    assert offsets.dtype == items.dtype == torch.int64
    assert len(offsets) == 4
    for row, (user, end) in enumerate(zip(test.users, test.ends, strict=True)):
        expected = log.items[log.offsets[user] : end].tolist()
        assert items[offsets[row] : offsets[row + 1]].tolist() == expected


def test_history_csr_of_nothing_is_empty(log: Interactions) -> None:
    offsets, items = history_csr(leave_one_out(log).test.subset([]))
    assert offsets.tolist() == [0]
    assert len(items) == 0


def test_negatives_that_are_drawn_more_than_once_are_warned_of() -> None:
    split = leave_one_out(generate_interactions(num_users=20, num_items=50, mean_length=8, seed=0))
    with pytest.warns(FewNegativesWarning, match="20 of 20 examples .* fewer than 100 items"):
        sample_negatives(split.test, 100, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_negatives(split.test, 5, seed=0)
