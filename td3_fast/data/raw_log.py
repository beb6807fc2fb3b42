"""What every reader produces, and what it says about malformed data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

PADDING = "[PAD]"
NOUNS = {"user": "a user", "item": "an item"}
_MAX_ID = 256  # characters; ids are kept in arrays as wide as the longest
_INTEGER = re.compile(r"([+-]?[0-9]{1,64})(?:\.0*)?")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?(?P<decimals>[0-9]*)|\.(?P<all>[0-9]+))(?P<power>[eE][+-]?[0-9]+)?")
_EXACT = 2**53  # integers up to here are float64 numbers
EXACT_DIGITS = 15  # numbers of so many are different float64 numbers
_DATE = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"(?:[T ][0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]{1,9})?)?(?:Z|[+-][0-9]{2}:[0-9]{2})?)?"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")


Number: TypeAlias = int | float | Decimal


class DataError(ValueError):
    """Malformed data: `source:line:column: expected ..., found ...`.

    Line and column count from 1, the column in characters. For a DataFrame or a Parquet file they are the
    row and the number of the column.
    """

    def __init__(self, source: str, line: int, column: int, expected: str, found: str) -> None:
        super().__init__(source, line, column, expected, found)
        self.source, self.line, self.column, self.expected, self.found = source, line, column, expected, found

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True, kw_only=True)
class RawLog:
    """Rows in file order. `users` and `items` index `user_ids` and `item_ids`."""

    users: NDArray[np.int32]  # (rows,)
    items: NDArray[np.int32]  # (rows,)
    times: NDArray[Any] | None  # (rows,) int64 or float64, finite, in the order of what was read
    user_ids: list[str]
    item_ids: list[str]


class EncodedIds(NamedTuple):
    """A column of ids: row i holds `distinct[codes[i]]`."""

    codes: NDArray[Any]  # (rows,) integers
    distinct: list[str]


class Rows(NamedTuple):
    """The parsed rows of one block."""

    users: EncodedIds
    items: EncodedIds
    times: NDArray[Any] | None


class IdColumn:
    """Ids of users or items that come one by one; each distinct one is checked once."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.numbers: dict[str, int] = {}
        self.codes: list[int] = []

    def append(self, text: str) -> tuple[str, str] | None:
        """Add an id, or say what was expected and found instead of one."""
        code = self.numbers.get(text)
        if code is None:
            if fault := id_fault(self.role, text):
                return fault
            code = self.numbers[text] = len(self.numbers)
        self.codes.append(code)
        return None

    def encoded(self) -> EncodedIds:
        return EncodedIds(np.array(self.codes, dtype=np.int32), list(self.numbers))


class TimeColumn:
    """Times that come one by one: all of them numbers, or all of them dates."""

    def __init__(self) -> None:
        self.dates: bool | None = None  # None: nothing came yet
        self.values: list[Number] = []

    def append(self, text: str) -> tuple[str, str] | None:
        """Add a time, or say what was expected and found instead of one."""
        value = parse_number(text)
        dated = value is None
        if dated:
            value = parse_date(text)
        if value is None:
            return "a finite number or a date such as 2024-05-31 20:15:00 as timestamp", show(text)
        if self.dates is not None and dated != self.dates:
            return f"a {'date' if self.dates else 'number'} as timestamp, as in the lines before", show(text)
        self.dates = dated
        self.values.append(value)
        return None

    def taken(self) -> NDArray[Any]:
        """What came since the last call."""
        values, self.values = self.values, []
        return times_of(values)


def collect(blocks: Iterable[Rows], source: str, *, first_row: int) -> RawLog:
    """Join blocks and number ids by first appearance. `first_row` is the line to blame where no row is."""
    user_numbers: dict[str, int] = {}
    item_numbers: dict[str, int] = {}
    users: list[NDArray[np.int32]] = []
    items: list[NDArray[np.int32]] = []
    times: list[NDArray[Any]] = []
    for block in blocks:
        for column, numbers, parts in (
            (block.users, user_numbers, users),
            (block.items, item_numbers, items),
        ):
            known = [numbers.setdefault(id_, len(numbers)) for id_ in column.distinct]
            parts.append(np.array(known, dtype=np.int32)[column.codes])
        if block.times is not None:
            times.append(block.times)
    if not user_numbers:
        raise DataError(source, first_row, 1, "at least one interaction", "none")
    return RawLog(
        users=np.concatenate(users),
        items=np.concatenate(items),
        times=_join_times(times) if times else None,
        user_ids=list(user_numbers),
        item_ids=list(item_numbers),
    )


