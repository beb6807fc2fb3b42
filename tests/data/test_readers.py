"""What is read, and what is refused with its place."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from td3_fast.data import DataError, load_interactions, text_table
from td3_fast.data.raw_log import TimeColumn

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def as_lists(source: Any, **options: Any) -> dict[str, list[str]]:
    """Item ids of each user id."""
    log = load_interactions(source, **options)
    return {
        user: log.item_ids[log.items[log.offsets[index] : log.offsets[index + 1]]].tolist()
        for index, user in enumerate(log.user_ids.tolist())
    }


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return path


ALICE_AND_007 = {"007": ["x", "y"], "alice": ["y"]}
REVIEWS_2018 = [
    {"reviewerID": "007", "asin": "y", "unixReviewTime": 20, "overall": 5.0, "reviewText": 'says "asin": 7'},
    {"reviewerID": "alice", "asin": "y", "unixReviewTime": 5},
    {"reviewerID": "007", "asin": "x", "unixReviewTime": 10},
]
REVIEWS_2023 = [
    {"user_id": "007", "asin": "z", "parent_asin": "y", "timestamp": 1588687728923},
    {"user_id": "alice", "asin": "y", "parent_asin": "y", "timestamp": 1588687728000},
    {"user_id": "007", "asin": "x", "parent_asin": "x", "timestamp": 1588687728922},
]


def json_lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("a.inter", INTER + "007\ty\t5\t20\nalice\ty\t1\t5\n007\tx\t3\t10\n", id="inter"),
        pytest.param(
            "a.inter",
            "rating:float\ttimestamp:float\titem_id:token\tuser_id:token\tgenre:token_seq\n"
            "5\t20\ty\t007\ta b\n1\t5\ty\talice\t\n3\t10\tx\t007\tc\n",
            id="inter, other order",
        ),
        pytest.param("u.data", "007\ty\t5\t20\nalice\ty\t1\t5\n007\tx\t3\t10\n", id="u.data"),
        pytest.param("ratings.dat", "007::y::5::20\nalice::y::1::5\n007::x::3::10\n", id="ratings.dat"),
        pytest.param(
            "ratings.csv",
            "userId,movieId,rating,timestamp\n007,y,5,20\nalice,y,1,5\n007,x,3,10\n",
            id="ratings.csv",
        ),
        pytest.param(
            "Gift_Cards.csv",
            "user_id,parent_asin,rating,timestamp,history\n007,y,5.0,20,\nalice,y,1.0,5,\n007,x,3.0,10,y\n",
            id="Amazon 2023 csv",
        ),
        pytest.param("r.json", json_lines(REVIEWS_2018), id="Amazon 2018 json"),
        pytest.param("r.jsonl", json_lines(REVIEWS_2023), id="Amazon 2023 json"),
        pytest.param("log.tsv", "user\titem\ttime\n007\ty\t20\nalice\ty\t5\n007\tx\t10\n", id="tsv"),
        pytest.param("log", "user\titem\ttime\n007\ty\t20\nalice\ty\t5\n007\tx\t10\n", id="tsv by content"),
        pytest.param("log", "007\ty\t5\t20\nalice\ty\t1\t5\n007\tx\t3\t10\n", id="u.data by content"),
        pytest.param("log", "007::y::5::20\nalice::y::1::5\n007::x::3::10\n", id="ratings.dat by content"),
        pytest.param("log", INTER + "007\ty\t5\t20\nalice\ty\t1\t5\n007\tx\t3\t10\n", id="inter by content"),
        pytest.param("log", json_lines(REVIEWS_2018), id="json by content"),
        pytest.param("log", "user,item,time\n007,y,20\nalice,y,5\n007,x,10\n", id="csv by content"),
        pytest.param("quoted.csv", 'user,item,time\n"007",y,20\nalice,"y",5\n007,x,"10"\n', id="quotes"),
        pytest.param(
            "bom.csv", "\ufeffuser,item,time\n007,y,20\nalice,y,5\n007,x,10\n", id="byte-order mark"
        ),
        pytest.param("crlf.csv", "user,item,time\r\n007,y,20\r\nalice,y,5\r\n007,x,10\r\n", id="CRLF"),
        pytest.param("end.csv", "user,item,time\n007,y,20\nalice,y,5\n007,x,10", id="no last line feed"),
        pytest.param(
            "end.csv", "user,item,time\n007,y,20\nalice,y,5\n007,x,10\n\n\r\n", id="blank lines at the end"
        ),
        pytest.param(
            "float.csv", "user,item,time\n007,y,2e1\nalice,y,-5.5\n007,x,.1\n", id="times with fractions"
        ),
        pytest.param(
            "long.csv",
            "user,item,time\n007,y,9223372036854775807\nalice,y,1\n007,x,9223372036854775806\n",
            id="times of 19 digits",
        ),
        pytest.param(
            "longer.csv",
            "user,item,time\n007,y,99999999999999999999\nalice,y,1\n007,x,9999999999999999999\n",
            id="times of 20 digits",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_format_gives_the_same_sequences(tmp_path: Path, name: str, content: str, suffix: str) -> None:
    assert as_lists(write(tmp_path, name + suffix, content)) == ALICE_AND_007


@pytest.mark.parametrize(
    "line", ["B00005N7P0,AH2IFH762VY5U,5.0,1005177600", "AH2IFH762VY5U,B00005N7P0,5.0,1005177600"]
)
def test_both_orders_of_amazon_ratings_are_recognised(tmp_path: Path, line: str) -> None:
    assert as_lists(write(tmp_path, "ratings.csv", line + "\n")) == {"AH2IFH762VY5U": ["B00005N7P0"]}


def test_named_format_overrides_the_guess(tmp_path: Path) -> None:
    path = write(tmp_path, "log.csv", "1,2,5,100\n")
    assert as_lists(path, format="csv-user-item") == {"1": ["2"]}
    assert as_lists(path, format="csv-item-user") == {"2": ["1"]}


def test_columns_override_the_usual_names(tmp_path: Path) -> None:
    path = write(tmp_path, "log.csv", "user_id,who,what,when,timestamp\n1,a,x,2,0\n1,a,y,1,9\n")
    names = {"user": "who", "item": "what", "timestamp": "when"}
    assert as_lists(path, columns=names) == {"a": ["y", "x"]}
    assert as_lists(path, columns=names | {"timestamp": None}) == {"a": ["x", "y"]}


def test_without_times_the_order_of_the_file_counts(tmp_path: Path) -> None:
    path = write(tmp_path, "log.inter", "user_id:token\titem_id:token\n1\tb\n2\tb\n1\ta\n")
    assert as_lists(path) == {"1": ["b", "a"], "2": ["b"]}


def test_times_of_json_are_numbers_or_dates_or_left_out(tmp_path: Path) -> None:
    for name, times in (("a", ["2024-05-31", "2024-05-30"]), ("b", ["12", "3"]), ("c", [12.5, 3])):
        records = [{"user": "1", "item": i, "timestamp": t} for i, t in zip("ba", times, strict=True)]
        assert as_lists(write(tmp_path, f"{name}.jsonl", json_lines(records))) == {"1": ["a", "b"]}
    path = write(tmp_path, "d.jsonl", json_lines([{"user": "1", "item": "b"}, {"user": "1", "item": "a"}]))
    assert as_lists(path) == {"1": ["b", "a"]}
    assert not load_interactions(path).timed


@pytest.mark.parametrize("block_bytes", [1 << 23, 16])
def test_equal_times_that_are_written_otherwise_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(text_table, "_BLOCK_BYTES", block_bytes)
    lines = "1,b,1700000000.1\n1,a,1700000000.1000000000000000\n1,c,1700000000.10\n"
    assert as_lists(write(tmp_path, "log.csv", "user,item,time\n" + lines)) == {"1": ["b", "a", "c"]}


NANOSECONDS = 1_700_000_000_000_000_000


@pytest.mark.parametrize("block_bytes", [1 << 23, 16])
@pytest.mark.parametrize(
    "times",
    [
        [f"2024-05-31T20:15:00.00000000{digit}" for digit in (9, 8, 7)],
        [f"2024-05-31 20:15:00.00000000{digit}+02:00" for digit in (9, 8, 7)],
        ["9999-12-31", "0001-01-02", "0001-01-01"],
        [str(NANOSECONDS + 2), str(NANOSECONDS + 1), "1.5"],
        [f"{NANOSECONDS + more}.0" for more in (2, 1, 0)],
        [str(2**64 + more) for more in (2, 1, 0)],
        [f"1700000000.12345{digit}" for digit in (9, 8, 7)],
        [f"1700000000.12345678{digit}" for digit in (9, 8, 7)],
        ["1700000000.1", "1700000000.09999995", "1700000000.0999999"],
        ["9007199254740993", "9007199254740992", "1.5"],
        ["1.700000120622795E12", "1.7000001206227949e12", "1.43E12"],
        ["1.00000000000000000002", "1.00000000000000000001", "1"],
        ["1e3", "2.5e2", "-1e1"],
    ],
    ids=lambda times: times[0],
)
def test_times_that_differ_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, times: list[str]
) -> None:
    monkeypatch.setattr(text_table, "_BLOCK_BYTES", block_bytes)
    lines = "".join(f"1,{item},{time}\n" for item, time in zip("cba", times, strict=True))
    assert as_lists(write(tmp_path, "log.csv", "user,item,time\n" + lines)) == {"1": ["a", "b", "c"]}


@pytest.mark.parametrize(
    "times",
    [
        np.array([NANOSECONDS + 2, NANOSECONDS + 1, NANOSECONDS], dtype=np.uint64),
        np.array([2**64 - 1, 2**64 - 2, 0], dtype=np.uint64),
        [f"2024-05-31 20:15:00.00000000{digit}" for digit in (9, 8, 7)],
        pd.to_datetime([NANOSECONDS + 2, NANOSECONDS + 1, NANOSECONDS]),
    ],
    ids=["unsigned", "beyond int64", "text", "datetime"],
)
def test_times_of_a_frame_that_differ_are_told_apart(times: Any) -> None:
    frame = pd.DataFrame({"user": [1, 1, 1], "item": list("cba"), "timestamp": times})
    assert as_lists(frame) == {"1": ["a", "b", "c"]}


def test_equal_times_keep_the_order_of_the_file(tmp_path: Path) -> None:
    lines = "".join(f"{row % 3}\ti{row}\t3\t{(row * 7 % 10) // 5}\n" for row in range(60))
    frame = pd.DataFrame({"user": np.arange(60) % 3, "item": [f"i{row}" for row in range(60)]})
    frame["time"] = (np.arange(60) * 7 % 10) // 5
    expected = {
        str(user): group.sort_values("time", kind="stable")["item"].tolist()
        for user, group in frame.groupby("user")
    }
    assert as_lists(write(tmp_path, "u.data", lines)) == expected


NEEDED_FIELDS = "4 fields separated by tabs (user_id, item_id, rating, timestamp)"
COMMAS = "3 fields separated by commas (user, item, time)"
TIME = "a finite number or a date such as 2024-05-31 20:15:00 as timestamp"
MALFORMED = [
    # (id, file name, content, line, column, expected, found)
    ("empty file", "a.inter", "", 1, 1, "at least one interaction", "an empty file"),
    ("empty gzip", "a.inter.gz", "", 1, 1, "at least one interaction", "an empty file"),
    ("header only", "a.inter", INTER, 2, 1, "at least one interaction", "none"),
    ("blank lines only", "u.data", "\n\n", 1, 1, "at least one interaction", "none"),
    ("no header", "a.inter", "1\t2\t3\t4\n", 1, 1, "a typed column name such as user_id:token", "'1'"),
    ("half a header", "a.inter", "user_id:token\titem_id\n1\t2\n", 1, 15, "a typed column name", "'item_id'"),
    (
        "unknown type",
        "a.inter",
        "user_id:token\titem_id:str\n1\t2\n",
        1,
        15,
        "a typed column name",
        "'item_id:str'",
    ),
    (
        "list of users",
        "a.inter",
        "user_id:token_seq\titem_id:token\n",
        1,
        1,
        "the type token",
        "'user_id:token_seq'",
    ),
    (
        "time as token",
        "a.inter",
        "user_id:token\titem_id:token\ttimestamp:token\n1\t2\t3\n",
        1,
        29,
        "the type float for the column of the timestamp",
        "'timestamp:token'",
    ),
    (
        "no user column",
        "a.inter",
        "who:token\titem_id:token\n1\t2\n",
        1,
        1,
        "a column for the user",
        "'who', 'item_id'",
    ),
    (
        "no item column",
        "a.csv",
        "user,thing,time\n1,2,3\n",
        1,
        1,
        "a column for the item",
        "'user', 'thing', 'time'",
    ),
    (
        "header twice",
        "a.csv",
        "user,item,user\n1,2,3\n",
        1,
        11,
        "distinct column names",
        "'user' a second time",
    ),
    (
        "numbers as header",
        "a.csv",
        "1,31,2.5,1260759144\n",
        1,
        1,
        "a header, or an Amazon item id",
        "'1,31,2.5,126",
    ),
    ("nothing known", "notes", "hello\n", 1, 1, "a line of one of the formats inter, csv", "'hello'"),
    ("short row", "a.inter", INTER + "1\t2\t3\t4\n1\t2\t3\n", 3, 6, NEEDED_FIELDS, "3"),
    ("long row", "a.inter", INTER + "1\t2\t3\t4\n1\t2\t3\t4\t5\n", 3, 9, NEEDED_FIELDS, "5"),
    ("one short, one long", "a.inter", INTER + "1\t2\t3\n1\t2\t3\t4\t5\n", 2, 6, NEEDED_FIELDS, "3"),
    (
        "blank line inside",
        "a.inter",
        INTER + "1\t2\t3\t4\n\n\n1\t2\t3\t4\n",
        3,
        1,
        NEEDED_FIELDS,
        "an empty line",
    ),
    ("wrong separator", "a.inter", INTER + "1,2,3,4\n", 2, 8, NEEDED_FIELDS, "1"),
    ("time in words", "a.inter", INTER + "1\t2\t3\tyesterday\n", 2, 7, TIME, "'yesterday'"),
    ("empty time", "a.inter", INTER + "1\t2\t3\t\n", 2, 7, TIME, "''"),
    ("NaN time", "a.inter", INTER + "1\t2\t3\tNaN\n", 2, 7, TIME, "'NaN'"),
    ("infinite time", "a.inter", INTER + "1\t2\t3\t-inf\n", 2, 7, TIME, "'-inf'"),
    ("overflowing time", "a.inter", INTER + "1\t2\t3\t1e999\n", 2, 7, TIME, "'1e999'"),
    ("time with blank", "a.inter", INTER + "1\t2\t3\t 4\n", 2, 7, TIME, "' 4'"),
    ("time with underscore", "a.inter", INTER + "1\t2\t3\t1_000\n", 2, 7, TIME, "'1_000'"),
    ("time in hexadecimal", "a.inter", INTER + "1\t2\t3\t0x1F\n", 2, 7, TIME, "'0x1F'"),
    ("time in Arabic digits", "a.inter", INTER + "1\t2\t3\t\u0661\u0662\n", 2, 7, TIME, "'\u0661\u0662'"),
    ("no such date", "a.csv", "user,item,time\n1,2,2020-13-01\n", 2, 5, TIME, "'2020-13-01'"),
    ("date of another kind", "a.csv", "user,item,time\n1,2,1.2.2020\n", 2, 5, TIME, "'1.2.2020'"),
    (
        "number after dates",
        "a.csv",
        "user,item,date\n1,2,2020-01-01\n1,3,2021\n",
        3,
        5,
        "a date as timestamp, as in the lines before",
        "'2021'",
    ),
    (
        "date after numbers",
        "a.csv",
        "user;item;time\n1;2;7\n1;3;2020-01-01\n",
        3,
        5,
        "a number as timestamp, as in the lines before",
        "'2020-01-01'",
    ),
    ("quote in semicolons", "a.csv", 'user;item\n1;"2\n', 2, 3, "a closing quote", "'\"2'"),
    ("header inside", "u.data", "1\t2\t3\t4\nuser\titem\trating\ttimestamp\n", 2, 18, TIME, "'timestamp'"),
    ("empty user", "a.inter", INTER + "\t2\t3\t4\n", 2, 1, "a user id", "nothing"),
    ("empty item", "a.inter", INTER + "1\t\t3\t4\n", 2, 3, "an item id", "nothing"),
    ("blank item", "a.inter", INTER + "1\t \t3\t4\n", 2, 3, "an item id without blanks around it", "' '"),
    (
        "item with blank",
        "a.csv",
        "user,item,time\n1, 2,3\n",
        2,
        3,
        "an item id without blanks around it",
        "' 2'",
    ),
    (
        "no-break space",
        "u.data",
        "1\u00a0\t2\t3\t4\n",
        1,
        1,
        "a user id without blanks around it",
        r"'1\xa0'",
    ),
    (
        "control character",
        "u.data",
        "1\t2\x01\t3\t4\n",
        1,
        3,
        "an item id without control characters",
        r"'\x01' in",
    ),
    ("zero byte", "u.data", "1\x00\t2\t3\t4\n", 1, 1, "a user id without control characters", r"'\x00' in"),
    (
        "lone carriage return",
        "u.data",
        "1\r\t2\t3\t4\n",
        1,
        1,
        "a user id without control characters",
        r"'\r' in",
    ),
    (
        "second byte-order mark",
        "u.data",
        "1\t2\t3\t4\n\ufeff1\t2\t3\t4\n",
        2,
        1,
        "without control",
        r"'\ufeff' in",
    ),
    (
        "endless id",
        "u.data",
        "1\t" + "x" * 300 + "\t3\t4\n",
        1,
        3,
        "an item id of at most 256",
        "300 characters",
    ),
    (
        "reserved item",
        "u.data",
        "1\t[PAD]\t3\t4\n",
        1,
        3,
        "an item id other than the one reserved",
        "'[PAD]'",
    ),
    ("not UTF-8", "u.data", "1\t2\t3\t4\né\t\t".encode() + b"\xff\t3\n", 2, 4, "UTF-8 text", "the byte 0xff"),
    ("UTF-16", "u.data", "1\t2\t3\t4\n".encode("utf-16"), 1, 1, "UTF-8 text", "the byte 0xff"),
    ("Latin-1 header", "a.csv", "us\xe9r,item\n1,2\n".encode("latin-1"), 1, 3, "UTF-8 text", "the byte 0xe9"),
    (
        "open quote",
        "a.csv",
        'user,item,time\n1,"2,3\n4,5,6\n',
        2,
        3,
        "a closing quote on the same line",
        "'\"2,3'",
    ),
    (
        "text after quote",
        "a.csv",
        'user,item,time\n1,"2"x,3\n',
        2,
        6,
        "a comma or the end of the line",
        "'x,3'",
    ),
    (
        "quote inside",
        "a.csv",
        'user,item,time\n1,2"3",3\n',
        2,
        4,
        "quotes around a whole field only",
        "'2\"3\"'",
    ),
    ("comma in quotes", "a.csv", 'user,item,time\n1,"2,3"\n', 2, 8, COMMAS, "2"),
    ("empty in quotes", "a.csv", 'user,item,time\n1,"",3\n', 2, 3, "an item id", "nothing"),
    ("three colons", "ratings.dat", "1::2::3::4\n1:::2::3::4\n", 2, 2, "'::' between fields", "':::'"),
    ("four colons", "ratings.dat", "1::2::3::4\n1::2::::4\n", 2, 5, "'::' between fields", "':::'"),
    ("single colons", "ratings.dat", "1:2:3:4\n", 1, 8, "4 fields separated by '::'", "1"),
    ("gz by name only", "plain.inter.gz", None, 1, 1, "gzip data, as the name says", "bytes 75 73"),
    (
        "bad JSON",
        "a.json",
        '{"user_id": "1", "asin": }\n',
        1,
        26,
        "a JSON object",
        "a fault: Expecting value",
    ),
    ("cut JSON", "a.json", '{"user_id": "1"', 1, 16, "a JSON object", "a fault: Expecting ',' delimiter"),
    ("JSON array", "a.json", '["1", "2", 3]\n', 1, 1, "a JSON object", '\'["1", "2", 3]\''),
    ("JSON without user", "a.json", '{"asin": "2"}\n', 1, 1, "a column for the user", "'asin'"),
]
REVIEW = '{"user_id": "1", "asin": "2", "timestamp": 3}\n'
MALFORMED += [
    (f"JSON {name}", "a.jsonl", REVIEW + line + "\n", 2, column, expected, found)
    for name, line, column, expected, found in [
        ("key missing", '{"user_id": "1", "timestamp": 3}', 1, 'the key "asin"', "an object without it"),
        (
            "key twice",
            '{"user_id": "1", "asin": "2", "asin": "4", "timestamp": 3}',
            31,
            '"asin" once',
            "it again",
        ),
        ("null id", '{"user_id": null, "asin": "2", "timestamp": 3}', 2, 'a user id in "user_id"', "'null'"),
        (
            "list as id",
            '{"user_id": "1", "asin": ["2"], "timestamp": 3}',
            18,
            'an item id in "asin"',
            "'[\"2\"]'",
        ),
        (
            "true as id",
            '{"user_id": true, "asin": "2", "timestamp": 3}',
            2,
            'a user id in "user_id"',
            "'true'",
        ),
        (
            "fraction as id",
            '{"user_id": 1.5, "asin": "2", "timestamp": 3}',
            2,
            'a user id in "user_id"',
            "'1.5'",
        ),
        ("empty id", '{"user_id": "", "asin": "2", "timestamp": 3}', 2, 'a user id in "user_id"', "nothing"),
        (
            "half a surrogate",
            r'{"user_id": "\ud800", "asin": "2", "timestamp": 3}',
            2,
            "without control",
            r"'\ud800'",
        ),
        ("time left out", '{"user_id": "1", "asin": "2"}', 1, 'the key "timestamp"', "an object without it"),
        ("time as words", '{"user_id": "1", "asin": "2", "timestamp": "now"}', 31, TIME, "'now'"),
        ("NaN time", '{"user_id": "1", "asin": "2", "timestamp": NaN}', 31, TIME, "'NaN'"),
        ("infinite time", '{"user_id": "1", "asin": "2", "timestamp": 1e999}', 31, TIME, "'Infinity'"),
        ("true as time", '{"user_id": "1", "asin": "2", "timestamp": true}', 31, TIME, "'true'"),
        ("endless nesting", "[" * 100_000, 1, "a JSON object", "a fault: "),
        ("blank line", "\n" + REVIEW.strip(), 1, "a JSON object", "an empty line"),
    ]
]


@pytest.mark.parametrize("block_bytes", [1 << 23, 16])
@pytest.mark.parametrize(
    ("name", "content", "line", "column", "expected", "found"),
    [pytest.param(*case[1:], id=case[0]) for case in MALFORMED],
)
def test_malformed_data_are_refused_with_their_place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block_bytes: int,
    name: str,
    content: str | bytes | None,
    line: int,
    column: int,
    expected: str,
    found: str,
) -> None:
    monkeypatch.setattr(text_table, "_BLOCK_BYTES", block_bytes)
    if content is None:
        path = tmp_path / name
        path.write_bytes(INTER.encode() + b"1\t2\t3\t4\n")
    else:
        path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        load_interactions(path)
    error = caught.value
    assert (error.source, error.line, error.column) == (str(path), line, column)
    assert expected in error.expected
    assert found in error.found
    assert str(error) == f"{path}:{line}:{column}: expected {error.expected}, found {error.found}"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("rows", [10, 5000])
def test_truncated_gzip_says_where_it_ends(tmp_path: Path, rows: int) -> None:
    generator = np.random.default_rng(0)
    content = INTER + "".join(f"{generator.integers(1 << 40)}\t2\t3\t4\n" for _ in range(rows))
    whole = gzip.compress(content.encode())
    path = tmp_path / "a.inter.gz"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(
        DataError, match="expected a whole gzip stream, found its end in the middle"
    ) as caught:
        load_interactions(path)
    assert 0 < caught.value.line <= rows + 1
    if rows == 5000:
        assert caught.value.line > rows // 3


@pytest.mark.parametrize("place", ["check sum", "middle"])
def test_damaged_gzip_is_refused(tmp_path: Path, place: str) -> None:
    generator = np.random.default_rng(0)
    content = INTER + "".join(f"{generator.integers(1 << 40)}\t2\t3\t4\n" for _ in range(500))
    damaged = bytearray(gzip.compress(content.encode()))
    for index in range(8) if place == "middle" else [0]:
        damaged[-8 if place == "check sum" else len(damaged) // 2 + index] ^= 0xFF
    path = tmp_path / "a.inter.gz"
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="expected a whole gzip stream, found a damaged one"):
        load_interactions(path)


@pytest.mark.parametrize("separator", ["\t", ",", ";", "::"])
def test_whole_blocks_and_lines_are_parsed_alike(separator: str) -> None:
    """The array operations take only what the line-by-line parser takes, and make the same of it."""
    layout = text_table.Layout(
        source="-", separator=separator, names=("user", "item", "time"), user=0, item=1, timestamp=2
    )
    generator = np.random.default_rng(0)
    odd = [
        "0",
        "7",
        "42",
        "é",
        "longer than eight",
        " ",
        "\t",
        "\n",
        "",
        ".",
        "-",
        "e",
        "\r",
        "\x00",
        "\u2028",
        ":",
        '"',
    ]
    taken = 0
    for _ in range(300):
        users, items, times = generator.integers((3, 3, 30), size=(4, 3)).T
        rows = [
            [f"u{user}", f"i{item}", str(time)] for user, item, time in zip(users, items, times, strict=True)
        ]
        for _ in range(generator.integers(3)):
            rows[generator.integers(4)][generator.integers(3)] = "".join(
                generator.choice(odd, generator.integers(1, 3))
            )
        if generator.random() < 0.5:
            rows[generator.integers(4)][generator.integers(3)] = (
                f'"{generator.choice(odd)}{generator.integers(9)}"'
            )
        block = text_table.Block(1, "".join(separator.join(row) + "\n" for row in rows).encode())
        whole = text_table._parse_whole(block, layout)
        if whole is None:
            continue
        taken += 1
        lines, blank = text_table._parse_lines(block, layout, TimeColumn(), None)
        assert blank is None
        for a, b in zip(whole[:2], lines[:2], strict=True):
            assert a.distinct == b.distinct
            np.testing.assert_array_equal(a.codes, b.codes)
        assert whole.times.dtype == lines.times.dtype
        np.testing.assert_array_equal(whole.times, lines.times)
    assert taken > 100


@pytest.mark.parametrize("block_bytes", [1, 7, 64, 1000])
def test_block_size_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    generator = np.random.default_rng(1)
    content = INTER + "".join(
        f"u{generator.integers(20)}\ti{generator.integers(30)}\t3\t{generator.integers(99)}\r\n"
        for _ in range(200)
    )
    path = write(tmp_path, "a.inter", content)
    expected = load_interactions(path).fingerprint
    monkeypatch.setattr(text_table, "_BLOCK_BYTES", block_bytes)
    assert load_interactions(path).fingerprint == expected


def test_arguments_out_of_range_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "u.data", "1\t2\t3\t4\n")
    with pytest.raises(ValueError, match="format must be one of inter, csv"):
        load_interactions(path, format="xml")
    with pytest.raises(ValueError, match="columns maps user, item and timestamp"):
        load_interactions(path, columns={"users": "user"})
    with pytest.raises(ValueError, match="'user' to both the user and the item"):
        load_interactions(path, columns={"item": "user"})
    with pytest.raises(DataError, match="a column 'when' for the timestamp, found the columns 'user'"):
        load_interactions(path, columns={"timestamp": "when"})
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_interactions(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_interactions(tmp_path / "absent.inter")


FRAME = {"user": ["007", "alice", "007"], "item": ["y", "y", "x"], "timestamp": [20, 5, 10]}


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ({}, None),
        ({"timestamp": [20.5, 5.0, 10.0]}, None),
        ({"timestamp": pd.to_datetime(["2020-01-03", "2020-01-01", "2020-01-02"])}, None),
        ({"timestamp": pd.to_datetime(["2020-01-03", "2020-01-01", "2020-01-02"]).tz_localize("UTC")}, None),
        ({"timestamp": ["20", "5", "10"]}, None),
        ({"timestamp": np.array([20, 5, 10], dtype=np.uint8)}, None),
        ({"timestamp": pd.array([20, 5, 10], dtype="Int64")}, None),
        ({"user": pd.Categorical(["007", "alice", "007"])}, None),
        ({"item": np.array(["y", "y", "x"], dtype=object)}, None),
        ({"seconds": [1, 2, 0], "timestamp": [0, 1, 2]}, {"timestamp": "seconds"}),
    ],
)
def test_frames_give_the_same_sequences(change: dict[str, Any], columns: dict[str, str] | None) -> None:
    assert as_lists(pd.DataFrame(FRAME | change), columns=columns) == ALICE_AND_007


def test_integer_ids_of_frames_become_strings() -> None:
    frame = pd.DataFrame({"user": [7, 7], "item": np.array([30, 4], dtype=np.uint16)})
    assert as_lists(frame) == {"7": ["30", "4"]}


MALFORMED_FRAMES = [
    ({"user": ["1", None, "2"]}, 2, 1, "a user id, a string or an integer", "a missing value"),
    ({"user": [1.0, 2.0, 3.0]}, 1, 1, "a user id, a string or an integer", "'1.0'"),
    ({"user": [True, True, False]}, 1, 1, "a user id, a string or an integer", "'True'"),
    ({"user": ["1", "", "2"]}, 2, 1, "a user id", "nothing"),
    ({"item": ["1", "2", "[PAD]"]}, 3, 2, "an item id other than the one reserved", "'[PAD]'"),
    ({"item": [["1"], ["2"], ["3"]]}, 1, 2, "an item id, a string or an integer", "values of type object"),
    ({"timestamp": [1.0, np.nan, 3.0]}, 2, 3, "a finite number or a datetime", "'nan'"),
    ({"timestamp": [1.0, 2.0, np.inf]}, 3, 3, "a finite number or a datetime", "'inf'"),
    ({"timestamp": ["1", "2", "later"]}, 3, 3, "a finite number or a datetime", "'later'"),
    ({"timestamp": [True, False, True]}, 1, 3, "a finite number or a datetime", "'True'"),
    ({"timestamp": pd.to_datetime(["2020-01-01", None, "2020-01-02"])}, 2, 3, "a finite number or", "'NaT'"),
]


@pytest.mark.parametrize(("change", "row", "column", "expected", "found"), MALFORMED_FRAMES)
def test_malformed_frames_are_refused_with_row_and_column(
    change: dict[str, Any], row: int, column: int, expected: str, found: str
) -> None:
    with pytest.raises(DataError) as caught:
        load_interactions(pd.DataFrame(FRAME | change))
    assert (caught.value.source, caught.value.line, caught.value.column) == ("DataFrame", row, column)
    assert expected in caught.value.expected
    assert found in caught.value.found


def test_frames_without_rows_or_columns_are_refused() -> None:
    with pytest.raises(DataError, match="DataFrame:1:1: expected at least one interaction, found none"):
        load_interactions(pd.DataFrame({"user": [], "item": []}, dtype=str))
    with pytest.raises(DataError, match="DataFrame:1:1: expected a column for the item"):
        load_interactions(pd.DataFrame({"user": ["1"]}))
    with pytest.raises(DataError, match="DataFrame:1:2: expected distinct column names"):
        load_interactions(pd.DataFrame([["1", "2"]], columns=["user", "user"]))


def test_parquet_gives_the_same_sequences(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "log.parquet"
    for time in (FRAME["timestamp"], pd.to_datetime([20, 5, 10], unit="s")):
        pd.DataFrame(FRAME | {"timestamp": time, "rating": [1, 2, 3]}).to_parquet(path)
        assert as_lists(path) == ALICE_AND_007
    pd.DataFrame(FRAME | {"user": pd.array([7, 8, 7], dtype="Int64")}).to_parquet(path)
    assert as_lists(path) == {"7": ["x", "y"], "8": ["y"]}


def test_malformed_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "log.parquet"
    pd.DataFrame({"user": pd.array([1, None, 3], dtype="Int64"), "item": ["a", "b", "c"]}).to_parquet(path)
    with pytest.raises(DataError, match=r"log.parquet:2:1: expected a user id, .* found a missing value"):
        load_interactions(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"log.parquet:1:1: expected a readable Parquet file"):
        load_interactions(path)


def test_parquet_without_pyarrow_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match="needs pyarrow, the extra `parquet`"):
        load_interactions(write(tmp_path, "log.parquet", "PAR1"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("compressed", [False, True])
def test_a_pipe_is_read_to_its_end(tmp_path: Path, compressed: bool) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    raw = (INTER + "alice\ty\t3\t5\n007\ty\t3\t20\n007\tx\t3\t10\n").encode()
    content = gzip.compress(raw) if compressed else raw
    writer = threading.Thread(target=pipe.write_bytes, args=(content,), daemon=True)
    writer.start()
    assert as_lists(pipe, format="inter") == ALICE_AND_007
    writer.join(timeout=10)
