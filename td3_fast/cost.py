"""The paper's table of costs made anew: time and memory of each step of the method, measured while it is done."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch

from td3_fast.data import Split
from td3_fast.evaluate import learner_for
from td3_fast.files import make_folder
from td3_fast.learners import build_learner
from td3_fast.metrics import mean_and_sd
from td3_fast.ops import derive_seed
from td3_fast.own_process import in_own_process
from td3_fast.recipes import Recipe
from td3_fast.report import JsonLines, read_json_lines, read_results
from td3_fast.reproduce_page import Section, document, html_table
from td3_fast.run import Run
from td3_fast.run_folder import (
    LOG,
    PRETRAINED,
    RESULTS,
    SUMMARY,
    Watcher,
    clear,
    environment,
    peak_memory_mib,
)
from td3_fast.summary import load_summary
from td3_fast.table_files import check_place, clear_table, write_table
from td3_fast.terminal import duration
from td3_fast.training import Ranker, fit_examples, fresh_like

TABLE = "5"
PRETRAINING = "pretraining"
DISTILLATION = "distillation"
ON_FULL = "training on original data"
ON_SUMMARY = "training on synthetic data"
OPERATIONS = (PRETRAINING, DISTILLATION, ON_FULL, ON_SUMMARY)
MEASURED = "costs.jsonl"  # one line for each step that is done
FIELDS = (
    "table", "dataset", "operation", "size", "seconds_mean", "seconds_sd", "peak_memory_mib", "over", "threads",
    "device", "paper_seconds", "paper_memory_mb",
)  # fmt: skip
Step = tuple[str, int, int]  # operation, seed, number of the learner


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one step took."""

    seconds: float  # from before an interruption included
    # on a GPU what PyTorch had there at once, else resident, of the whole process; None where nobody counts it anew
    peak_memory_mib: float | None
    threads: int


@dataclass(frozen=True, kw_only=True)
class _Work:
    """One step, done and measured in the process that calls it."""

    operation: str
    seed: int
    number: int
    folder: Path  # of the distillation from this seed
    split: Split
    source: str
    recipe: Recipe
    filters: dict[str, Any]
    device: torch.device

    def __call__(self, watcher: Watcher) -> Measured:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        run = Run(
            folder=self.folder,
            split=self.split,
            source=self.source,
            recipe=self.recipe,
            filters=self.filters,
            seed=self.seed,
            device=self.device,
            evaluation_seeds=1,
            watcher=watcher,
        )
        # of what is there already and not yet measured the memory was another process's
        known = True
        if self.operation == PRETRAINING:
            known = not (self.folder / PRETRAINED).exists()
            run.pretrained()
            past = [entry for entry in read_json_lines(self.folder / LOG) if entry["event"] == "pretrain"]
            seconds = past[-1]["seconds"]
        elif self.operation == DISTILLATION:
            known = not (self.folder / RESULTS).exists()
            run.distill(resume=True)
            seconds = read_results(self.folder / RESULTS)["distillation"]["seconds"]["distill"]
        elif self.operation == ON_SUMMARY:
            seconds = self._on_summary(watcher)
        else:
            seconds = self._on_full(watcher)
        return Measured(
            seconds=round(seconds, 3),
            peak_memory_mib=self._peak_memory() if known else None,
            threads=torch.get_num_threads(),
        )

    def _peak_memory(self) -> float | None:
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1)
        return peak_memory_mib()

    def _on_summary(self, watcher: Watcher) -> float:
        """Seconds of training a learner on the summary, as step 3 of the method does."""
        summary = load_summary(self.folder / SUMMARY).to(self.device)
        seed = derive_seed(self.seed, "run", self.number)
        frozen = self.recipe.distill.item_embedding == "frozen"
        learner = fresh_like(learner_for(summary), seed=seed, share_items=frozen)
        begun = time.perf_counter()
        summary.fit(learner, seed=seed, progress=watcher.interruptible)
        return time.perf_counter() - begun

    def _on_full(self, watcher: Watcher) -> float:
        """Seconds of training a learner from nothing on all of the training part, with early stopping."""
        seed = derive_seed(self.seed, "run", self.number)
        config = {**self.recipe.learner, "num_items": self.split.interactions.num_items}
        learner = build_learner(self.recipe.learner_name, config, seed=seed).to(self.device)
        fit = self.recipe.pretrain.fit
        begun = time.perf_counter()
        ranker = Ranker(
            self.split.validation, seed=derive_seed(self.seed, "validation"), protocols=(fit.selection,)
        )
        fit_examples(learner, self.split.train, ranker, fit, seed=seed, progress=watcher.interruptible)
        return time.perf_counter() - begun


