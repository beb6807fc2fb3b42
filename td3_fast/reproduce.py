"""A table of figures made anew cell by cell in one folder, beside the paper's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from td3_fast.data import Split
from td3_fast.evaluate import Row
from td3_fast.evaluate_run import EvaluateRun
from td3_fast.figures import CONTROL, FIELDS, Figure, Made, figures_of
from td3_fast.paper import Cell
from td3_fast.recipes import Recipe
from td3_fast.reproduce_page import Section, document, section
from td3_fast.run import Run
from td3_fast.run_folder import PRETRAINED, SUMMARY, Watcher
from td3_fast.summary import load_summary
from td3_fast.table_files import check_place, write_table


@dataclass(kw_only=True)
class Reproduction:
    """The cells of one table on one data set.

    Every cell has a folder in `shared`, which is `folder` unless it is given, and goes on where it was; a pretrained
    learner is shared by the cells that have histories of one length, a distillation by those that differ in what is
    trained on it, or are of another table. After each cell `table.csv` and `table.html` are written anew.
    """

    folder: Path
    split: Split
    source: str  # what the user called the data
    cells: Sequence[Cell]
    recipe: Recipe  # of cells without a size
    recipe_of: Callable[[str], Recipe] | None = None  # of a size; None: `recipe`, sized
    filters: dict[str, Any] = field(default_factory=dict)  # what was left out of the data
    distillations: int = 1  # from the seeds `seed`, `seed + 1` and so on
    seeds: int = 3  # learners of each summary; of a row without one, in all
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # that computes
    notes: Sequence[str] = ()  # sentences below the tables of the page
    watcher: Watcher = field(default_factory=Watcher)
    shared: Path | None = None  # the folder of cells and pretrained learners; None: `folder`
    on_written: Callable[[Section], None] = lambda section: None  # hears of the table anew after each cell

    def run(self, on_cell: Callable[[Cell], None] = lambda cell: None) -> list[Figure]:
        """The figures of all cells; `on_cell` hears of each before it is made.

        Raises:
            RunError: a file to be written is there and is of something else.
            Stopped: the watcher asked for it; what is done is kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        check_place(self.folder, table=self.cells[0].table, dataset=self.cells[0].dataset)
        scored: dict[Path, list[Row]] = {}
        made: list[Made] = []
        figures: list[Figure] = []
        for cell in self.cells:
            on_cell(cell)
            made.append(self._make(cell, scored))
            figures = figures_of(made)
            self._write(figures, finished=len(made))
        return figures

    def _make(self, cell: Cell, scored: dict[Path, list[Row]]) -> Made:
        """A cell's rows for each seed; `scored` are those of folders that this run has looked into."""
        recipe = self.recipe if cell.size is None else (self.recipe_of or self.recipe.sized)(cell.size)
        recipe = replace(recipe, distill=replace(recipe.distill, **cell.changes))
        repeats = []
        for seed in range(self.seed, self.seed + self.distillations):
            if cell.row not in ("summary", CONTROL):
                repeats.append(self._baseline(cell, recipe, seed))
                continue
            folder = self._folder(cell, seed, learner=cell.learner != recipe.learner_name)
            if folder not in scored:
                scored[folder] = self._on_summary(cell, recipe, seed, folder)
            repeats.append(scored[folder])
        ddof = recipe.distill.semantics.ddof if cell.ddof is None else cell.ddof
        return Made(cell=cell, repeats=repeats, ddof=ddof)

    def _folder(self, cell: Cell, seed: int, *, learner: bool) -> Path:
        """Where a row of a cell is made; the control is scored beside the summary."""
        method = "TD3" if cell.row == CONTROL else cell.same_run_as or cell.method
        parts = [method.replace(" ", "-"), cell.size, cell.learner if learner else None, str(seed)]
        return (self.shared or self.folder) / "cells" / "-".join(filter(None, parts))

    def _common(self) -> dict[str, Any]:
        return {
            "split": self.split,
            "source": self.source,
            "filters": self.filters,
            "device": self.device,
            "watcher": self.watcher,
        }

    def _baseline(self, cell: Cell, recipe: Recipe, seed: int) -> list[Row]:
        """A row that asks for no summary; its learners are shared out over the seeds."""
        other = cell.learner != recipe.learner_name
        run = Run(
            folder=self._folder(cell, seed, learner=other),
            recipe=recipe.with_learner(cell.learner),
            seed=seed,
            **self._common(),
        )
        return run.baselines(rows=(cell.row,), seeds=-(-self.seeds // self.distillations))

    def _on_summary(self, cell: Cell, recipe: Recipe, seed: int, folder: Path) -> list[Row]:
        """The summary and the control, of the learner that it is distilled for or, in `folder`, of another."""
        learner = (self.shared or self.folder) / f"pretrained-{recipe.learner['max_len']}-{seed}"
        Run(folder=learner, recipe=recipe, seed=seed, **self._common()).pretrained()
        distilled = self._folder(cell, seed, learner=False)
        run = Run(
            folder=distilled,
            recipe=recipe,
            seed=seed,
            pretrained_from=learner / PRETRAINED,
            evaluation_seeds=self.seeds,
            **self._common(),
        )
        rows = run.distill(resume=True)
        evaluation = EvaluateRun(
            folder=folder,
            summary=load_summary(distilled / SUMMARY).to(self.device),
            split=self.split,
            source=self.source,
            seed=seed,
            rows=("summary", CONTROL),
            seeds=self.seeds,
            learner=None if folder == distilled else cell.learner,
            watcher=self.watcher,
        )
        # a finished run may have fewer learners than are asked for now, and results of other seeds or rows; its runs
        # are kept beside them
        if folder == distilled and all(row.learners == self.seeds for row in rows):
            return evaluation.rows_now()
        return evaluation.evaluate()

    def _write(self, figures: Sequence[Figure], *, finished: int) -> None:
        first = self.cells[0]
        name = f"Table {first.table} of TD3"
        if not first.table.isdecimal():
            name = f"TD3's released program: {first.table}"
        about = (
            f"{finished} of {len(self.cells)} cells; recipe {self.recipe.name}, {self.distillations} distillation(s), "
            f"{self.seeds} learners each, seed {self.seed}; data {self.source}"
        )
        lines = [figure.line() for figure in figures]
        made = section(lines, title=f"{name} on {first.dataset}", about=about, notes=self.notes)
        write_table(self.folder, FIELDS, lines, document(made))
        self.on_written(made)
