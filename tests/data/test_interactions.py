from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from td3_fast.data import (
    Interactions,
    check_interactions,
    filter_interactions,
    generate_interactions,
    load_interactions,
    write_interactions,
)

# user, item, time
ROWS = [
    ("b", "x", 5),
    ("a", "y", 3),
    ("b", "z", 1),
    ("a", "y", 3),
    ("a", "x", 3),
    ("c", "w", 9),
    ("b", "x", 2),
    ("c", "y", 9),
]


def frame(rows: list[tuple[Any, ...]] = ROWS) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["user", "item", "timestamp"])


def sequences(log: Interactions) -> dict[str, str]:
    """The sequence of each user, one letter an item."""
    return {
        user: "".join(log.item_ids[log.items[log.offsets[index] : log.offsets[index + 1]]])
        for index, user in enumerate(log.user_ids.tolist())
    }


def test_users_and_items_are_numbered_by_first_appearance_and_sorted_by_time() -> None:
    log = load_interactions(frame(), name="ten rows")
    assert log.user_ids.tolist() == ["b", "a", "c"]
    assert log.item_ids.tolist() == ["[PAD]", "x", "y", "z", "w"]
    assert log.offsets.tolist() == [0, 3, 6, 8]
    assert log.items.tolist() == [3, 1, 1, 2, 2, 1, 4, 2]
    assert log.offsets.dtype == np.int64
    assert log.items.dtype == np.int32
    assert (log.num_users, log.num_items, log.num_interactions) == (3, 5, 8)
    assert repr(log) == "Interactions('ten rows', 3 users, 4 items, 8 interactions)"


@pytest.mark.parametrize(
    ("repeats", "expected"),
    [
        ("keep", {"b": "zxx", "a": "yyx", "c": "wy"}),
        ("first", {"b": "zx", "a": "yx", "c": "wy"}),
        ("last", {"b": "zx", "a": "yx", "c": "wy"}),
    ],
)
def test_repeats(repeats: Any, expected: dict[str, str]) -> None:
    assert sequences(load_interactions(frame(), repeats=repeats)) == expected


def test_first_and_last_of_repeats_are_by_time_not_by_row() -> None:
    rows = [("a", "x", 3), ("a", "y", 2), ("a", "x", 1)]
    assert sequences(load_interactions(frame(rows), repeats="first")) == {"a": "xy"}
    assert sequences(load_interactions(frame(rows), repeats="last")) == {"a": "yx"}


def test_items_are_filtered_before_users_and_once_by_default() -> None:
    # z and w go for want of interactions; then b has 2, a has 3, c has 1
    assert sequences(load_interactions(frame(), min_item_interactions=2, min_user_interactions=2)) == {
        "b": "xx",
        "a": "yyx",
    }
    # the other order would keep c, which has 2 interactions until w goes
    assert "c" not in load_interactions(frame(), min_item_interactions=2, min_user_interactions=2).user_ids


def test_filters_repeat_as_often_as_asked_or_until_stable() -> None:
    # a chain that loses one user a pass: u0 falls with item 0, then item 1 with u0, ...
    rows = [(f"u{k}", f"i{k}", 0) for k in range(6)] + [(f"u{k}", f"i{k + 1}", 1) for k in range(6)]
    rows += [(user, item, 2) for user in ("p", "q") for item in ("i6", "j", "k")]
    options: dict[str, Any] = {"min_item_interactions": 2, "min_user_interactions": 2}
    for passes in (1, 2, 6):
        log = load_interactions(frame(rows), **options, filter_passes=passes)
        assert log.user_ids.tolist() == [f"u{k}" for k in range(passes, 6)] + ["p", "q"]
    stable = load_interactions(frame(rows), **options, filter_passes=None)
    assert stable.user_ids.tolist() == ["p", "q"]
    counts = np.bincount(stable.items, minlength=stable.num_items)[1:]
    assert counts.min() >= 2
    assert stable.lengths.min() >= 2


def test_left_out_users_and_items_get_no_number() -> None:
    log = load_interactions(frame(), min_item_interactions=3)
    assert log.item_ids.tolist() == ["[PAD]", "x", "y"]
    assert sorted(set(log.items.tolist())) == [1, 2]


