"""Interaction logs from files and DataFrames: which format it is, which column is which, and the rows."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from td3_fast.data.raw_log import (
    NOUNS,
    DataError,
    EncodedIds,
    IdColumn,
    RawLog,
    Rows,
    TimeColumn,
    collect,
    id_fault,
    parse_number,
    show,
    times_of,
)
from td3_fast.data.text_table import Block, Layout, decode, parse_blocks, read_blocks, split_line

FORMATS = {
    "inter": "RecBole: tab-separated, header such as user_id:token, item_id:token, timestamp:float",
    "csv": "separated by commas or semicolons, with a header (MovieLens ratings.csv, Amazon 2023)",
    "tsv": "tab-separated with a header",
    "u.data": "MovieLens 100K: tab-separated user, item, rating, timestamp; no header",
    "ratings.dat": "MovieLens 1M, 10M: user::item::rating::timestamp; no header",
    "csv-user-item": "comma-separated user, item, rating, timestamp; no header (Amazon 2014)",
    "csv-item-user": "comma-separated item, user, rating, timestamp; no header (Amazon 2018)",
    "json": "one JSON object a line (Amazon reviews)",
    "parquet": "Parquet (needs pyarrow)",
}
Columns: TypeAlias = Mapping[str, str | None]

_SUFFIXES = {
    "inter": "inter",
    "csv": "csv",
    "tsv": "tsv",
    "dat": "ratings.dat",
    "json": "json",
    "jsonl": "json",
    "ndjson": "json",
    "parquet": "parquet",
    "pq": "parquet",
}
_USER_ITEM = ("user", "item", "rating", "timestamp")
_HEADERLESS = {
    "u.data": ("\t", _USER_ITEM),
    "ratings.dat": ("::", _USER_ITEM),
    "csv-user-item": (",", _USER_ITEM),
    "csv-item-user": (",", ("item", "user", "rating", "timestamp")),
}
# usual names, in any case and with or without "_", "-" and blanks; of several in a file the first of a row wins
_USUAL_NAMES = {
    "user": ("user_id", "user", "reviewerID", "uid", "customer_id"),
    "item": ("item_id", "movieId", "item", "parent_asin", "asin", "iid", "product_id"),
    "timestamp": ("timestamp", "unixReviewTime", "time"),
}
_DATES = ("datetime", "date", "ts", "event_time", "created_at")  # where columns have no types
_TYPED_NAME = re.compile(r"(.+):(token|token_seq|float|float_seq)")
_ASIN = re.compile(r"B[0-9A-Z]{9}|[0-9]{9}[0-9X]")


class Places(NamedTuple):
    """Indices of the columns."""

    user: int
    item: int
    timestamp: int | None


def read_file(path: Path, *, format: str | None = None, columns: Columns | None = None) -> RawLog:
    """The rows of a file. Arguments and errors as in `load_interactions`."""
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the file in it")
    with path.open("rb") as stream:
        named = format or _format_of_name(path.name)
        if named == "parquet":
            return _read_parquet(stream, str(path), columns)
        return _read_text(stream, path, format, columns)


def read_frame(frame: pd.DataFrame, *, columns: Columns | None = None) -> RawLog:
    """The rows of a DataFrame. Arguments and errors as in `load_interactions`."""
    source = "DataFrame"
    places = _find_columns([str(name) for name in frame.columns], columns, source)
    return collect([_frame_rows(lambda place: frame.iloc[:, place], places, source, 1)], source, first_row=1)


def _read_text(stream: BinaryIO, path: Path, format: str | None, columns: Columns | None) -> RawLog:
    source = str(path)
    blocks = read_blocks(stream, source, must_be_gzip=path.suffix == ".gz")
    first = next(blocks, None)
    if first is None:
        raise DataError(source, 1, 1, "at least one interaction", "an empty file")
    head, body = first.lines.split(b"\n", 1)
    line = decode(head, source, 1)
    format = format or _guess_format(path.name, line, source)
    if format == "json":
        return collect(_json_rows(chain([first], blocks), source, columns), source, first_row=1)
    names: tuple[str, ...]
    if format in _HEADERLESS:
        separator, names = _HEADERLESS[format]
        places = _find_columns(names, columns, source)
        first_row = 1
    else:
        separator = _separator_of_csv(line) if format == "csv" else "\t"
        fields = split_line(line, separator, source, 1)
        if format == "inter":
            names = tuple(_untyped(text, column, source) for text, column in fields)
        else:
            names = tuple(field.text for field in fields)
        starts = [field.column for field in fields]
        places = _find_columns(names, columns, source, starts, usual_dates=format != "inter")
        if format == "inter":
            for role, place in zip(Places._fields, places, strict=True):
                kind = "float" if role == "timestamp" else "token"
                if place is not None and fields[place].text != f"{names[place]}:{kind}":
                    expected = f"the type {kind} for the column of the {role}"
                    raise DataError(source, 1, fields[place].column, expected, show(fields[place].text))
        first, first_row = Block(2, body), 2
    layout = Layout(source=source, separator=separator, names=names, **places._asdict())
    blocks = chain([first] if first.lines else [], blocks)
    return collect(parse_blocks(blocks, layout), source, first_row=first_row)


def _find_columns(
    names: Sequence[str],
    columns: Columns | None,
    source: str,
    starts: Sequence[int] | None = None,
    *,
    usual_dates: bool = True,
) -> Places:
    """Which of the columns `names` is which; `starts` says where in line 1 they are, when not by number.

    usual_dates: a column with a usual name of dates is that of the times.
    """
    for place, repeated in enumerate(names):
        if repeated and repeated in names[:place]:
            start = starts[place] if starts else place + 1
            raise DataError(source, 1, start, "distinct column names", f"{show(repeated)} a second time")
    columns = columns or {}
    if unknown := set(columns) - set(Places._fields):
        raise ValueError(f"columns maps user, item and timestamp to names; {sorted(unknown)} is none of them")
    found = ", ".join(show(name) for name in names[:12]) + (", ..." if len(names) > 12 else "")
    places: dict[str, Any] = {}
    name: str | None
    for role in Places._fields:
        if role in columns:
            name = columns[role]
            if name is not None and name not in names:
                raise DataError(source, 1, 1, f"a column {show(name)} for the {role}", f"the columns {found}")
        else:
            usual = _USUAL_NAMES[role] + (_DATES if role == "timestamp" and usual_dates else ())
            name = _usual_name(usual, names)
        if name is None and role != "timestamp":
            expected = f"a column for the {role} ({', '.join(_USUAL_NAMES[role])}, or what `columns` says)"
            raise DataError(source, 1, 1, expected, f"the columns {found}")
        places[role] = None if name is None else names.index(name)
    if places["user"] == places["item"]:
        raise ValueError(f"columns gives {names[places['user']]!r} to both the user and the item")
    return Places(**places)


def _usual_name(usual: Sequence[str], names: Sequence[str]) -> str | None:
    """Which of the columns `names` has one of the usual names, the preferred first."""

    def plain(name: str) -> str:
        return re.sub("[-_ ]", "", name).lower()

    # as it stands in the list before any other writing of it, and of these the first column
    written = {plain(name): name for name in reversed(names)}
    return next(
        (name if name in names else written[plain(name)] for name in usual if plain(name) in written), None
    )


def _format_of_name(name: str) -> str | None:
    name = name.removesuffix(".gz")
    return name if name == "u.data" else _SUFFIXES.get(name.rpartition(".")[2].lower())


def _separator_of_csv(line: str) -> str:
    return ";" if line.count(";") > line.count(",") else ","


def _guess_format(name: str, line: str, source: str) -> str:
    """The format by the file's name, else by its first line."""
    format = _format_of_name(name)
    if format is not None and format != "csv":
        return format
    if format != "csv":
        if line.startswith("{"):
            return "json"
        if "::" in line:
            return "ratings.dat"
        if "\t" in line:
            fields = line.split("\t")
            if any(_TYPED_NAME.fullmatch(field) for field in fields):
                return "inter"
            return "u.data" if len(fields) == 4 and parse_number(fields[3]) is not None else "tsv"
        if "," not in line and ";" not in line:
            raise DataError(source, 1, 1, f"a line of one of the formats {', '.join(FORMATS)}", show(line))
    fields = line.split(",")
    if _separator_of_csv(line) == ";" or len(fields) != 4 or parse_number(fields[3]) is None:
        return "csv"
    item_first, user_first = (_ASIN.fullmatch(field) is not None for field in fields[:2])
    if item_first == user_first:
        expected = "a header, or an Amazon item id in column 1 or 2, or format csv-user-item or csv-item-user"
        raise DataError(source, 1, 1, expected, show(line))
    return "csv-item-user" if item_first else "csv-user-item"


