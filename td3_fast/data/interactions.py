"""An interaction log as flat arrays: reading, checking, filtering, renumbering.

Memory is O(interactions): one array of items, one of offsets. Sequences, prefixes and batches are cut out
of it on demand (`split.py`, `batches.py`).
"""

from __future__ import annotations

import gzip
import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from td3_fast.data.raw_log import PADDING, RawLog
from td3_fast.data.readers import Columns, read_file, read_frame
from td3_fast.files import open_atomically

Repeats = Literal["keep", "first", "last"]
_ROWS_PER_WRITE = 1 << 16


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Interactions:
    """Who interacted with what, in time order inside each user. The arrays are read-only.

    The interactions of user `u` are `items[offsets[u]:offsets[u + 1]]`, oldest first; equal times keep the
    order of the file. Item 0 is padding and never occurs in `items`. Items and users are numbered by their
    first appearance in the filtered file.

    Raises:
        ValueError: the arrays do not fit together.
    """

    offsets: NDArray[np.int64]  # (users + 1,)
    items: NDArray[np.int32]  # (interactions,), 1 .. num_items - 1
    item_ids: NDArray[np.str_]  # (num_items,), item_ids[0] == "[PAD]"
    user_ids: NDArray[np.str_]  # (users,)
    name: str
    timed: bool = True  # False: in the order of the file, which had no times

    def __post_init__(self) -> None:
        if (
            len(self.offsets) != self.num_users + 1
            or self.offsets[0] != 0
            or (np.diff(self.offsets) < 0).any()
        ):
            raise ValueError("offsets must start at 0, never fall, and be one more than the users")
        if self.offsets[-1] != len(self.items):
            raise ValueError(f"offsets end at {self.offsets[-1]}, but there are {len(self.items)} items")
        if self.num_items < 1 or self.item_ids[0] != PADDING:
            raise ValueError(f"item_ids must start with {PADDING!r}")
        if len(self.items) and not 1 <= self.items.min() <= self.items.max() < self.num_items:
            raise ValueError(f"items must lie in 1 .. {self.num_items - 1}")
        for name in ("offsets", "items", "item_ids", "user_ids"):
            array = getattr(self, name).view()  # the caller may still write to its own
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @property
    def num_items(self) -> int:
        """Items, the padding item 0 included."""
        return len(self.item_ids)

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_interactions(self) -> int:
        return len(self.items)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Interactions of each user, (users,)."""
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over sequences and ids, numbered by first appearance: that of another order of a file's rows is
        another one. The name does not count."""
        digest = hashlib.sha256()
        digest.update(self.offsets.astype("<i8").tobytes())
        digest.update(self.items.astype("<i4").tobytes())
        for ids in (self.item_ids, self.user_ids):
            digest.update("\n".join(ids.tolist()).encode())  # ids hold no control characters
            digest.update(b"\0")
        return digest.hexdigest()

    def __repr__(self) -> str:
        return (
            f"Interactions({self.name!r}, {self.num_users:,} users, {self.num_items - 1:,} items, "
            f"{self.num_interactions:,} interactions{'' if self.timed else ', no times: in the order of the file'})"
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an interaction log holds, before any filter."""

    name: str
    num_users: int
    num_items: int  # without padding
    num_interactions: int
    shortest: int  # interactions of the user with the fewest
    median_length: float
    mean_length: float
    longest: int
    short_users: int  # users with fewer than 3 interactions: leave-one-out cannot test them
    repeats: int  # interactions of a user with an item they had met before
    has_times: bool
    ties: int  # neighbouring interactions of a user at the same time: their order is that of the file
    neighbours: int  # neighbouring interactions of a user in all


def load_interactions(
    source: str | Path | pd.DataFrame,
    *,
    format: str | None = None,
    columns: Columns | None = None,
    min_item_interactions: int = 0,
    min_user_interactions: int = 0,
    filter_passes: int | None = 1,
    repeats: Repeats = "keep",
    name: str | None = None,
) -> Interactions:
    """Read an interaction log, check it, filter it and number its users and items.

    Ids are strings ("007" is not "7"). Times only order the interactions of a user; where a file has none,
    its order counts as time order.

    Args:
        source: a file, plain or gzip, or a DataFrame.
        format: one of `td3_fast.data.FORMATS`. None: guessed from the name and the first line of the file.
        columns: the names of the columns of "user", "item" and "timestamp", where they are not the usual
            ones; `{"timestamp": None}` ignores the times. Other columns are counted, not read.
        min_item_interactions: items with fewer interactions are left out.
        min_user_interactions: then users with fewer remaining interactions are left out.
        filter_passes: how often both filters are applied in turn. None: until nothing changes (k-core).
        repeats: "keep" every interaction, or only the "first" or the "last" of a user with an item; done
            before the filters.
        name: what to call the data; the name of the file without endings when None.

    Raises:
        DataError: malformed data, as `file:line:column: expected ..., found ...`.
        ValueError: an argument out of range, or nothing left after the filters.
    """
    log, name = _read(source, format, columns, name)
    return _select(log, name, min_item_interactions, min_user_interactions, filter_passes, repeats)


def filter_interactions(
    interactions: Interactions,
    *,
    min_item_interactions: int = 0,
    min_user_interactions: int = 0,
    filter_passes: int | None = 1,
    repeats: Repeats = "keep",
    name: str | None = None,
) -> Interactions:
    """What `load_interactions` does after reading, with the same arguments and errors, to data at hand.

    Items are numbered anew, by first appearance in user order.
    """
    log = RawLog(
        users=np.repeat(np.arange(interactions.num_users, dtype=np.int32), interactions.lengths),
        items=interactions.items - 1,
        times=None,
        user_ids=interactions.user_ids.tolist(),
        item_ids=interactions.item_ids[1:].tolist(),
    )
    name = name or interactions.name
    limits = (min_item_interactions, min_user_interactions, filter_passes)
    return _select(log, name, *limits, repeats, timed=interactions.timed)


def check_interactions(
    source: str | Path | pd.DataFrame, *, format: str | None = None, columns: Columns | None = None
) -> Report:
    """Read an interaction log and count. Arguments and errors as in `load_interactions`."""
    log, name = _read(source, format, columns, None)
    rows = np.arange(len(log.users))
    order = _time_order(log, rows)
    users = log.users[order]
    same_user = users[1:] == users[:-1]
    ties = 0
    if log.times is not None:
        times = log.times[order]
        ties = int(np.count_nonzero(same_user & (times[1:] == times[:-1])))
    lengths = np.bincount(log.users)
    return Report(
        name=name,
        num_users=len(log.user_ids),
        num_items=len(log.item_ids),
        num_interactions=len(rows),
        shortest=int(lengths.min()),
        median_length=float(np.median(lengths)),
        mean_length=float(lengths.mean()),
        longest=int(lengths.max()),
        short_users=int(np.count_nonzero(lengths < 3)),
        repeats=len(rows) - len(_without_repeats(log, last=False)),
        has_times=log.times is not None,
        ties=ties,
        neighbours=int(np.count_nonzero(same_user)),
    )


def write_interactions(interactions: Interactions, path: str | Path) -> None:
    """Write a RecBole `.inter` file (gzip where the name ends in `.gz`), user by user, whole or not at all.

    `timestamp` is the position in the user's sequence. Reading it back gives the same sequences; items are
    numbered anew, by first appearance in this order.
    """
    path = Path(path)
    users = np.repeat(np.arange(interactions.num_users), interactions.lengths)
    positions = np.arange(interactions.num_interactions) - interactions.offsets[users]
    with open_atomically(path) as file:
        compressed = None
        if path.suffix == ".gz":
            # no name and time in the gzip header: the same data give the same bytes
            compressed = gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0)
        stream = io.TextIOWrapper(compressed or file, encoding="utf-8", newline="\n")
        stream.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for first in range(0, len(users), _ROWS_PER_WRITE):
            rows = slice(first, first + _ROWS_PER_WRITE)
            columns = (
                interactions.user_ids[users[rows]].tolist(),
                interactions.item_ids[interactions.items[rows]].tolist(),
                positions[rows].tolist(),
            )
            for user, item, position in zip(*columns, strict=True):
                stream.write(f"{user}\t{item}\t{position}\n")
        stream.detach()
        if compressed is not None:
            compressed.close()


def _read(
    source: str | Path | pd.DataFrame, format: str | None, columns: Columns | None, name: str | None
) -> tuple[RawLog, str]:
    if isinstance(source, pd.DataFrame):
        if format is not None:
            raise ValueError(f"format is for files, not for a DataFrame; got {format!r}")
        return read_frame(source, columns=columns), name or "DataFrame"
    path = Path(source)
    return read_file(path, format=format, columns=columns), name or path.name.split(".")[0] or path.name


def _select(
    log: RawLog,
    name: str,
    min_item: int,
    min_user: int,
    filter_passes: int | None,
    repeats: Repeats,
    *,
    timed: bool | None = None,
) -> Interactions:
    if min_item < 0 or min_user < 0:
        raise ValueError("min_item_interactions and min_user_interactions must not be negative")
    if filter_passes is not None and filter_passes < 1:
        raise ValueError(f"filter_passes must be at least 1, or None for until stable, not {filter_passes}")
    if repeats not in ("keep", "first", "last"):
        raise ValueError(f'repeats must be "keep", "first" or "last", not {repeats!r}')
    kept = np.arange(len(log.users))
    if repeats != "keep":
        kept = _without_repeats(log, last=repeats == "last")
    if min_item > 1 or min_user > 1:
        kept = _filtered(log, kept, min_item, min_user, filter_passes)
        if not len(kept):
            raise ValueError(
                f"{name}: no interaction is left with min_item_interactions={min_item} and "
                f"min_user_interactions={min_user}"
            )
    return assemble(log, kept, name, timed=timed)


def _time_order(log: RawLog, kept: NDArray[np.int64]) -> NDArray[np.int64]:
    """`kept` sorted by user, then time; stable, so that equal times keep the order of the file."""
    users = log.users[kept]
    if log.times is None:
        return kept[np.argsort(users, kind="stable")]
    return kept[np.lexsort((log.times[kept], users))]


def _without_repeats(log: RawLog, *, last: bool) -> NDArray[np.int64]:
    """Rows, in file order, that are the first (last) interaction in time of their user with their item."""
    order = _time_order(log, np.arange(len(log.users)))
    if last:
        order = order[::-1]
    pairs = log.users[order].astype(np.int64) * len(log.item_ids) + log.items[order]
    _, first = np.unique(pairs, return_index=True)
    return np.sort(order[first])


def _filtered(
    log: RawLog, kept: NDArray[np.int64], min_item: int, min_user: int, passes: int | None
) -> NDArray[np.int64]:
    done = 0
    while passes is None or done < passes:
        before = len(kept)
        for codes, minimum in ((log.items, min_item), (log.users, min_user)):
            counts = np.bincount(codes[kept])
            kept = kept[counts[codes[kept]] >= minimum]
            if not len(kept):
                return kept
        done += 1
        if len(kept) == before:
            break
    return kept


def _renumber(codes: NDArray[np.int32], ids: list[str]) -> tuple[NDArray[np.int32], list[str]]:
    """Codes 0.. in order of first appearance, and their ids."""
    numbers, present = pd.factorize(codes)
    return numbers.astype(np.int32), [ids[code] for code in present]


def assemble(log: RawLog, kept: NDArray[np.int64], name: str, *, timed: bool | None = None) -> Interactions:
    """The rows `kept` (ascending) of a log as `Interactions`; timed: as of that, if it is known."""
    users, user_ids = _renumber(log.users[kept], log.user_ids)
    items, item_ids = _renumber(log.items[kept], log.item_ids)
    times = None if log.times is None else log.times[kept]
    filtered = RawLog(users=users, items=items, times=times, user_ids=user_ids, item_ids=item_ids)
    order = _time_order(filtered, np.arange(len(users)))
    offsets = np.zeros(len(user_ids) + 1, dtype=np.int64)
    np.cumsum(np.bincount(users, minlength=len(user_ids)), out=offsets[1:])
    return Interactions(
        offsets=offsets,
        items=(items[order] + 1).astype(np.int32),
        item_ids=np.array([PADDING, *item_ids], dtype=np.str_),
        user_ids=np.array(user_ids, dtype=np.str_),
        name=name,
        timed=log.times is not None if timed is None else timed,
    )