def id_fault(role: str, text: str) -> tuple[str, str] | None:
    """What was expected and found, if `text` cannot be the id of a user or an item."""
    if not text:
        return f"{NOUNS[role]} id", "nothing"
    if len(text) > _MAX_ID:
        return f"{NOUNS[role]} id of at most {_MAX_ID} characters", f"{len(text)} characters"
    if control := _CONTROL.search(text):
        return f"{NOUNS[role]} id without control characters", f"{control[0]!r} in {show(text)}"
    if text != text.strip():
        return f"{NOUNS[role]} id without blanks around it", show(text)
    if role == "item" and text == PADDING:
        return "an item id other than the one reserved for padding", show(text)
    return None


def parse_number(text: str) -> Number | None:
    """The finite number that `text` is, or None; as a float where no other number so written is the same float."""
    if integer := _INTEGER.fullmatch(text):
        return int(integer[1])
    if not (number := _NUMBER.fullmatch(text)):
        return None
    value = float(text)
    if not math.isfinite(value):
        return None
    digits = sum(map(str.isdigit, text)) - len(re.sub("[^0-9]", "", number["power"] or ""))
    decimals = len(number["decimals"] or number["all"] or "")
    apart = number["power"] is None and tells_apart(abs(value), decimals)
    if digits <= EXACT_DIGITS or apart or repr(value) == text:  # no other float is written like that
        return value
    try:
        return Decimal(text)
    except InvalidOperation:  # a power beyond all measure
        return None


def tells_apart(largest: float, decimals: int) -> bool:
    """Whether numbers up to `largest` with so many decimals are different floats."""
    return bool(np.spacing(largest) < 10.0**-decimals)


def times_of(values: Sequence[Number]) -> NDArray[Any]:
    """int64 or float64 where that holds them in their order, else objects."""
    kinds = {type(value) for value in values}
    if Decimal in kinds:  # what was read as a float is compared as it was written, too
        values = [Decimal(repr(value)) if isinstance(value, float) else value for value in values]
    integers = [value for value in values if isinstance(value, int)] if int in kinds else [0]
    least, most = min(integers), max(integers)
    if kinds <= {int}:
        return np.array(values, dtype=np.int64 if least >= -(2**63) and most < 2**63 else object)
    fits = Decimal not in kinds and least >= -_EXACT and most <= _EXACT
    return np.array(values, dtype=np.float64 if fits else object)


def _join_times(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """What `times_of` makes of all; where that is objects, their ranks."""
    kinds = {part.dtype.kind for part in parts}
    integers = [part for part in parts if part.dtype.kind == "i" and len(part)]
    exact = all(part.min() >= -_EXACT and part.max() <= _EXACT for part in integers)
    if "O" not in kinds and (len(kinds) == 1 or exact):
        return np.concatenate(parts)
    whole = times_of([value for part in parts for value in part.tolist()])
    return whole if whole.dtype != object else np.unique(whole, return_inverse=True)[1].astype(np.int64)


def parse_date(text: str) -> int | None:
    """Nanoseconds since 1970 of a date or a moment as ISO 8601 writes it, in UTC where it names no zone; or None."""
    if not _DATE.fullmatch(text):
        return None
    whole, _, rest = text.replace("Z", "+00:00").partition(".")
    digits = re.match("[0-9]*", rest)
    fraction = digits.group() if digits else ""
    try:
        moment = datetime.fromisoformat(whole + rest[len(fraction) :])
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    since = moment - _EPOCH
    return (since.days * 86_400 + since.seconds) * 10**9 + int(fraction.ljust(9, "0"))


def show(text: str) -> str:
    """`text` quoted, and cut where it is long."""
    return repr(text if len(text) <= 40 else text[:37] + "...")