def _untyped(field: str, column: int, source: str) -> str:
    match = _TYPED_NAME.fullmatch(field)
    if match is None:
        raise DataError(source, 1, column, "a typed column name such as user_id:token", show(field))
    return match[1]


def _json_rows(blocks: Iterable[Block], source: str, columns: Columns | None) -> Iterator[Rows]:
    """The keys are settled by the first object: where it has no time, none is read."""
    keys: dict[str, str] = {}
    blank, times = None, TimeColumn()
    for block in blocks:
        ids = {"user": IdColumn("user"), "item": IdColumn("item")}
        for number, line in enumerate(block.lines[:-1].split(b"\n"), block.first_line):
            if not line:
                blank = blank or number
                continue
            if blank is not None:
                raise DataError(source, blank, 1, "a JSON object", "an empty line")
            text = decode(line, source, number)
            record = _json_object(text, source, number)
            if not keys:
                keys = _json_keys(list(record), columns, source)
            for role, key in keys.items():
                quoted = f'"{key}"'
                if key not in record:
                    raise DataError(source, number, 1, f"the key {quoted}", "an object without it")
                if text.count(quoted) > 1 and _is_repeated(text, key):
                    raise DataError(source, number, text.rfind(quoted) + 1, f"{quoted} once", "it again")
                fault = (
                    times.append(record[key] if isinstance(record[key], str) else json.dumps(record[key]))
                    if role == "timestamp"
                    else _append_id(ids[role], record[key])
                )
                if fault:
                    expected, found = fault
                    raise DataError(source, number, text.find(quoted) + 1, f"{expected} in {quoted}", found)
        if ids["user"].codes:
            users, items = (column.encoded() for column in ids.values())
            yield Rows(users, items, times.taken() if "timestamp" in keys else None)


