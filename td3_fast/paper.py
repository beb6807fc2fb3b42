"""The paper's own figures, which `td3-fast reproduce` prints its figures beside, and what each of its cells is.

`paper_results.csv` holds the cells of tables 2, 3 and 6 of TD3 (*Tucker Decomposition Based Dataset Distillation Method
for Sequential Recommendation*, WWW '25) for the data sets on which they can be compared, and table 4, which is on
Epinions alone: test part, 100 sampled negatives, percent. Cells that the text of the paper garbles are left out.
`paper_cost.csv` is its table 5: seconds and MB on one A100.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

# method in the paper's tables -> (row of an evaluation, changes of `DistillConfig`)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "TD3": ("summary", {}),
    "TD3 without ALT": ("summary", {"augmentation": False}),
    "TD3 without FSA": ("summary", {"alignment": 0.0}),
    "TD3 without FSA and ALT": ("summary", {"augmentation": False, "alignment": 0.0}),
    "farzi": ("summary", {"summary": "farzi", "initial": "noise"}),
    "full": ("full", {}),
    "random": ("random", {}),
    "longest": ("longest", {}),
    "zero-step": ("zero-step", {}),
}
SAME_FORM = ("2", "3", "6")  # tables of one learner, each with its own cells for each data set
CROSS = "4"  # table of several learners on one summary
DISTILLING = "SASRec"  # the learner of the paper's summaries


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A method at a size, with the paper's figures: metric -> (mean, standard deviation or None), in percent."""

    table: str
    dataset: str
    method: str
    size: str | None  # "50x50"; None: the full data
    published: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    learner: str = DISTILLING  # what is trained and scored
    row: str = "summary"  # of an evaluation
    changes: Mapping[str, Any] = field(default_factory=dict)  # of `DistillConfig`
    against: str | None = None  # method that it is tested against
    same_run_as: str | None = None  # method whose summaries are this one's too
    same_epochs_as: str | None = (
        None  # method whose distillation is this one's, up to how its epochs are compared
    )
    ddof: int | None = None  # of its deviations, where not as its semantics have it

    @property
    def label(self) -> str:
        """The cell in words, as "TD3 50x50 GRU4Rec"."""
        other = None if self.learner == DISTILLING and self.table != CROSS else self.learner
        return " ".join(filter(None, (self.method, self.size, other)))


def tables() -> dict[str, tuple[str, ...]]:
    """Table of one learner -> the data sets that it can be reproduced on."""
    found: dict[str, dict[str, None]] = {}
    for row in _rows("paper_results.csv"):
        if row["table"] in SAME_FORM:
            found.setdefault(row["table"], {})[row["dataset"]] = None
    return {table: tuple(datasets) for table, datasets in found.items()}


def cells_of(table: str, dataset: str, size: str | None = None) -> list[Cell]:
    """The cells of table 2, 3 or 6 for one data set, in its order; of one size and those without one, if it is named.

    Raises:
        ValueError: there is no such table, or not for these data or of this size.
    """
    known = tables()
    if dataset not in known.get(table, ()):
        offered = "; ".join(f"table {number} on {', '.join(names)}" for number, names in known.items())
        raise ValueError(f"table {table} on {dataset!r} cannot be reproduced: there are {offered}")
    cells = [
        _cell(table, dataset, *where, published) for where, published in _published(table, dataset).items()
    ]
    sizes = dict.fromkeys(cell.size for cell in cells if cell.size is not None)
    if size is not None and size not in sizes:
        raise ValueError(f"table {table} on {dataset} has no summary of {size}: there are {', '.join(sizes)}")
    return [cell for cell in cells if size is None or cell.size in (None, size)]


def cross_cells(dataset: str, size: str) -> list[Cell]:
    """Table 4: its learners on one summary, the untrained control of each and the full data.

    The paper's figures stand beside for the data and the size that it has there (`published_size`).
    """
    published = _published(CROSS, dataset)
    cells = []
    for learner in dict.fromkeys(
        row["learner"] for row in _rows("paper_results.csv") if row["table"] == CROSS
    ):
        for where in (("TD3", size, learner), ("zero-step", size, learner), ("full", "", learner)):
            cells.append(_cell(CROSS, dataset, *where, published.get(where, {})))
    return cells


def published_size(dataset: str) -> str | None:
    """The size of the paper's summary in table 4; None for data that are not in it."""
    return next((size for _, size, _ in _published(CROSS, dataset) if size), None)


def published_shares(metric: str = "NDCG@10") -> dict[str, float]:
    """Learner -> the paper's figure on the summary in percent of that on the full data, in its table 4 (Epinions)."""
    figures = {
        (row["learner"], row["method"]): float(row["mean_percent"])
        for row in _rows("paper_results.csv")
        if row["table"] == CROSS and row["metric"] == metric
    }
    learners = dict.fromkeys(learner for learner, _ in figures)
    return {learner: 100 * figures[learner, "TD3"] / figures[learner, "full"] for learner in learners}


def published_costs(dataset: str) -> dict[str, tuple[float, float]]:
    """Operation -> (seconds, MB) of table 5; nothing for data that are not in it."""
    return {
        row["operation"]: (float(row["seconds"]), float(row["memory_mb"]))
        for row in _rows("paper_cost.csv")
        if row["dataset"] == dataset
    }


Where = tuple[str, str, str]  # method, size or nothing, learner


def _cell(
    table: str,
    dataset: str,
    method: str,
    size: str,
    learner: str,
    published: dict[str, tuple[float, float | None]],
) -> Cell:
    row, changes = METHODS[method]
    return Cell(
        table=table,
        dataset=dataset,
        method=method,
        size=size or None,
        published=published,
        learner=learner,
        row=row,
        changes=changes,
        # the full data are what a summary is to reach, a summary what the others are to beat
        against={"TD3": "full", "full": None}.get(method, "TD3"),
    )


def _published(table: str, dataset: str) -> dict[Where, dict[str, tuple[float, float | None]]]:
    found: dict[Where, dict[str, tuple[float, float | None]]] = {}
    for row in _rows("paper_results.csv"):
        if (row["table"], row["dataset"]) == (table, dataset):
            deviation = float(row["std_percent"]) if row["std_percent"] else None
            figures = found.setdefault((row["method"], row["size"], row["learner"]), {})
            figures[row["metric"]] = float(row["mean_percent"]), deviation
    return found


def _rows(name: str) -> list[dict[str, str]]:
    text = files("td3_fast").joinpath(name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
