"""From evaluated rows to the figures of a table: means and deviations, recovery, and what a difference is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from td3_fast.evaluate import Row
from td3_fast.metrics import mean_and_sd, recovery
from td3_fast.paper import Cell
from td3_fast.significance import PairedTest, paired_t_test
from td3_fast.training import PROTOCOLS

CONTROL = "zero-step"
FULL = "full"
FIELDS = (
    "table", "dataset", "method", "size", "learner", "protocol", "metric", "mean_percent", "sd_percent", "over",
    "recovery_percent", "of_full_percent", "against", "difference_percent", "p_value", "pairs",
    "paper_mean_percent", "paper_sd_percent",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Made:
    """The evaluated rows of a cell, once for each seed, and the ddof of its standard deviations."""

    cell: Cell
    repeats: Sequence[Sequence[Row]]
    ddof: int = 1

    def values(self, name: str, protocol: str) -> dict[str, list[float]]:
        """metric -> what row `name` has for each seed, a mean over learners; of one seed, for each learner."""
        rows = [
            row.runs for rows in self.repeats for row in rows if (row.name, row.protocol) == (name, protocol)
        ]
        if len(rows) < 2:
            return dict(rows[0]) if rows else {}
        return {metric: [math.fsum(row[metric]) / len(row[metric]) for row in rows] for metric in rows[0]}

    @property
    def over(self) -> str:
        """What deviations are over."""
        if len(self.repeats) > 1:
            return f"{len(self.repeats)} {'distillations' if self.cell.row == 'summary' else 'seeds'}"
        learners = max(row.learners for row in self.repeats[0])
        return f"{learners} learner{'' if learners == 1 else 's'}"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a cell, in percent; sd over distillations, or over learners where there is but one."""

    cell: Cell
    protocol: str
    metric: str
    mean: float
    sd: float | None  # None: of one
    over: str  # "3 distillations", "3 learners"
    recovery: float | None  # in percent; None until the full data and the control are there
    of_full: float | None  # in percent of the same learner's on the full data; None until that is there
    against: str | None  # label of the cell that `test` compares with
    test: PairedTest | None  # its difference in percent
    paper: tuple[float, float | None] | None  # mean and sd, for the paper's protocol and metrics

    def line(self) -> dict[str, Any]:
        """The number as a line of the CSV file."""
        cell, test = self.cell, self.test
        values = (
            cell.table, cell.dataset, cell.method, cell.size or "", cell.learner, self.protocol, self.metric,
            round(self.mean, 3), _rounded(self.sd, 3), self.over, _rounded(self.recovery, 1), _rounded(self.of_full, 1),
            self.against,
            *((None,) * 3 if test is None else (round(test.difference, 3), _significant(test.p_value), test.pairs)),
            *(self.paper or (None, None)),
        )  # fmt: skip
        return dict(zip(FIELDS, values, strict=True))


def figures_of(made: Sequence[Made]) -> list[Figure]:
    """The figures of all cells that are made, each beside those that it is to be compared with."""
    return [figure for one in made for protocol in PROTOCOLS for figure in _of_cell(one, made, protocol)]


def _of_cell(one: Made, made: Sequence[Made], protocol: str) -> list[Figure]:
    cell = one.cell
    values = one.values(cell.row, protocol)
    means = _means(values)
    full = next((m for m in made if (m.cell.row, m.cell.learner) == (FULL, cell.learner)), None)
    whole = {} if full is None else _means(full.values(FULL, protocol))
    control = _means(one.values(CONTROL, protocol))
    recovered = recovery(means, control, whole) if control and whole and cell.row == "summary" else {}
    rival = _rival(cell, made)
    rivals = {} if rival is None else rival.values(rival.cell.row, protocol)
    figures = []
    for metric, summed in mean_and_sd(_transposed(values), ddof=one.ddof).items():
        share = recovered.get(metric)
        of_full = 100 * means[metric] / whole[metric] if one is not full and whole.get(metric) else None
        figures.append(
            Figure(
                cell=cell,
                protocol=protocol,
                metric=metric,
                mean=100 * summed["mean"],
                sd=100 * summed["sd"] if len(values[metric]) > 1 else None,
                over=one.over,
                recovery=None if share is None else 100 * share,
                of_full=of_full,
                against=None if rival is None else rival.cell.label,
                test=_test(values[metric], rivals.get(metric, [])),
                paper=cell.published.get(metric) if protocol == "uni100" else None,
            )
        )
    return figures


def _rival(cell: Cell, made: Sequence[Made]) -> Made | None:
    """The cell that this one is tested against, of the same learner and, where both have one, the same size."""
    for other in made:
        alike = (other.cell.method, other.cell.learner) == (cell.against, cell.learner)
        if alike and (None in (other.cell.size, cell.size) or other.cell.size == cell.size):
            return other
    return None


def _test(first: Sequence[float], second: Sequence[float]) -> PairedTest | None:
    """Of figures in percent, pair by pair; None where they do not come in pairs."""
    if len(first) != len(second):
        return None
    return paired_t_test([100 * value for value in first], [100 * value for value in second])


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {metric: math.fsum(found) / len(found) for metric, found in values.items()}


def _transposed(values: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """One mapping of metrics for each unit."""
    return [dict(zip(values, unit, strict=True)) for unit in zip(*values.values(), strict=True)]


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _significant(value: float) -> float:
    return float(f"{value:.3g}")
