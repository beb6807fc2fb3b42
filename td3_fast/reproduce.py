"""A table of the paper, made anew cell by cell in one folder, beside the paper's figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from td3_fast.data import Split
from td3_fast.evaluate import Row
from td3_fast.files import write_text
from td3_fast.metrics import mean_and_sd, recovery
from td3_fast.paper import METHODS, Cell
from td3_fast.recipes import Recipe
from td3_fast.reproduce_page import page
from td3_fast.run import PRETRAINED, Run, RunError, Watcher
from td3_fast.training import PROTOCOLS

CONTROL = "zero-step"
FIELDS = (
    "table", "dataset", "method", "size", "protocol", "metric", "mean_percent", "sd_percent", "over",
    "recovery_percent", "paper_mean_percent", "paper_sd_percent",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a cell, in percent; sd over distillations, or over learners where there is but one."""

    cell: Cell
    protocol: str
    metric: str
    mean: float
    sd: float
    over: str  # "3 distillations", "3 learners"
    recovery: float | None  # in percent; None until the full data and the control are there
    paper: tuple[float, float | None] | None  # mean and sd, for the paper's protocol and metrics

    def line(self) -> dict[str, Any]:
        """The number as a line of the CSV file."""
        paper = self.paper or (None, None)
        values = (
            self.cell.table, self.cell.dataset, self.cell.method, self.cell.size or "", self.protocol, self.metric,
            round(self.mean, 3), round(self.sd, 3), self.over,
            None if self.recovery is None else round(self.recovery, 1), *paper,
        )  # fmt: skip
        return dict(zip(FIELDS, values, strict=True))


@dataclass(kw_only=True)
class Reproduction:
    """The cells of one table on one data set.

    Every cell has a folder in `folder` and goes on where it was; a pretrained learner is shared by the cells that have
    histories of one length. After each cell `table.csv` and `table.html` are written anew.
    """

    folder: Path
    split: Split
    source: str  # what the user called the data
    cells: Sequence[Cell]
    recipe: Recipe  # of sizes other than the cells'
    distillations: int = 1  # from the seeds `seed`, `seed + 1` and so on
    seeds: int = 3  # learners of each row
    seed: int = 0
    watcher: Watcher = field(default_factory=Watcher)

    def run(self, on_cell: Callable[[Cell], None] = lambda cell: None) -> list[Figure]:
        """The figures of all cells; `on_cell` hears of each before it is made.

        Raises:
            RunError: a file to be written is there and is of something else.
            Stopped: the watcher asked for it; what is done is kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_place()
        rows: dict[int, list[list[Row]]] = {}
        figures: list[Figure] = []
        for place, cell in enumerate(self.cells):
            on_cell(cell)
            rows[place] = self._rows(cell)
            figures = self._figures(rows)
            self._write(figures, finished=len(rows))
        return figures

    def _check_place(self) -> None:
        path = self.folder / "table.csv"
        if not path.exists():
            return
        first = next(csv.DictReader(path.read_text(encoding="utf-8").splitlines()), {})
        own = {"table": str(self.cells[0].table), "dataset": self.cells[0].dataset}
        if {name: first.get(name) for name in own} != own:
            raise RunError(f"{path} is of another table or other data: choose another folder")

    def _rows(self, cell: Cell) -> list[list[Row]]:
        """The evaluated rows of a cell, one list per distillation."""
        row, changes = METHODS[cell.method]
        recipe = self.recipe if cell.size is None else self.recipe.sized(cell.size)
        name = "-".join([cell.method.replace(" ", "-"), *([cell.size] if cell.size else [])])
        common: dict[str, Any] = {"split": self.split, "source": self.source, "watcher": self.watcher}
        if row != "summary":
            run = Run(folder=self.folder / "cells" / name, recipe=recipe, seed=self.seed, **common)
            return [run.baselines(rows=(row,), seeds=self.seeds)]
        recipe = replace(recipe, distill=replace(recipe.distill, **changes))
        made = []
        for seed in range(self.seed, self.seed + self.distillations):
            learner = self.folder / f"pretrained-{recipe.learner['max_len']}-{seed}"
            Run(folder=learner, recipe=recipe, seed=seed, **common).pretrained()
            run = Run(
                folder=self.folder / "cells" / f"{name}-{seed}",
                recipe=recipe,
                seed=seed,
                pretrained_from=learner / PRETRAINED,
                evaluation_seeds=self.seeds,
                **common,
            )
            made.append(run.distill(resume=True))
        return made

    def _figures(self, rows: dict[int, list[list[Row]]]) -> list[Figure]:
        full = next((rows[place] for place in rows if METHODS[self.cells[place].method][0] == "full"), None)
        figures = []
        for place, made in rows.items():
            cell = self.cells[place]
            name = METHODS[cell.method][0]
            for protocol in PROTOCOLS:
                means = _means(made, name, protocol)
                recovered: dict[str, float | None] = {}
                control = _means(made, CONTROL, protocol)
                if control and full is not None:
                    recovered = recovery(
                        *(
                            {metric: value["mean"] for metric, value in source.items()}
                            for source in (means, control, _means(full, "full", protocol))
                        )
                    )
                for metric, value in means.items():
                    share = recovered.get(metric)
                    figures.append(
                        Figure(
                            cell=cell,
                            protocol=protocol,
                            metric=metric,
                            mean=100 * value["mean"],
                            sd=100 * value["sd"],
                            over=f"{len(made)} distillations" if len(made) > 1 else f"{self.seeds} learners",
                            recovery=None if share is None else 100 * share,
                            paper=cell.published.get(metric) if protocol == "uni100" else None,
                        )
                    )
        return figures

    def _write(self, figures: Sequence[Figure], *, finished: int) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        lines = [figure.line() for figure in figures]
        writer.writerows(lines)
        write_text(self.folder / "table.csv", text.getvalue())
        first = self.cells[0]
        title = f"Table {first.table} of TD3 on {first.dataset}"
        about = (
            f"{finished} of {len(self.cells)} cells; recipe {self.recipe.name}, {self.distillations} distillation(s), "
            f"{self.seeds} learners each, seed {self.seed}; data {self.source}"
        )
        write_text(self.folder / "table.html", page(lines, title=title, about=about))


def _means(made: Sequence[Sequence[Row]], name: str, protocol: str) -> dict[str, dict[str, float]]:
    """Mean and sd over distillations of the row `name`; of one distillation, over its learners. {} without the row."""
    found = [row.metrics for rows in made for row in rows if (row.name, row.protocol) == (name, protocol)]
    if len(found) < 2:
        return dict(found[0]) if found else {}
    return mean_and_sd([{metric: value["mean"] for metric, value in row.items()} for row in found])
