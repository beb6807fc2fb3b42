"""Delimited text with the place of every fault.

A file is read in blocks of whole lines. A block is first parsed as a whole with array operations, which
accept only what is certainly well formed; where they decline, the block is parsed line by line, which
either succeeds or raises a `DataError`. The line-by-line parser alone decides what is valid.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from td3_fast.data.raw_log import (
    EXACT_DIGITS,
    DataError,
    EncodedIds,
    IdColumn,
    Rows,
    TimeColumn,
    id_fault,
    show,
    tells_apart,
)

_BLOCK_BYTES = 1 << 23
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_WIDEST = 64  # bytes of a field that the array operations take
QUOTING = {",": "a comma", ";": "a semicolon"}  # separators of fields that may stand in quotes
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_FLOAT_BYTES = np.zeros(256, dtype=bool)
_FLOAT_BYTES[list(b"0123456789+-.eE\0")] = True
_POWERS = list(b"eE")


class Block(NamedTuple):
    """Whole lines of a file, each ending in a line feed."""

    first_line: int
    lines: bytes


class Field(NamedTuple):
    """A field of a line and the column where it starts."""

    text: str
    column: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the fields of a line are; `user`, `item` and `timestamp` are indices into `names`."""

    source: str
    separator: str
    names: tuple[str, ...]
    user: int
    item: int
    timestamp: int | None

    @property
    def expectation(self) -> str:
        by = {"\t": "tabs", ",": "commas", ";": "semicolons"}.get(self.separator, repr(self.separator))
        return f"{len(self.names)} fields separated by {by} ({', '.join(self.names)})"


def read_blocks(stream: BinaryIO, source: str, *, must_be_gzip: bool) -> Iterator[Block]:
    """Plain or gzip data in blocks of whole lines.

    A byte-order mark and carriage returns before line feeds are dropped; a last line without its line feed
    gets it.
    """
    data: Any = stream
    magic = data.peek(2)[:2]  # not read: a pipe has no way back
    if magic == _GZIP:
        data = gzip.GzipFile(fileobj=stream)
    elif must_be_gzip:
        found = f"bytes {magic.hex(' ')}" if magic else "an empty file"
        raise DataError(source, 1, 1, "gzip data, as the name says", found)
    first_line, rest, at_end = 1, b"", False
    while not at_end:
        text, at_end, fault = _read(data, rest)
        if fault is not None:
            line = first_line + text.count(b"\n")
            column = len(text) - text.rfind(b"\n")
            found = "its end in the middle" if isinstance(fault, EOFError) else f"a damaged one ({fault})"
            raise DataError(source, line, column, "a whole gzip stream", found) from fault
        if first_line == 1 and not rest:
            text = text.removeprefix(_BOM)
        if at_end and text and not text.endswith(b"\n"):
            text += b"\n"
        end = text.rfind(b"\n") + 1
        rest = text[end:]
        if end:
            yield Block(first_line, text[:end].replace(b"\r\n", b"\n"))
            first_line += text.count(b"\n")


def _read(data: Any, rest: bytes) -> tuple[bytes, bool, Exception | None]:
    """`rest` and the next bytes; whether the data end here; what broke, if anything."""
    pieces, size = [rest], 0
    while size < _BLOCK_BYTES:
        try:
            # unlike read, read1 hands out all that could be decompressed before it reports a broken stream
            piece = data.read1(_BLOCK_BYTES - size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            return b"".join(pieces), True, error
        if not piece:
            return b"".join(pieces), True, None
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces), False, None