def test_nothing_left_and_arguments_out_of_range_are_errors() -> None:
    with pytest.raises(ValueError, match="no interaction is left with min_item_interactions=9"):
        load_interactions(frame(), min_item_interactions=9)
    with pytest.raises(ValueError, match="must not be negative"):
        load_interactions(frame(), min_user_interactions=-1)
    with pytest.raises(ValueError, match="filter_passes must be at least 1"):
        load_interactions(frame(), filter_passes=0)
    with pytest.raises(ValueError, match="repeats must be"):
        load_interactions(frame(), repeats="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="format is for files"):
        load_interactions(frame(), format="csv")


def test_fingerprint_is_of_the_contents_alone() -> None:
    log = load_interactions(frame(), name="one")
    assert log.fingerprint == load_interactions(frame(), name="two").fingerprint
    shuffled = frame([*ROWS[1:], ROWS[0]])
    renamed = frame([(user, item.upper(), time) for user, item, time in ROWS])
    later = frame([(user, item, time if item != "w" else 10) for user, item, time in ROWS])
    prints = {load_interactions(other).fingerprint for other in (frame(), shuffled, renamed, later)}
    assert len(prints) == 4
    assert all(len(value) == 64 for value in prints)


def test_arrays_are_read_only_and_fit_together() -> None:
    log = load_interactions(frame())
    with pytest.raises(ValueError, match="read-only"):
        log.items[0] = 1
    parts = {
        "offsets": np.array([0, 2]),
        "items": np.array([1, 2], dtype=np.int32),
        "item_ids": np.array(["[PAD]", "x", "y"]),
        "user_ids": np.array(["a"]),
    }
    Interactions(**parts, name="fits")
    for part, array, message in (
        ("offsets", np.array([0, 3]), "offsets end at 3"),
        ("offsets", np.array([0, 1, 2]), "one more than the users"),
        ("items", np.array([0, 2], dtype=np.int32), "items must lie in 1 .. 2"),
        ("item_ids", np.array(["x", "y", "z"]), "must start with"),
    ):
        with pytest.raises(ValueError, match=message):
            Interactions(**(parts | {part: array}), name="does not fit")


def test_filtering_data_at_hand_equals_filtering_while_loading() -> None:
    whole = load_interactions(frame())
    for options in ({}, {"min_item_interactions": 2}, {"repeats": "first", "min_user_interactions": 2}):
        expected = load_interactions(frame(), **options)  # type: ignore[arg-type]
        found = filter_interactions(whole, **options)  # type: ignore[arg-type]
        assert sequences(found) == sequences(expected)
    generated = generate_interactions(seed=0, num_users=20, num_items=30)
    assert filter_interactions(generated).fingerprint == generated.fingerprint


@pytest.mark.parametrize("name", ["out.inter", "out.inter.gz"])
def test_what_is_written_is_read_back(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    generated = generate_interactions(seed=3, num_users=40, num_items=50)
    write_interactions(generated, path)
    read = load_interactions(path)
    assert read.fingerprint == generated.fingerprint
    assert read.name == "out"
    first = path.read_bytes()
    write_interactions(generated, path)
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_report_counts_by_hand() -> None:
    report = check_interactions(frame())
    assert (report.num_users, report.num_items, report.num_interactions) == (3, 4, 8)
    assert (report.shortest, report.median_length, report.longest) == (2, 3.0, 3)
    assert report.mean_length == pytest.approx(8 / 3)
    assert report.short_users == 1
    assert report.repeats == 2
    assert report.has_times
    assert (report.ties, report.neighbours) == (3, 5)
    timeless = check_interactions(frame(), columns={"timestamp": None})
    assert not timeless.has_times
    assert timeless.ties == 0


def test_arrays_of_the_caller_stay_his_own() -> None:
    offsets, items = np.array([0, 2]), np.array([1, 1], dtype=np.int32)
    ids, users = np.array(["[PAD]", "a"]), np.array(["u"])
    log = Interactions(offsets=offsets, items=items, item_ids=ids, user_ids=users, name="x")
    assert items.flags.writeable
    assert not log.items.flags.writeable
