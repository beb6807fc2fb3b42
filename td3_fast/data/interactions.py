"""An interaction log as flat arrays: reading, checking, filtering, renumbering.

Memory is O(interactions): one array of items, one of offsets. Sequences, prefixes and batches are cut out
of it on demand (`split.py`, `batches.py`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from td3_fast.data.raw_log import PADDING, RawLog
from td3_fast.data.readers import Columns, read_file, read_frame

Repeats = Literal["keep", "first", "last"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Interactions:
    """Who interacted with what, in time order inside each user. The arrays are read-only.

    The interactions of user `u` are `items[offsets[u]:offsets[u + 1]]`, oldest first; equal times keep the
    order of the file. Item 0 is padding and never occurs in `items`. Items and users are numbered by their
    first appearance in the filtered file.
    """

    offsets: NDArray[np.int64]  # (users + 1,)
    items: NDArray[np.int32]  # (interactions,), 1 .. num_items - 1
    item_ids: NDArray[np.str_]  # (num_items,), item_ids[0] == "[PAD]"
    user_ids: NDArray[np.str_]  # (users,)
    name: str

    def __post_init__(self) -> None:
        for array in (self.offsets, self.items, self.item_ids, self.user_ids):
            array.flags.writeable = False

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
        """SHA-256 (hex) over sequences and ids: equal exactly when the data are; the name does not count."""
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
            f"{self.num_interactions:,} interactions)"
        )


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

    Args:
        source: a file (plain or gzip) or a DataFrame.
        format: one of `td3_fast.data.FORMATS`; guessed from the file's name and first line when None.
        columns: which columns hold "user", "item" and "timestamp", where the names differ from the usual
        ones.
            `{"timestamp": None}` ignores the times. Without times, the order of the file counts as time
            order.
        min_item_interactions, min_user_interactions: items with fewer interactions are left out, then users
        with
            fewer remaining ones.
        filter_passes: how often that pair of filters is applied; None: until nothing changes (k-core).
        repeats: "keep" every interaction, or only the "first" or "last" of each (user, item). Before the
        filters.
        name: defaults to the file's name without its endings.

    Raises:
        DataError: the first malformed line, as `file:line:column: expected ..., found ...`.
        ValueError: an argument out of range, or nothing left after the filters.
    """
    if min_item_interactions < 0 or min_user_interactions < 0:
        raise ValueError("min_item_interactions and min_user_interactions must not be negative")
    if filter_passes is not None and filter_passes < 1:
        raise ValueError(f"filter_passes must be at least 1, or None for until stable, not {filter_passes}")
    if repeats not in ("keep", "first", "last"):
        raise ValueError(f'repeats must be "keep", "first" or "last", not {repeats!r}')
    if isinstance(source, pd.DataFrame):
        log = read_frame(source, columns=columns)
        name = name or "frame"
    else:
        path = Path(source)
        log = read_file(path, format=format, columns=columns)
        name = name or path.name.split(".")[0] or path.name
    kept = np.arange(len(log.users))
    if repeats != "keep":
        kept = _without_repeats(log, last=repeats == "last")
    if min_item_interactions > 1 or min_user_interactions > 1:
        kept = _filtered(log, kept, min_item_interactions, min_user_interactions, filter_passes)
        if not len(kept):
            raise ValueError(
                f"{name}: no interaction is left with min_item_interactions={min_item_interactions} and "
                f"min_user_interactions={min_user_interactions}"
            )
    return assemble(log, kept, name)


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


def assemble(log: RawLog, kept: NDArray[np.int64], name: str) -> Interactions:
    """The rows `kept` (ascending) of a log as `Interactions`."""
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
    )
