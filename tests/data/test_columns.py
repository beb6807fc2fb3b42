"""Columns by their usual names, separators and times as files of all kinds have them."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_readers import as_lists, write

from td3_fast.data import filter_interactions, generate_interactions, load_interactions


@pytest.mark.parametrize(
    "text",
    [
        "UserID,ItemID,Rating,Date\na,y,5,2020-05-02\na,x,3,2020-05-01 23:59:59.5\nb,x,1,2020-05-01T10:00Z\n",
        "user id;item-id;event_time\na;y;2020-05-01T00:30:00+00:00\na;x;2020-05-01T02:00:00+02:00\nb;x;2021-01-01\n",
        'customer_id;"product_id";ts\na;"y";20\n"a";x;10\nb;x;5\n',
    ],
)
def test_names_separators_and_dates_as_they_are_found(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, "log.csv", text)
    assert as_lists(path) == {"a": ["x", "y"], "b": ["x"]}
    assert load_interactions(path).timed


def test_a_preferred_name_is_taken_before_its_other_writings(tmp_path: Path) -> None:
    path = write(
        tmp_path, "log.csv", "USERID,user_id,item,date,time\n1,a,y,2020-01-01,2\n1,a,x,2020-01-02,1\n"
    )
    assert as_lists(path) == {"a": ["x", "y"]}


def test_a_log_without_times_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, "log.csv", "user,item,when\na,y,2\na,x,1\n")
    assert as_lists(path) == {"a": ["y", "x"]}
    assert "no times: in the order of the file" in repr(load_interactions(path))
    assert "no times" not in repr(load_interactions(path, columns={"timestamp": "when"}))


def test_dates_keep_their_order_to_the_microsecond_and_from_block_to_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("td3_fast.data.text_table._BLOCK_BYTES", 64)
    lines = [f"a,i{n},2020-01-01T00:00:00.{n:06d}\n" for n in (5, 3, 4, 1, 2, 0)]
    path = write(tmp_path, "log.csv", "user,item,time\n" + "".join(lines))
    assert as_lists(path) == {"a": [f"i{n}" for n in range(6)]}


def test_filters_keep_whether_there_were_times() -> None:
    generated = generate_interactions(num_users=9, num_items=12, mean_length=6, seed=0)
    assert filter_interactions(generated, min_user_interactions=2).timed == generated.timed