def _json_keys(names: list[str], columns: Columns | None, source: str) -> dict[str, str]:
    places = _find_columns(names, columns, source)
    return {role: names[place] for role, place in places._asdict().items() if place is not None}


def _json_object(text: str, source: str, number: int) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(source, number, error.colno, "a JSON object", f"a fault: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        raise DataError(source, number, 1, "a JSON object", f"a fault: {error}") from None
    if not isinstance(record, dict):
        raise DataError(source, number, 1, "a JSON object", show(text))
    return record


def _is_repeated(text: str, key: str) -> bool:
    """Whether the outermost object has the key twice; json keeps the last one silently."""
    pairs: list[tuple[str, Any]] = []

    def keep(found: list[tuple[str, Any]]) -> None:
        pairs[:] = found  # the outermost object is the last to close

    json.loads(text, object_pairs_hook=keep)
    return sum(name == key for name, _ in pairs) > 1


def _append_id(ids: IdColumn, value: Any) -> tuple[str, str] | None:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return f"{NOUNS[ids.role]} id", show(json.dumps(value))
    return ids.append(value)


def _read_parquet(stream: BinaryIO, source: str, columns: Columns | None) -> RawLog:
    try:
        pyarrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ImportError("reading Parquet needs pyarrow, the extra `parquet` of td3-fast") from error
    row = 1
    try:
        file = parquet.ParquetFile(stream)
        names = file.schema_arrow.names
        places = _find_columns(names, columns, source)
        wanted = [names[place] for place in places if place is not None]
        blocks = []
        for batch in file.iter_batches(columns=wanted):
            # integers with gaps must not become floats on the way
            read = {names.index(name): batch[name].to_pandas(integer_object_nulls=True) for name in wanted}
            blocks.append(_frame_rows(read.__getitem__, places, source, row))
            row += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(source, row, 1, "a readable Parquet file", f"a fault: {error}") from error
    return collect(blocks, source, first_row=1)


def _frame_rows(column: Callable[[int], pd.Series], places: Places, source: str, first_row: int) -> Rows:
    users, items = (
        _frame_ids(role, column(place), place, source, first_row)
        for role, place in (("user", places.user), ("item", places.item))
    )
    if places.timestamp is None:
        return Rows(users, items, None)
    return Rows(users, items, _frame_times(column(places.timestamp), places.timestamp, source, first_row))


def _frame_ids(role: str, column: pd.Series, place: int, source: str, first_row: int) -> EncodedIds:
    expected = f"{NOUNS[role]} id, a string or an integer"
    try:
        codes, distinct = pd.factorize(column)
    except TypeError:
        raise DataError(source, first_row, place + 1, expected, f"values of type {column.dtype}") from None
    missing = np.flatnonzero(codes < 0)
    if len(missing):
        raise DataError(source, first_row + int(missing[0]), place + 1, expected, "a missing value")
    ids = []
    for code, value in enumerate(distinct):
        text = str(value) if isinstance(value, (int, np.integer)) and not isinstance(value, bool) else value
        fault = id_fault(role, text) if isinstance(text, str) else (expected, show(str(value)))
        if fault:
            raise DataError(source, first_row + int(np.argmax(codes == code)), place + 1, *fault)
        ids.append(text)
    return EncodedIds(codes, ids)


def _frame_times(column: pd.Series, place: int, source: str, first_row: int) -> NDArray[Any]:
    expected = "a finite number or a datetime as timestamp"

    def check(valid: NDArray[np.bool_]) -> None:
        if not valid.all():
            row = int(np.argmin(valid))
            raise DataError(source, first_row + row, place + 1, expected, show(str(column.iloc[row])))

    missing = column.isna().to_numpy()
    check(~missing)
    kind = column.dtype
    if pd.api.types.is_datetime64_any_dtype(kind) or pd.api.types.is_signed_integer_dtype(kind):
        return column.astype(np.int64).to_numpy()
    if pd.api.types.is_unsigned_integer_dtype(kind):
        return times_of(column.tolist())
    if pd.api.types.is_float_dtype(kind):
        values = column.to_numpy(dtype=np.float64)
        check(np.isfinite(values))
        return values
    times = TimeColumn()
    check(np.array([times.append(str(value)) is None for value in column.tolist()]))
    return times.taken()