def decode(line: bytes, source: str, number: int) -> str:
    """The text of line `number`, which must be UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode()) + 1
        raise DataError(source, number, column, "UTF-8 text", f"the byte 0x{line[error.start]:02x}") from None


def split_line(text: str, separator: str, source: str, number: int) -> list[Field]:
    """The fields of a line. Between commas or semicolons they may stand in double quotes, with "" for one."""
    fields = []
    if separator == "::" and ":::" in text:  # which of them separate?
        raise DataError(source, number, text.index(":::") + 1, "'::' between fields", show(":::"))
    if separator not in QUOTING or '"' not in text:
        column = 1
        for field in text.split(separator):
            fields.append(Field(field, column))
            column += len(field) + len(separator)
        return fields
    start = 0
    while True:
        if text.startswith('"', start):
            match = _QUOTED.match(text, start)
            if match is None:
                raise DataError(
                    source, number, start + 1, "a closing quote on the same line", show(text[start:])
                )
            field, end = match[1].replace('""', '"'), match.end()
            if end < len(text) and text[end] != separator:
                expected = f"{QUOTING[separator]} or the end of the line after a closing quote"
                raise DataError(source, number, end + 1, expected, show(text[end:]))
        else:
            end = text.find(separator, start)
            end = len(text) if end < 0 else end
            field = text[start:end]
            if '"' in field:
                column = start + field.index('"') + 1
                raise DataError(source, number, column, "quotes around a whole field only", show(field))
        fields.append(Field(field, start + 1))
        if end == len(text):
            return fields
        start = end + 1


def parse_blocks(blocks: Iterable[Block], layout: Layout) -> Iterator[Rows]:
    """The rows of each block.

    Raises:
        DataError: the first malformed line.
    """
    blank, times = None, TimeColumn()
    for block in blocks:
        rows = None if blank or times.dates else _parse_whole(block, layout)
        if rows is None:
            rows, blank = _parse_lines(block, layout, times, blank)
        else:
            times.dates = False
        yield rows


def _parse_lines(
    block: Block, layout: Layout, times: TimeColumn, blank: int | None
) -> tuple[Rows, int | None]:
    """Parse line by line. Blank lines may stand at the end of the file only: `blank` is the first pending."""
    columns = ((IdColumn("user"), layout.user), (IdColumn("item"), layout.item))
    source, wanted = layout.source, len(layout.names)
    for number, line in enumerate(block.lines[:-1].split(b"\n"), block.first_line):
        if not line:
            blank = blank or number
            continue
        if blank is not None:
            raise DataError(source, blank, 1, layout.expectation, "an empty line")
        text = decode(line, source, number)
        fields = split_line(text, layout.separator, source, number)
        if len(fields) != wanted:
            column = len(text) + 1 if len(fields) < wanted else fields[wanted].column
            raise DataError(source, number, column, layout.expectation, str(len(fields)))
        for ids, place in columns:
            if fault := ids.append(fields[place].text):
                raise DataError(source, number, fields[place].column, *fault)
        if layout.timestamp is not None:
            field = fields[layout.timestamp]
            if fault := times.append(field.text):
                raise DataError(source, number, field.column, *fault)
    users, items = (ids.encoded() for ids, _ in columns)
    return Rows(users, items, None if layout.timestamp is None else times.taken()), blank


def _parse_whole(block: Block, layout: Layout) -> Rows | None:
    """Parse all lines at once, or None where anything is unusual."""
    text, separator = block.lines, layout.separator.encode()
    if b"\0" in text:
        return None
    if layout.separator in QUOTING and b'"' in text:
        if not _only_whole_fields_quoted(text, separator):
            return None
        text = text.replace(b'"', b"")
    if len(separator) > 1:
        if b"\t" in text or separator + separator[:1] in text:  # such as a:::b
            return None
        text = text.replace(separator, b"\t")
        if separator[:1] in text:
            return None
        separator = b"\t"
    try:
        text.isascii() or text.decode()
    except UnicodeDecodeError:
        return None
    data = np.frombuffer(text, dtype=np.uint8)
    ends = np.flatnonzero((data == separator[0]) | (data == ord("\n")))
    width, rows = len(layout.names), text.count(b"\n")
    if len(ends) != rows * width or not (data[ends[width - 1 :: width]] == ord("\n")).all():
        return None
    # padded, so that fixed-width windows may reach beyond the last line
    data = np.concatenate([data, np.zeros(_WIDEST, dtype=np.uint8)])
    starts = np.concatenate([[0], ends[:-1] + 1])

    def window(index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return starts[index::width], ends[index::width] - starts[index::width]

    users = _encode_fields("user", data, *window(layout.user))
    items = _encode_fields("item", data, *window(layout.item))
    if users is None or items is None:
        return None
    if layout.timestamp is None:
        return Rows(users, items, None)
    times = _parse_times(data, *window(layout.timestamp))
    return None if times is None else Rows(users, items, times)


def _only_whole_fields_quoted(text: bytes, separator: bytes) -> bool:
    """Whether quotes stand in pairs around whole fields that hold no quote, separator or line feed."""
    data = np.frombuffer(b"\n" + text, dtype=np.uint8)
    ends = np.flatnonzero((data == separator[0]) | (data == ord("\n")))
    quotes = np.flatnonzero(data == ord('"'))
    if len(quotes) % 2:
        return False
    opening, closing = quotes[::2], quotes[1::2]
    # the field after ends[k] starts with the opening quote and ends with the closing one
    field = np.searchsorted(ends, opening) - 1
    return bool((ends[field] == opening - 1).all() and (ends[field + 1] == closing + 1).all())


def _encode_fields(
    role: str, data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> EncodedIds | None:
    """Number equal fields, eight bytes at a time as one integer; exact, since fields hold no zero byte."""
    longest = int(lengths.max())
    if lengths.min() < 1 or longest > _WIDEST:
        return None
    codes: NDArray[np.int64] | None = None
    for first in range(0, longest, 8):
        column = np.arange(first, first + 8)
        word = data[starts[:, None] + column]
        word[column >= lengths[:, None]] = 0
        part, distinct = pd.factorize(word.view(np.uint64)[:, 0])
        if codes is not None:
            part, _ = pd.factorize(codes * len(distinct) + part)
        codes = cast("NDArray[np.int64]", part)
    assert codes is not None
    # factorize numbers by first appearance: a new code is a new maximum
    first_rows = np.flatnonzero(np.diff(np.maximum.accumulate(codes), prepend=-1))
    buffer = data.tobytes()
    ids = [
        buffer[start : start + length].decode()
        for start, length in zip(starts[first_rows].tolist(), lengths[first_rows].tolist(), strict=True)
    ]
    if any(id_fault(role, id_) for id_ in ids):
        return None
    return EncodedIds(codes, ids)


def _parse_times(
    data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64] | NDArray[np.float64] | None:
    longest = int(lengths.max())
    if lengths.min() < 1 or longest > _WIDEST:
        return None
    if longest <= 19:
        value = np.zeros(len(starts), dtype=np.uint64)  # 19 digits fit
        digits_only = True
        for place in range(longest):
            digit = data[starts + place] - np.uint8(ord("0"))
            inside = place < lengths
            if not (digit <= 9)[inside].all():
                digits_only = False
                break
            value = np.where(inside, value * np.uint64(10) + digit, value)
        if digits_only:
            return None if value.max() >= 2**63 else value.astype(np.int64)
    column = np.arange(longest)
    text = data[starts[:, None] + column]
    text[column >= lengths[:, None]] = 0
    if not _FLOAT_BYTES[text].all() or not (text == ord(".")).any():
        return None  # signed integers are left to the exact parser
    try:
        values = text.view(f"S{longest}")[:, 0].astype(np.float64)
    except ValueError:
        return None
    if not np.isfinite(values).all():
        return None
    return values if _are_exact(values, text, lengths) else None


def _are_exact(values: NDArray[np.float64], text: NDArray[np.uint8], lengths: NDArray[np.int64]) -> bool:
    """Whether `parse_number` has the same floats for these texts (rows, longest), for all at once."""
    if text.shape[1] <= EXACT_DIGITS:
        return True
    powers = np.cumsum(np.isin(text, _POWERS), axis=1) > 0
    digits = ((text >= ord("0")) & (text <= ord("9")) & ~powers).sum(axis=1)
    if digits.max() <= EXACT_DIGITS:
        return True
    if not powers.any():
        point = (text == ord(".")).argmax(axis=1)
        decimals = np.where((text == ord(".")).any(axis=1), lengths - point - 1, 0)
        if tells_apart(float(np.abs(values).max()), int(decimals.max())):
            return True
    # as Python and NumPy write a float, and no other
    return bool((values.astype("S64") == np.ascontiguousarray(text).view(f"S{text.shape[1]}")[:, 0]).all())
