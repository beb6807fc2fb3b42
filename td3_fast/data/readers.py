"""Raw interaction logs from files and DataFrames; every malformed line is an error with its place.

Text is read in blocks. A block is first parsed as a whole with array operations that accept only what is certainly
well formed; where they decline, the block is parsed line by line, which either succeeds or raises a `DataError`. The
line-by-line parser alone decides what is valid.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

FORMATS = {
    "inter": "RecBole: tab-separated, header such as user_id:token, item_id:token, timestamp:float",
    "csv": "comma-separated with a header (MovieLens ratings.csv, Amazon 2023)",
    "tsv": "tab-separated with a header",
    "u.data": "MovieLens 100K: tab-separated user, item, rating, timestamp; no header",
    "ratings.dat": "MovieLens 1M, 10M: user::item::rating::timestamp; no header",
    "csv-user-item": "comma-separated user, item, rating, timestamp; no header (Amazon 2014)",
    "csv-item-user": "comma-separated item, user, rating, timestamp; no header (Amazon 2018)",
    "json": "one JSON object a line (Amazon reviews)",
    "parquet": "Parquet (needs pyarrow)",
}
PADDING = "[PAD]"
ROLES = ("user", "item", "timestamp")
Columns: TypeAlias = Mapping[str, str | None]

_HEADERLESS = {
    "u.data": ("\t", ("user", "item", "rating", "timestamp")),
    "ratings.dat": ("::", ("user", "item", "rating", "timestamp")),
    "csv-user-item": (",", ("user", "item", "rating", "timestamp")),
    "csv-item-user": (",", ("item", "user", "rating", "timestamp")),
}
# usual names, the preferred first; where a file has several of a row, the first wins
_USUAL = {
    "user": ("user_id", "userId", "user", "reviewerID", "UserID", "uid"),
    "item": ("item_id", "movieId", "item", "parent_asin", "asin", "MovieID", "iid"),
    "timestamp": ("timestamp", "unixReviewTime", "Timestamp", "time"),
}
_BLOCK_BYTES = 1 << 23
_MAX_ID = 256  # characters
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_TYPED = re.compile(r"(.+):(token|token_seq|float|float_seq)")
_ASIN = re.compile(r"B[0-9A-Z]{9}|[0-9]{9}[0-9X]")


class DataError(ValueError):
    """Malformed data: `source:line:column: expected ..., found ...`.

    Line and column count from 1, the column in characters. For a DataFrame or a Parquet file they are the row and
    the number of the column.
    """

    def __init__(self, source: str, line: int, column: int, expected: str, found: str) -> None:
        super().__init__(source, line, column, expected, found)
        self.source, self.line, self.column, self.expected, self.found = source, line, column, expected, found

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True, kw_only=True)
class Log:
    """Rows in file order. `users` and `items` index `user_ids` and `item_ids`."""

    users: NDArray[np.int32]  # (rows,)
    items: NDArray[np.int32]  # (rows,)
    times: NDArray[Any] | None  # (rows,) int64 or float64, finite
    user_ids: list[str]
    item_ids: list[str]


def read_log(path: Path, *, format: str | None = None, columns: Columns | None = None) -> Log:
    """Read a file, plain or gzip. Arguments and errors as in `load_interactions`."""
    _check_columns(columns)
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the file in it")
    format = format or _format_of_name(path)
    if format == "parquet":
        return _read_parquet(path, columns)
    source = str(path)
    with path.open("rb") as stream:
        blocks = _blocks(stream, source, must_be_gzip=path.suffix == ".gz")
        first = next(blocks, None)
        if first is None:
            raise DataError(source, 1, 1, "at least one interaction", "an empty file")
        header = _decode(first.lines[: first.lines.index(b"\n")], source, 1)
        format = format or _format_of_line(header, source)
        if format == "csv?":
            format = _headerless_csv(header, source) or "csv"
        blocks = chain([first], blocks)
        if format == "json":
            return _read_json(blocks, source, columns)
        return _read_table(blocks, source, format, header, columns)


def read_frame(frame: pd.DataFrame, *, columns: Columns | None = None, source: str = "DataFrame") -> Log:
    """Take the user, item and timestamp columns out of a DataFrame. Ids are strings or integers, times numbers or
    datetimes."""
    _check_columns(columns)
    places = _places([str(column) for column in frame.columns], columns, source)
    raise NotImplementedError


def _check_columns(columns: Columns | None) -> None:
    for role in columns or {}:
        if role not in ROLES:
            raise ValueError(f"columns names {', '.join(ROLES)}, not {role!r}")


def _places(
    names: Sequence[str], columns: Columns | None, source: str, starts: Sequence[int] | None = None
) -> dict[str, int | None]:
    """The index of each role's column among `names`; `starts` are the columns of the names in line 1."""
    for index, name in enumerate(names):
        if name in names[:index]:
            place = index + 1 if starts is None else starts[index]
            raise DataError(source, 1, place, "distinct column names", f"{_show(name)} a second time")
    places: dict[str, int | None] = {}
    for role in ROLES:
        asked = columns is not None and role in columns
        name = columns[role] if columns is not None and role in columns else None
        if not asked:
            name = next((usual for usual in _USUAL[role] if usual in names), None)
        elif name is not None and name not in names:
            raise DataError(source, 1, 1, f"a column {_show(name)} for the {role}", _show_names(names))
        if name is None and role != "timestamp":
            expected = f"a column for the {role}, one of {', '.join(_USUAL[role])}"
            raise DataError(source, 1, 1, expected, _show_names(names))
        places[role] = None if name is None else names.index(name)
    return places


