"""Figures of cells, from rows that are written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from td3_fast.evaluate import Row
from td3_fast.figures import Figure, Made, figures_of
from td3_fast.paper import Cell


def row(name: str, *values: float) -> list[Row]:
    """A row of one metric under both protocols."""
    metrics = {"HR@10": {"mean": sum(values) / len(values), "sd": 0.0}}
    runs = {"HR@10": list(values)}
    return [
        Row(name=name, protocol=protocol, metrics=metrics, recovery={}, runs=runs)
        for protocol in ("full", "uni100")
    ]


def cell(method: str, size: str | None = "6x6", row: str = "summary", **changes: Any) -> Cell:
    return Cell(table="3", dataset="toy", method=method, size=size, row=row, **changes)


def found(made: list[Made]) -> dict[str, Figure]:
    """Label -> the one figure of `uni100`."""
    return {figure.cell.label: figure for figure in figures_of(made) if figure.protocol == "uni100"}


FULL = cell("full", None, "full", published={"HR@10": (70.0, None)})
SUMMARY = cell("TD3", against="full")


def test_a_summary_stands_beside_the_control_and_the_full_data() -> None:
    summary = [*row("summary", 0.5, 0.6, 0.7), *row("zero-step", 0.2, 0.2, 0.2)]
    figures = found(
        [Made(cell=SUMMARY, repeats=[summary]), Made(cell=FULL, repeats=[row("full", 0.7, 0.8, 0.9)])]
    )
    ours = figures["TD3 6x6"]
    assert (ours.mean, ours.sd) == (pytest.approx(60), pytest.approx(10))
    assert ours.recovery == pytest.approx(100 * 0.4 / 0.6)
    assert ours.of_full == pytest.approx(75)
    assert ours.over == "3 learners"
    assert ours.against == "full"
    assert ours.test is not None
    assert ours.test.difference == pytest.approx(-20)
    assert ours.test.pairs == 3
    whole = figures["full"]
    assert (whole.recovery, whole.of_full, whole.against, whole.test) == (None, None, None, None)
    assert whole.paper == (70.0, None)


def test_there_is_no_recovery_where_the_full_data_are_not_above_the_control() -> None:
    summary = [*row("summary", 0.5, 0.6), *row("zero-step", 0.8, 0.8)]
    made = [Made(cell=SUMMARY, repeats=[summary]), Made(cell=FULL, repeats=[row("full", 0.7, 0.8)])]
    assert found(made)["TD3 6x6"].recovery is None


def test_distillations_are_the_units_where_there_are_several() -> None:
    repeats = [row("summary", 0.5, 0.7), row("summary", 0.6, 0.8)]
    baseline = [row("full", 0.5), row("full", 0.7)]
    figures = found([Made(cell=SUMMARY, repeats=repeats), Made(cell=FULL, repeats=baseline)])
    ours = figures["TD3 6x6"]
    assert (ours.mean, ours.sd) == (pytest.approx(65), pytest.approx(10 / 2**0.5))
    assert (ours.over, figures["full"].over) == ("2 distillations", "2 seeds")
    assert ours.test is not None
    assert ours.test.difference == pytest.approx(5)
    assert ours.test.pairs == 2


def test_deviations_have_the_ddof_of_the_cell() -> None:
    made = Made(cell=SUMMARY, repeats=[row("summary", 0.5, 0.7)], ddof=0)
    assert found([made])["TD3 6x6"].sd == pytest.approx(10)


def test_unequal_numbers_are_not_paired() -> None:
    made = [
        Made(cell=SUMMARY, repeats=[row("summary", 0.5, 0.7)]),
        Made(cell=FULL, repeats=[row("full", 0.5)]),
    ]
    ours = found(made)["TD3 6x6"]
    assert ours.test is None
    assert ours.line()["p_value"] is None


def test_a_rival_is_of_the_same_size_and_learner() -> None:
    small, large = cell("TD3", "6x6"), cell("TD3", "9x9")
    other = cell("TD3", "9x9", learner="NARM")
    ours = cell("random", "9x9", "random", against="TD3")
    made = [Made(cell=one, repeats=[row(one.row, 0.1, 0.2)]) for one in (small, other, large, ours)]
    assert found(made)["random 9x9"].against == "TD3 9x9"
    assert found(made[:2] + made[3:])["random 9x9"].against is None
