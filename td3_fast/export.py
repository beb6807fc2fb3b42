"""Hard sequences of a summary as an interaction log with real item ids, which any library can train on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from td3_fast.data import Interactions
from td3_fast.data.raw_log import id_fault
from td3_fast.progress import Progress, silent
from td3_fast.summary import Summary


@dataclass(frozen=True, kw_only=True)
class HardConfig:
    """How distributions over items become items; see `Summary.hard_sequences`."""

    draws: int | None = None  # sequences per synthetic user; None: one, of the most probable items
    temperature: float = 1.0
    seed: int = 0


def hard_interactions(
    summary: Summary, config: HardConfig | None = None, *, progress: Progress = silent
) -> Interactions:
    """The hard sequences of a summary, its items numbered and named as there, users "s0", "s1" and so on.

    Where several sequences are drawn for a synthetic user they are users of their own: "s0-0", "s0-1".

    Raises:
        ValueError: the summary does not name its items, an id could not stand in a text file, or the configuration
            is out of range.
    """
    config = config or HardConfig()
    if summary.metadata is None:
        raise ValueError("the summary does not name its items: set `summary.metadata`")
    ids = summary.metadata.item_ids
    for item in ids[1:]:
        if id_fault("item", item) is not None:
            raise ValueError(
                f"the item id {item!r} cannot stand in a table of text: give the items other ids and distil anew"
            )
    sequences = summary.hard_sequences(
        draws=config.draws, temperature=config.temperature, seed=config.seed, progress=progress
    ).cpu()
    users = [f"s{user}" for user in range(summary.num_users)]
    if (config.draws or 1) > 1:
        users = [f"{user}-{draw}" for user in users for draw in range(config.draws or 1)]
    return Interactions(
        offsets=np.arange(len(users) + 1, dtype=np.int64) * summary.num_positions,
        items=sequences.flatten().numpy().astype(np.int32),
        item_ids=np.array(ids, dtype=np.str_),
        user_ids=np.array(users, dtype=np.str_),
        name=f"{summary.metadata.preprocessing.data}-{summary.size}",
    )