def _show(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _show_names(names: Sequence[str]) -> str:
    return ", ".join(_show(name) for name in names[:12]) + (", ..." if len(names) > 12 else "")


# what a file is


def _format_of_name(path: Path) -> str | None:
    name = path.name.removesuffix(".gz")
    if name in ("u.data", "ratings.dat"):
        return name
    suffix = name.rpartition(".")[2].lower()
    if suffix in ("json", "jsonl", "ndjson", "jsonlines"):
        return "json"
    if suffix == "csv":
        return "csv?"  # the first line says whether there is a header
    return {"inter": "inter", "tsv": "tsv", "parquet": "parquet", "pq": "parquet"}.get(suffix)


def _format_of_line(line: str, source: str) -> str:
    if line.startswith("{"):
        return "json"
    if "::" in line:
        return "ratings.dat"
    fields = line.split("\t")
    if len(fields) > 1:
        if all(_TYPED.fullmatch(field) for field in fields):
            return "inter"
        return "u.data" if len(fields) == 4 and _number(fields[3]) is not None else "tsv"
    if "," in line:
        return "csv?"
    raise DataError(source, 1, 1, f"a line in one of the formats {', '.join(FORMATS)}", _show(line))


def _headerless_csv(line: str, source: str) -> str | None:
    """Which of Amazon's two orders a first line without names has; None: it is a header."""
    fields = line.split(",")
    if len(fields) != 4 or _number(fields[3]) is None:
        return None
    if _ASIN.fullmatch(fields[0]) and not _ASIN.fullmatch(fields[1]):
        return "csv-item-user"
    if _ASIN.fullmatch(fields[1]) and not _ASIN.fullmatch(fields[0]):
        return "csv-user-item"
    expected = (
        "a header, or an Amazon item id in column 1 or 2 (else say format='csv-user-item' or 'csv-item-user')"
    )
    raise DataError(source, 1, 1, expected, _show(line))


# text


@dataclass(frozen=True)
class _Block:
    first_line: int
    lines: bytes  # whole lines, each ending in "\n"


def _blocks(stream: BinaryIO, source: str, *, must_be_gzip: bool) -> Iterator[_Block]:
    """Whole lines in blocks; carriage returns before line ends and a byte-order mark are dropped."""
    magic = stream.read(2)
    stream.seek(0)
    if magic != b"\x1f\x8b" and must_be_gzip:
        raise DataError(
            source, 1, 1, "gzip data, as the name says", f"the bytes {magic.hex(' ') or 'of an empty file'}"
        )
    data = gzip.open(stream) if magic == b"\x1f\x8b" else stream
    line, rest = 1, b""
    while True:
        pieces, size, fault = [rest], 0, None
        while size < _BLOCK_BYTES:
            try:
                # read1 hands out all that could be decompressed before it reports a broken stream
                piece = cast(Any, data).read1(_BLOCK_BYTES - size)
            except (EOFError, OSError, zlib.error) as error:
                if data is stream:
                    raise
                fault = error
                break
            if not piece:
                break
            pieces.append(piece)
            size += len(piece)
        text = b"".join(pieces)
        if fault is not None:
            place = line + text.count(b"\n"), len(text) - text.rfind(b"\n")
            found = "its end in the middle" if isinstance(fault, EOFError) else f"a damaged one ({fault})"
            raise DataError(source, *place, "a complete gzip stream", found) from fault
        if line == 1 and rest == b"":
            text = text.removeprefix(b"\xef\xbb\xbf")
        if size == 0:
            if text:
                yield _Block(line, text.removesuffix(b"\r") + b"\n")
            return
        end = text.rfind(b"\n") + 1
        rest = text[end:]
        if end:
            yield _Block(line, text[:end].replace(b"\r\n", b"\n"))
            line += text.count(b"\n")


def _decode(line: bytes, source: str, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        raise DataError(source, number, column, "UTF-8 text", f"the byte 0x{line[error.start]:02x}") from None


@dataclass(frozen=True, kw_only=True)
class _Layout:
    source: str
    separator: str
    quoted: bool  # whether fields may stand in double quotes
    names: tuple[str, ...]
    user: int
    item: int
    time: int | None

    @property
    def expectation(self) -> str:
        by = {"\t": "tabs", ",": "commas"}.get(self.separator, repr(self.separator))
        return f"{len(self.names)} fields separated by {by} ({', '.join(self.names)})"


def _read_table(
    blocks: Iterable[_Block], source: str, format: str, header: str, columns: Columns | None
) -> Log:
    if format in _HEADERLESS:
        separator, names = _HEADERLESS[format]
        starts = None
    else:
        separator = "," if format == "csv" else "\t"
        fields = _split(header, separator, format == "csv", source, 1)
        if format == "inter":
            fields = [(_untyped(field, start, source), start) for field, start in fields]
        names, starts = tuple(name for name, _ in fields), [start for _, start in fields]
    places = _places(names, columns, source, starts)
    if format == "inter":
        _check_types(header, places, starts, source)
    layout = _Layout(
        source=source,
        separator=separator,
        quoted=separator == ",",
        names=names,
        user=cast(int, places["user"]),
        item=cast(int, places["item"]),
        time=places["timestamp"],
    )
    builder = _Builder(source, first_row=1 if format in _HEADERLESS else 2)
    blank = None
    for block in blocks:
        if block.first_line == 1 and format not in _HEADERLESS:
            block = _Block(2, block.lines[block.lines.index(b"\n") + 1 :])
        if block.lines:
            parsed, blank = _parse_lines(block, layout, blank)
            builder.add(parsed)
    return builder.log()


def _untyped(field: str, start: int, source: str) -> str:
    match = _TYPED.fullmatch(field)
    if match is None:
        raise DataError(source, 1, start, "a typed column name such as user_id:token", _show(field))
    return match[1]


def _check_types(
    header: str, places: dict[str, int | None], starts: Sequence[int] | None, source: str
) -> None:
    fields = header.split("\t")
    for role, index in places.items():
        kind = "float" if role == "timestamp" else "token"
        if index is not None and not fields[index].endswith(f":{kind}"):
            place = 1 if starts is None else starts[index]
            raise DataError(source, 1, place, f"the type {kind} for the {role}", _show(fields[index]))


class _Encoded(NamedTuple):
    """A column of ids: row i holds `distinct[codes[i]]`."""

    codes: NDArray[Any]
    distinct: list[str]


class _Parsed(NamedTuple):
    users: _Encoded
    items: _Encoded
    times: NDArray[Any] | None


def _encode(ids: Iterable[str]) -> _Encoded:
    numbers: dict[str, int] = {}
    codes = [numbers.setdefault(id_, len(numbers)) for id_ in ids]
    return _Encoded(np.array(codes, dtype=np.int32), list(numbers))


class _Builder:
    """Collects parsed blocks; ids get numbers by first appearance."""

    def __init__(self, source: str, *, first_row: int) -> None:
        self.source, self.first_row = source, first_row
        self.numbers: tuple[dict[str, int], dict[str, int]] = ({}, {})
        self.codes: tuple[list[NDArray[np.int32]], list[NDArray[np.int32]]] = ([], [])
        self.times: list[NDArray[Any]] | None = []

    def add(self, parsed: _Parsed) -> None:
        for column, numbers, codes in zip(parsed[:2], self.numbers, self.codes, strict=True):
            known = [numbers.setdefault(id_, len(numbers)) for id_ in column.distinct]
            codes.append(np.array(known, dtype=np.int32)[column.codes])
        if parsed.times is None:
            self.times = None
        elif self.times is not None:
            self.times.append(parsed.times)

    def log(self) -> Log:
        if not any(len(codes) for codes in self.codes[0]):
            raise DataError(self.source, self.first_row, 1, "at least one interaction", "no row")
        return Log(
            users=np.concatenate(self.codes[0]),
            items=np.concatenate(self.codes[1]),
            times=None if self.times is None else np.concatenate(self.times),
            user_ids=list(self.numbers[0]),
            item_ids=list(self.numbers[1]),
        )


def _id_fault(role: str, text: str) -> tuple[str, str] | None:
    """What was expected and found, if `text` cannot be an id."""
    if not text:
        return f"a non-empty {role} id", "nothing"
    if text != text.strip():
        return f"{role} id without blanks around it", _show(text)
    if len(text) > _MAX_ID:
        return f"{role} id of at most {_MAX_ID} characters", f"{len(text)} characters"
    if control := _CONTROL.search(text):
        return f"{role} id without control characters", f"{control[0]!r} in {_show(text)}"
    if role == "item" and text == PADDING:
        return "an item id other than the reserved one of padding", _show(text)
    return None


def _number(text: str) -> int | float | None:
    """The finite number that `text` is, or None."""
    if _INTEGER.fullmatch(text):
        return int(text)
    if not _NUMBER.fullmatch(text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def _split(text: str, separator: str, quoted: bool, source: str, number: int) -> list[tuple[str, int]]:
    """The fields of a line, each with the column where it starts."""
    fields = []
    if not quoted or '"' not in text:
        start = 1
        for field in text.split(separator):
            fields.append((field, start))
            start += len(field) + len(separator)
        return fields
    position = 0
    while True:
        start = position
        if text[position : position + 1] == '"':
            match = _QUOTED.match(text, position)
            if match is None:
                raise DataError(
                    source, number, start + 1, "a closing quote in the same line", _show(text[start:])
                )
            field, position = match[1].replace('""', '"'), match.end()
            if position < len(text) and text[position] != separator:
                expected = f"{_show(separator)} or the end of the line after a closing quote"
                raise DataError(source, number, position + 1, expected, _show(text[position:]))
        else:
            end = text.find(separator, position)
            position = len(text) if end < 0 else end
            field = text[start:position]
            if '"' in field:
                column = start + field.index('"') + 1
                raise DataError(source, number, column, "quotes around a whole field only", _show(field))
        fields.append((field, start + 1))
        if position == len(text):
            return fields
        position += 1


def _parse_lines(block: _Block, layout: _Layout, blank: int | None) -> tuple[_Parsed, int | None]:
    """Parse line by line. `blank` is the number of the earliest of the blank lines that precede, which are fine at
    the end of the file only."""
    users, items, times = [], [], []
    source, wanted = layout.source, len(layout.names)
    for number, line in enumerate(block.lines[:-1].split(b"\n"), block.first_line):
        if not line:
            blank = blank or number
            continue
        if blank is not None:
            raise DataError(source, blank, 1, layout.expectation, "an empty line")
        text = _decode(line, source, number)
        fields = _split(text, layout.separator, layout.quoted, source, number)
        if len(fields) < wanted:
            raise DataError(source, number, len(text) + 1, layout.expectation, f"{len(fields)}")
        if len(fields) > wanted:
            raise DataError(source, number, fields[wanted][1], layout.expectation, f"{len(fields)}")
        for role, index, ids in (("user", layout.user, users), ("item", layout.item, items)):
            field, start = fields[index]
            if fault := _id_fault(role, field):
                raise DataError(source, number, start, *fault)
            ids.append(field)
        if layout.time is not None:
            field, start = fields[layout.time]
            value = _number(field)
            if value is None:
                raise DataError(source, number, start, "a finite number as timestamp", _show(field))
            times.append(value)
    return _Parsed(_encode(users), _encode(items), None if layout.time is None else np.array(times)), blank


def _read_json(blocks: Iterable[_Block], source: str, columns: Columns | None) -> Log:
    raise NotImplementedError


def _read_parquet(path: Path, columns: Columns | None) -> Log:
    raise NotImplementedError
