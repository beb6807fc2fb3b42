"""Step 3 of the method: fresh learners trained on a summary and scored, beside the baselines it has to beat."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from td3_fast.data import Examples, Split, every_prefix
from td3_fast.export import HardConfig, hard_interactions
from td3_fast.learners import Learner, all_hyperparameters, build_learner, learner_named
from td3_fast.metrics import mean_and_sd, recovery
from td3_fast.ops import derive_seed, full_precision
from td3_fast.progress import Progress, silent
from td3_fast.summary import Summary, SummaryMetadata
from td3_fast.training import PROTOCOLS, FitConfig, Protocol, Ranker, fit_examples, fresh_like
from td3_fast.unroll import fit_on_summary

ROWS: tuple[str, ...] = (
    "summary",
    "full",
    "random",
    "random+embeddings",
    "longest",
    "longest+embeddings",
    "popularity",
    "zero-step",
)
# of another architecture than the summary was distilled for; the paper's table 4
CROSS_ROWS: tuple[str, ...] = ("summary", "full", "full+embeddings", "zero-step")
# the summary as sequences of items, as it is exported for other libraries
HARD_ROWS: tuple[str, ...] = ("hard", "hard+embeddings")
KNOWN_ROWS = tuple(dict.fromkeys(ROWS + CROSS_ROWS + HARD_ROWS))
SET_BY_SUMMARY = ("num_items", "max_len", "hidden")  # of a learner's hyperparameters
Scores = dict[Protocol, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How the rows of an evaluation are made."""

    seeds: int = 3  # learners per row
    rows: tuple[str, ...] = ROWS
    fit: FitConfig = field(default_factory=FitConfig)  # of the learners trained on real interactions
    redraw_negatives: bool = False
    carry_embeddings: bool = (
        False  # each run on the summary starts from the item table that the last one left
    )
    ddof: int = 1
    hard: HardConfig = field(default_factory=HardConfig)  # of the rows `hard` and `hard+embeddings`

    def __post_init__(self) -> None:
        unknown = [row for row in self.rows if row not in KNOWN_ROWS]
        if unknown:
            raise ValueError(f"unknown row {unknown[0]!r}: expected some of {', '.join(KNOWN_ROWS)}")
        if len(set(self.rows)) < len(self.rows):
            raise ValueError(f"a row is named twice: {', '.join(self.rows)}")
        if not self.rows:
            raise ValueError(f"there is no row to make: name some of {', '.join(KNOWN_ROWS)}")
        if self.seeds < 1:
            raise ValueError(f"EvaluateConfig.seeds must be at least 1, got {self.seeds}")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training set under one protocol."""

    name: str
    protocol: Protocol
    metrics: dict[str, dict[str, float]]  # metric -> {"mean", "sd"}, fractions
    recovery: dict[str, float | None]  # metric -> (this - zero-step) / (full - zero-step)
    runs: dict[str, list[float]] = field(default_factory=dict)  # metric -> fraction of each learner, in order

    @property
    def learners(self) -> int:
        """How many have figures of their own in `runs`."""
        return max(map(len, self.runs.values()), default=0)


def evaluate(
    summary: Summary,
    split: Split,
    teacher: Learner | None = None,
    *,
    fit_options: Mapping[str, Any] | None = None,
    config: EvaluateConfig | None = None,
    seed: int = 0,
    known: Mapping[tuple[str, int], Scores] | None = None,
    on_run: Callable[[str, int, Scores], None] | None = None,
    progress: Progress = silent,
) -> list[Row]:
    """Test metrics of learners trained on `summary`, and of the baselines, each from `config.seeds` seeds.

    summary: what is evaluated; split: real data, its items numbered as the summary's; teacher: the pretrained
    learner, whose item and position embeddings are handed to every row but those trained from nothing, and whose
    architecture all rows have (`learner_for` makes one, of another architecture too); fit_options:
    how a learner is trained on the summary, as `fit_on_summary` takes it. Both come from the summary where they are
    not given. known: scores of runs (row, number) that need not be done again; on_run: sees the scores of every run
    that is done.

    Rows: `summary`; `full`, the whole training part; `random` and `longest`, users that hold as many interactions as
    the summary, all three from nothing or with the teacher's embeddings (`+embeddings`), trained with early stopping;
    `hard`, the summary's hard sequences (`config.hard`) as if they were interactions, in the same two ways;
    `popularity`; `zero-step`, the teacher's embeddings under a new encoder, not trained at all.
    """
    config = config or EvaluateConfig()
    teacher = teacher or learner_for(summary)
    if fit_options is None:
        fit_options = _metadata(summary).training.fit_options()
    if summary.metadata is not None:
        summary.metadata.check_items(split.interactions.item_ids.tolist())
    if summary.num_items != split.interactions.num_items:
        raise ValueError(
            f"the summary is over {summary.num_items} items, the data has {split.interactions.num_items}: "
            "evaluate on the data it was distilled from, with the same filters"
        )
    ranker = Ranker(split.test, seed=derive_seed(seed, "ranker"))
    known = dict(known or {})
    if config.carry_embeddings:  # a run needs the one before it
        known = {run: scores for run, scores in known.items() if run[0] != "summary"}
    runs: dict[str, list[Scores]] = {}
    evaluation = _Evaluation(summary, split, teacher, dict(fit_options), config, seed)
    total = len(config.rows) * config.seeds
    for name in config.rows:
        for run in range(1 if name == "popularity" else config.seeds):
            done = sum(map(len, runs.values()))
            progress("evaluate", done, total, {})
            if (name, run) in known:
                runs.setdefault(name, []).append(known[name, run])
                continue
            if config.redraw_negatives:
                ranker.redraw_negatives(derive_seed(run, name))
            scores = evaluation.scores(name, run, ranker, progress)
            runs.setdefault(name, []).append(scores)
            if on_run is not None:
                on_run(name, run, scores)
    progress("evaluate", total, total, {})
    return [_row(name, protocol, runs, ddof=config.ddof) for name in config.rows for protocol in PROTOCOLS]


@full_precision()
def learner_for(
    summary: Summary,
    *,
    name: str | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Learner:
    """A learner with the pretrained item and position embeddings that a summary carries, the encoder drawn from `seed`.

    name: its class; None: the one that the summary was distilled for. Another class is given the items, the length and
    the width of that one, the rest by its own defaults, and of the tables the embeddings of items alone: positions mean
    different things to different classes, and a bias of items (a further column) is there in some only.

    hyperparameters: what is to differ from that. A learner of less width (`hidden`) gets the tables in the principal
    axes of the item table, which keeps of the products between items as much as so few columns can.

    Raises:
        ValueError: more width is asked for than the item table has, or other items or another length.
    """
    learner = untrained_learner(summary, name=name, hyperparameters=hyperparameters, seed=seed)
    recipe = _metadata(summary).training
    width, own_width = recipe.learner_config["hidden"], learner.hyperparameters()["hidden"]
    axes = _principal_axes(summary.item_factors[:, :width], own_width)
    with torch.no_grad():
        learner.item_embeddings[:, :own_width].copy_(summary.item_factors[:, :width] @ axes)
        if type(learner).__name__ == recipe.learner:
            learner.item_embeddings[:, own_width:].copy_(summary.item_factors[:, width:])
            if learner.position_embeddings is not None and summary.position_embeddings is not None:
                learner.position_embeddings.copy_(
                    summary.position_embeddings @ axes.to(summary.position_embeddings.dtype)
                )
    return learner


def has_own_positions(summary: Summary, learner: str) -> bool:
    """Whether learners of a class draw their position embeddings, for those that a summary carries are of another."""
    return summary.metadata is not None and learner != summary.metadata.training.learner


def untrained_learner(
    summary: Summary,
    *,
    name: str | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Learner:
    """The same learner, of any width, with nothing of the tables that a summary carries: all is drawn from `seed`."""
    name, config = described_learner(summary, name=name, hyperparameters=hyperparameters)
    return build_learner(name, config, seed=seed).to(summary.item_factors.device)


def described_learner(
    summary: Summary, *, name: str | None = None, hyperparameters: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """The class of that learner and all of its hyperparameters."""
    recipe = _metadata(summary).training
    name = recipe.learner if name is None else learner_named(name)
    changes = dict(hyperparameters or {})
    for fixed in ("num_items", "max_len"):
        if fixed in changes:
            raise ValueError(f"{fixed} comes from the summary: leave it out of the hyperparameters")
    own = name == recipe.learner
    config = {k: v for k, v in recipe.learner_config.items() if own or k in SET_BY_SUMMARY} | changes
    return name, all_hyperparameters(name, config)


def _principal_axes(table: torch.Tensor, width: int) -> torch.Tensor:
    """(columns, width): the identity where no column is to go, else the axes along which `table` is longest."""
    columns = table.shape[1]
    if width > columns:
        raise ValueError(
            f"the summary's item table has {columns} columns, and a learner of width {width} would need more: "
            f"ask for hidden <= {columns}, or distil with a wider learner"
        )
    if width == columns:
        return torch.eye(columns, dtype=table.dtype, device=table.device)
    _, axes = torch.linalg.eigh((table.T @ table).double())  # ascending
    # an axis has no sign of its own: that of its largest entry makes it the same everywhere
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return (axes * largest.sign()).flip(1)[:, :width].to(table.dtype)


def _metadata(summary: Summary) -> SummaryMetadata:
    if summary.metadata is None:
        raise ValueError("the summary does not say how it is used: give `teacher` and `fit_options`")
    return summary.metadata


def _row(name: str, protocol: Protocol, runs: dict[str, list[Scores]], *, ddof: int) -> Row:
    means = {row: mean_and_sd([scores[protocol] for scores in runs[row]], ddof=ddof) for row in runs}
    recovered: dict[str, float | None] = {}
    if "zero-step" in means and "full" in means:
        plain = {row: {metric: v["mean"] for metric, v in means[row].items()} for row in means}
        recovered = recovery(plain[name], plain["zero-step"], plain["full"])
    each = {metric: [scores[protocol][metric] for scores in runs[name]] for metric in means[name]}
    return Row(name=name, protocol=protocol, metrics=means[name], recovery=recovered, runs=each)


class _Evaluation:
    def __init__(
        self,
        summary: Summary,
        split: Split,
        teacher: Learner,
        fit_options: dict[str, Any],
        config: EvaluateConfig,
        seed: int,
    ) -> None:
        self.summary = summary
        self.split = split
        self.teacher = teacher
        self.fit_options = fit_options
        self.config = config
        self.seed = seed
        self._draws_positions = has_own_positions(summary, type(teacher).__name__)
        self._validation: Ranker | None = None
        self._carried: torch.Tensor | None = None

    @property
    def validation(self) -> Ranker:
        if self._validation is None:
            self._validation = Ranker(
                self.split.validation,
                seed=derive_seed(self.seed, "validation"),
                protocols=(self.config.fit.selection,),
            )
        return self._validation

    def scores(self, name: str, run: int, ranker: Ranker, progress: Progress) -> Scores:
        seed = derive_seed(self.seed, "run", run)
        if name == "popularity":
            return popularity_scores(self.split, ranker)
        if name == "zero-step":
            return ranker.metrics(self._fresh(seed, share_items=True))
        if name == "summary":
            frozen = self.fit_options.get("item_embedding") == "frozen"
            learner = self._fresh(seed, share_items=frozen)
            if self.config.carry_embeddings and self._carried is not None:
                with torch.no_grad():
                    learner.item_embeddings.copy_(self._carried)
            fit_on_summary(learner, self.summary, seed=seed, progress=progress, **self.fit_options)
            if self.config.carry_embeddings:
                self._carried = learner.item_embeddings.detach().clone()
            return ranker.metrics(learner)
        training = self.split.train
        base, _, embeddings = name.partition("+")
        if base == "hard":
            training = every_prefix(hard_interactions(self.summary, self.config.hard))
        elif base != "full":
            training = chosen_users(
                self.split.train, base, self.summary.num_users * self.summary.num_positions, seed=seed
            )
        if embeddings:
            learner = self._fresh(seed)
        else:
            learner = build_learner(type(self.teacher).__name__, self.teacher.hyperparameters(), seed=seed)
            learner.to(self.teacher.item_embeddings.device)
        fit_examples(learner, training, self.validation, self.config.fit, seed=seed, progress=progress)
        return ranker.metrics(learner)

    def _fresh(self, seed: int, *, share_items: bool = False) -> Learner:
        return fresh_like(
            self.teacher, seed=seed, share_items=share_items, draw_positions=self._draws_positions
        )


def chosen_users(train: Examples, how: str, num_interactions: int, *, seed: int) -> Examples:
    """The training examples of whole users, `how` = "random" or "longest" first, until they hold as many
    interactions as asked; the last user's sequence is cut where it would exceed them."""
    users, first = np.unique(train.users, return_index=True)
    lengths = np.diff(np.append(first, len(train))) + 1  # a user's first interaction is no target
    if how == "random":
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(users))
    else:
        order = np.argsort(-lengths, kind="stable")
    left = num_interactions - np.concatenate([[0], np.cumsum(lengths[order])[:-1]])
    kept = np.minimum(lengths[order], left)
    parts = [np.arange(first[u], first[u] + k - 1) for u, k in zip(order, kept, strict=True) if k >= 2]
    return train.subset(np.concatenate(parts) if parts else np.empty(0, dtype=np.int64))


def popularity_scores(split: Split, ranker: Ranker) -> Scores:
    """Every user is shown the items in the order of their training counts, users too short for an example included."""
    log = split.interactions
    left_out = np.concatenate([split.validation.targets, split.test.targets])
    counts = np.bincount(log.items, minlength=log.num_items) - np.bincount(left_out, minlength=log.num_items)
    return ranker.score_items(torch.from_numpy(counts).float())
