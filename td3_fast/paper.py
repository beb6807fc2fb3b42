"""The paper's own figures, which `td3-fast reproduce` prints its figures beside, and what each of its cells is.

`paper_results.csv` holds the cells of tables 2, 3 and 6 of TD3 (*Tucker Decomposition Based Dataset Distillation Method
for Sequential Recommendation*, WWW '25) for the data sets on which they can be compared: test part, 100 sampled
negatives, percent. Cells that the text of the paper garbles are left out.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

# method in the paper's tables -> (row of an evaluation, changes of `DistillConfig`)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "TD3": ("summary", {}),
    "TD3 without ALT": ("summary", {"augmentation": False}),
    "TD3 without FSA": ("summary", {"alignment": 0.0}),
    "TD3 without FSA and ALT": ("summary", {"augmentation": False, "alignment": 0.0}),
    "farzi": ("summary", {"summary": "farzi"}),
    "full": ("full", {}),
    "random": ("random", {}),
    "longest": ("longest", {}),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A method at a size, with the paper's figures: metric -> (mean, standard deviation or None), in percent."""

    table: int
    dataset: str
    method: str
    size: str | None  # "50x50"; None: the full data
    published: dict[str, tuple[float, float | None]]


def tables() -> dict[int, tuple[str, ...]]:
    """Table -> the data sets that it can be reproduced on."""
    found: dict[int, dict[str, None]] = {}
    for row in _rows():
        found.setdefault(int(row["table"]), {})[row["dataset"]] = None
    return {table: tuple(datasets) for table, datasets in found.items()}


def cells_of(table: int, dataset: str) -> list[Cell]:
    """The cells of a table for one data set, in its order.

    Raises:
        ValueError: there is no such table, or not for these data.
    """
    known = tables()
    if dataset not in known.get(table, ()):
        offered = "; ".join(f"table {number} on {', '.join(names)}" for number, names in known.items())
        raise ValueError(f"table {table} on {dataset!r} cannot be reproduced: there are {offered}")
    cells: dict[tuple[str, str], Cell] = {}
    for row in _rows():
        if int(row["table"]) != table or row["dataset"] != dataset:
            continue
        where = row["method"], row["size"]
        if where not in cells:
            cells[where] = Cell(
                table=table, dataset=dataset, method=row["method"], size=row["size"] or None, published={}
            )
        deviation = float(row["std_percent"]) if row["std_percent"] else None
        cells[where].published[row["metric"]] = float(row["mean_percent"]), deviation
    return list(cells.values())


def _rows() -> list[dict[str, str]]:
    text = files("td3_fast").joinpath("paper_results.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
