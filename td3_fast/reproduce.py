"""A table of figures made anew cell by cell in one folder, beside the paper's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from td3_fast.data import Split
from td3_fast.evaluate import Row
from td3_fast.evaluate_run import EvaluateRun
from td3_fast.figures import CONTROL, FIELDS, Figure, Made, figures_of
from td3_fast.files import make_folder
from td3_fast.paper import Cell
from td3_fast.recipes import Recipe
from td3_fast.reproduce_page import Section, document, section
from td3_fast.run import Run
from td3_fast.run_folder import PRETRAINED, SUMMARY, Watcher, clear
from td3_fast.side_by_side import Ahead, Step
from td3_fast.summary import load_summary
from td3_fast.table_files import check_place, clear_table, write_table
from td3_fast.tune import TuneConfig


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
    tune: TuneConfig | None = None  # how learners train on a summary is chosen; None: as it was distilled for
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # that computes
    notes: Sequence[str] = ()  # sentences below the tables of the page
    watcher: Watcher = field(default_factory=Watcher)
    shared: Path | None = None  # the folder of cells and pretrained learners; None: `folder`
    on_written: Callable[[Section], None] = lambda section: None  # hears of the table anew after each cell

    def run(
        self, on_cell: Callable[[Cell], None] = lambda cell: None, *, ahead: Ahead | None = None
    ) -> list[Figure]:
        """The figures of all cells; `on_cell` hears of each before it is made.

        ahead: does `steps` in other processes, whose results are waited for.

        Raises:
            RunError: a file to be written is there and is of something else.
            Stopped: the watcher asked for it; what is done is kept.
        """
        self.check_place()
        scored: dict[Path, list[Row]] = {}
        made: list[Made] = []
        figures: list[Figure] = []
        for cell in self.cells:
            on_cell(cell)
            repeats = []
            for seed in self._seeds():
                *_, last = steps = self._steps(cell, seed)
                if last.folder not in scored:
                    for step in steps:
                        rows = step.work(self.watcher) if ahead is None else ahead.result(step)
                    scored[last.folder] = rows
                repeats.append(scored[last.folder])
            ddof = self._recipe(cell).distill.semantics.ddof if cell.ddof is None else cell.ddof
            made.append(Made(cell=cell, repeats=repeats, ddof=ddof))
            figures = figures_of(made)
            self._write(figures, finished=len(made))
        return figures

    def check_place(self) -> None:
        """Raises:
        RunError: the folder holds another table.
        """
        make_folder(self.folder)
        check_place(self.folder, table=self.cells[0].table, dataset=self.cells[0].dataset)

    def clear(self) -> None:
        """Remove what these cells are made of, so that `run` makes all of it anew."""
        clear_table(self.folder)
        for folder in {step.folder for step in self.steps()}:
            clear(folder)

    def steps(self) -> list[Step]:
        """All that has to be done before the figures can be had, in the order of the cells."""
        return [step for cell in self.cells for seed in self._seeds() for step in self._steps(cell, seed)]

    def _seeds(self) -> range:
        return range(self.seed, self.seed + self.distillations)

    def _recipe(self, cell: Cell) -> Recipe:
        recipe = self.recipe if cell.size is None else (self.recipe_of or self.recipe.sized)(cell.size)
        return replace(recipe, distill=replace(recipe.distill, **cell.changes))

    def _steps(self, cell: Cell, seed: int) -> list[Step]:
        """What leads to a cell's rows from one seed, which the last step gives."""
        recipe = self._recipe(cell)
        of_other_learner = cell.learner != recipe.learner_name
        common = {
            "split": self.split,
            "source": self.source,
            "filters": self.filters,
            "device": self.device,
            "seed": seed,
        }
        folder = self._folder(cell, seed, learner=of_other_learner)
        label = f"{cell.label}, seed {seed}"
        if cell.row not in ("summary", CONTROL):
            # its learners are shared out over the seeds
            common |= {"folder": folder, "recipe": recipe.with_learner(cell.learner)}
            seeds = -(-self.seeds // self.distillations)
            work = partial(_make_baselines, common, cell.row, seeds)
            return [Step(label=label, folder=folder, work=work)]
        length = recipe.learner["max_len"]
        learner = (self.shared or self.folder) / f"pretrained-{length}-{seed}"
        distilled = self._folder(cell, seed, learner=False)
        common["recipe"] = recipe
        run = common | {"pretrained_from": learner / PRETRAINED, "folder": distilled}
        other = None
        if cell.same_epochs_as is not None:
            other = self._folder(replace(cell, same_run_as=cell.same_epochs_as), seed, learner=False)
        steps = [
            Step(
                label=f"a learner of histories of {length}, seed {seed}",
                folder=learner,
                work=partial(_pretrain, common | {"folder": learner}),
            ),
            Step(
                label=label,
                folder=distilled,
                work=partial(_distill, run, self.seeds, other, self.tune),
                after=other or learner,
            ),
        ]
        if folder != distilled:
            work = partial(_evaluate, run, folder, cell.learner, self.seeds, self.tune)
            steps.append(Step(label=label, folder=folder, work=work, after=distilled))
        return steps

    def _folder(self, cell: Cell, seed: int, *, learner: bool) -> Path:
        """Where a row of a cell is made; the control is scored beside the summary."""
        method = "TD3" if cell.row == CONTROL else cell.same_run_as or cell.method
        parts = [method.replace(" ", "-"), cell.size, cell.learner if learner else None, str(seed)]
        return (self.shared or self.folder) / "cells" / "-".join(filter(None, parts))

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


# The work of steps, in whichever process: `options` are those of `Run`, but for its watcher.
Options = dict[str, Any]


def _run(options: Options, watcher: Watcher, **more: Any) -> Run:
    _set_device(options)
    return Run(**options, **more, watcher=watcher)


def _set_device(options: Options) -> None:
    """In a process that has not been told of it."""
    device: torch.device = options["device"]
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _make_baselines(options: Options, row: str, seeds: int, watcher: Watcher) -> list[Row]:
    return _run(options, watcher).baselines(rows=(row,), seeds=seeds)


def _pretrain(options: Options, watcher: Watcher) -> None:
    """Into its folder, where who distils finds the learner."""
    _run(options, watcher).pretrained()


def _distill(
    options: Options, seeds: int, same_epochs_as: Path | None, tune: TuneConfig | None, watcher: Watcher
) -> list[Row]:
    run = _run(options, watcher, evaluation_seeds=seeds, keep_epochs=True, same_epochs_as=same_epochs_as)
    rows = run.distill(resume=True)
    # a finished run may have fewer learners than are asked for now, and results of other seeds or rows; its runs are
    # kept beside them
    evaluation = _evaluation(options, options["folder"], None, seeds, tune, watcher)
    return evaluation.rows_now() if all(row.learners == seeds for row in rows) else evaluation.evaluate()


def _evaluate(
    options: Options, folder: Path, learner: str, seeds: int, tune: TuneConfig | None, watcher: Watcher
) -> list[Row]:
    return _evaluation(options, folder, learner, seeds, tune, watcher).evaluate()


def _evaluation(
    options: Options,
    folder: Path,
    learner: str | None,
    seeds: int,
    tune: TuneConfig | None,
    watcher: Watcher,
) -> EvaluateRun:
    """The summary and the control, of the learner that it is distilled for or of another."""
    _set_device(options)
    return EvaluateRun(
        folder=folder,
        summary=load_summary(options["folder"] / SUMMARY).to(options["device"]),
        split=options["split"],
        source=options["source"],
        seed=options["seed"],
        rows=("summary", CONTROL),
        seeds=seeds,
        learner=learner,
        tune=tune,
        watcher=watcher,
    )