@dataclass(frozen=True, kw_only=True)
class Cost:
    """An operation's time, mean ± sd over the times that it was done, and the most memory of these."""

    operation: str
    seconds: float
    sd: float
    peak_memory_mib: float | None
    times: int
    threads: tuple[int, ...]
    paper: tuple[float, float] | None  # seconds and MB on one A100


@dataclass(kw_only=True)
class CostTable:
    """Pretraining and distilling from each of `distillations` seeds, and training learners on the results.

    Each step is done in a process of its own, measured there, and kept: a table that was stopped goes on, and a
    distillation from its checkpoint. Time is wall-clock time; choosing on the validation part is included; starting
    the process, reading the data and scoring on the test part are not. Memory is the largest resident size of the
    process, with interpreter, libraries and data, or on a GPU what PyTorch had there at once; of an interrupted step,
    since it was taken up again.
    """

    folder: Path
    split: Split
    source: str  # what the user called the data
    dataset: str
    recipe: Recipe
    published: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # operation -> seconds and MB
    filters: dict[str, Any] = field(default_factory=dict)  # what was left out of the data
    distillations: int = 1  # from the seeds `seed`, `seed + 1` and so on
    seeds: int = 3  # learners on each summary; on the full data, in all
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # that computes
    watcher: Watcher = field(default_factory=Watcher)
    on_written: Callable[[Section], None] = lambda section: None  # hears of the table anew after each step

    def run(self, on_step: Callable[[Step], None] = lambda step: None) -> list[Cost]:
        """The costs of all operations; `on_step` hears of each step before it is done.

        Raises:
            RunError: a file to be written is there and is of something else.
            Stopped: the watcher asked for it; what is done is kept.
        """
        self.check_place()
        key = self._key()
        costs: list[Cost] = []
        steps = list(self._steps())
        with JsonLines(self.folder / MEASURED) as lines:
            measured: dict[Step, Measured] = {}
            for entry in lines.entries:
                step = (entry["operation"], entry["seed"], entry["run"])
                if entry["settings"] == key and step in steps:
                    measured[step] = Measured(**entry["measured"])
            for step in steps:
                if step not in measured:
                    on_step(step)
                    measured[step] = in_own_process(self._work(step), self.watcher)
                    operation, seed, run = step
                    entry = {"settings": key, "operation": operation, "seed": seed, "run": run}
                    lines.write({**entry, "measured": asdict(measured[step])})
                costs = self._costs(measured)
                self._write(costs, finished=len(measured), of=len(steps))
        return costs

    def check_place(self) -> None:
        """Raises:
        RunError: the folder holds another table, or one of other data.
        """
        make_folder(self.folder)
        check_place(self.folder, table=TABLE, dataset=self.dataset)

    def clear(self) -> None:
        """Remove what was made of these steps, and all that was measured, so that `run` makes it anew."""
        clear_table(self.folder)
        (self.folder / MEASURED).unlink(missing_ok=True)
        for step in self._steps():
            clear(self._work(step).folder)

    @property
    def gpu(self) -> str | None:
        """The name of the GPU that computes; None: the CPU does."""
        name: str | None = environment(self.device).get("device")
        return name

    def _steps(self) -> Iterator[Step]:
        for seed in range(self.seed, self.seed + self.distillations):
            yield PRETRAINING, seed, 0
            yield DISTILLATION, seed, 0
            yield from ((ON_SUMMARY, seed, run) for run in range(self.seeds))
            yield from ((ON_FULL, seed, run) for run in range(-(-self.seeds // self.distillations)))

    def _work(self, step: Step) -> _Work:
        operation, seed, number = step
        config = self.recipe.distill
        return _Work(
            operation=operation,
            seed=seed,
            number=number,
            folder=self.folder / "cells" / f"{config.users}x{config.positions}-{seed}",
            split=self.split,
            source=self.source,
            recipe=self.recipe,
            filters=self.filters,
            device=self.device,
        )

    def _key(self) -> str:
        """Of all that a step depends on besides its seed."""
        recipe = asdict(self.recipe) | {
            "pretrain": self.recipe.pretrain.settings(),
            "distill": self.recipe.distill.settings(),
        }
        settings = {"data": self.split.interactions.fingerprint, "recipe": recipe}
        if self.gpu is not None:
            settings["device"] = self.gpu
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def _costs(self, measured: Mapping[Step, Measured]) -> list[Cost]:
        costs = []
        for operation in OPERATIONS:
            found = [one for (name, _, _), one in measured.items() if name == operation]
            if not found:
                continue
            peaks = [one.peak_memory_mib for one in found if one.peak_memory_mib is not None]
            time_ = mean_and_sd([{"seconds": one.seconds} for one in found])["seconds"]
            costs.append(
                Cost(
                    operation=operation,
                    seconds=time_["mean"],
                    sd=time_["sd"],
                    peak_memory_mib=max(peaks, default=None),
                    times=len(found),
                    threads=tuple(sorted({one.threads for one in found})),
                    paper=self.published.get(operation),
                )
            )
        return costs

    def _write(self, costs: Sequence[Cost], *, finished: int, of: int) -> None:
        config = self.recipe.distill
        about = (
            f"{finished} of {of} steps; recipe {self.recipe.name}, summary of {config.users}x{config.positions}, seed "
            f"{self.seed}; data {self.source}; torch {torch.__version__}, on {self.gpu or 'the CPU'}"
        )
        lines = [self._line(cost) for cost in costs]
        title = f"Table {TABLE} of TD3 on {self.dataset}"
        made = Section(title, about, _parts(costs, on_gpu=self.gpu is not None))
        write_table(self.folder, FIELDS, lines, document(made))
        self.on_written(made)

    def _line(self, cost: Cost) -> dict[str, Any]:
        config = self.recipe.distill
        values = (
            TABLE, self.dataset, cost.operation, f"{config.users}x{config.positions}", round(cost.seconds, 3),
            round(cost.sd, 3), cost.peak_memory_mib, cost.times, " ".join(map(str, cost.threads)),
            self.gpu or "CPU", *(cost.paper or (None, None)),
        )  # fmt: skip
        return dict(zip(FIELDS, values, strict=True))


def speed_up(costs: Sequence[Cost]) -> float | None:
    """How many times faster a learner is trained on the summary than on the full data; None until both are there."""
    seconds = {cost.operation: cost.seconds for cost in costs}
    if ON_FULL not in seconds or not seconds.get(ON_SUMMARY):
        return None
    return seconds[ON_FULL] / seconds[ON_SUMMARY]


def _parts(costs: Sequence[Cost], *, on_gpu: bool) -> list[str]:
    compared = any(cost.paper for cost in costs)
    head = ["", "time", "done", "threads", "peak memory, MiB"]
    rows = []
    for cost in costs:
        peak = "not known" if cost.peak_memory_mib is None else f"{cost.peak_memory_mib:.0f}"
        threads = ", ".join(map(str, cost.threads))
        times = "once" if cost.times == 1 else f"{cost.times} times"
        row = [escape(cost.operation), in_words(cost), times, threads, peak]
        if compared:
            time_, memory = (
                ("", "") if cost.paper is None else (duration(cost.paper[0]), f"{cost.paper[1]:.0f}")
            )
            row += [f'<span class="paper">{text}</span>' for text in (time_, memory)]
        rows.append(row)
    if compared:
        head += ["paper: time on an A100", "paper: memory, MB"]
    parts = [html_table(head, rows)]
    faster = speed_up(costs)
    if faster is not None:
        parts.append(f"<p>A learner is trained {faster:.1f} times faster on the summary.</p>")
    memory = "the largest resident size of a process that does this step alone, with interpreter, libraries and data"
    if on_gpu:
        memory = "the most that PyTorch had on the GPU at once, in a process that does this step alone"
    parts.append(
        "<p>Wall-clock time, mean ± standard deviation where it was done more than once; an interruption is not "
        "counted. Choosing on the validation part is included, the score on the test part is not. "
        f"Peak memory: {memory}. Times hold for a machine that did nothing else.</p>"
    )
    if compared:
        parts.append(
            "<p>The paper's are of another program on another machine, its memory that of a GPU.</p>"
        )
    return parts


def in_words(cost: Cost) -> str:
    """The time, as "2 min 03 s ± 4 s", below a minute as "4.10 s ± 0.20"."""
    if cost.seconds >= 60:
        return duration(cost.seconds) + (f" ± {duration(cost.sd)}" if cost.times > 1 else "")
    return f"{cost.seconds:.2f} s" + (f" ± {cost.sd:.2f}" if cost.times > 1 else "")
