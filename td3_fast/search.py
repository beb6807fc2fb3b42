"""Model search on a summary instead of the data, and how well it agrees with a search on the data."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch

from td3_fast.checks import check_choices
from td3_fast.data import Split
from td3_fast.evaluate import Scores, learner_for, untrained_learner
from td3_fast.learners import LEARNERS, Learner, learner_named
from td3_fast.metrics import Metric, mean_and_sd
from td3_fast.ops import derive_seed
from td3_fast.progress import Progress, silent
from td3_fast.summary import Summary
from td3_fast.training import FitConfig, Protocol, Ranker, fit_examples

Source = Literal["summary", "full"]
Start = Literal["nothing", "pretrained"]
RankBy = Literal["metric", "loss"]
DIVERGED = 1e30  # the loss of a training that left the numbers, or of which it is not known: the last of all
DEPTHS = (1, 2)
DROPOUTS = (0.2, 0.5)
# the rate that a class's "dropout" is in a grid: of its inputs, and of whatever else has the same one
DROPOUT_FIELDS = ("hidden_dropout", "embedding_dropout")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A learner that a search may choose: a class, and the hyperparameters that differ from its defaults."""

    learner: str
    hyperparameters: dict[str, Any]

    @property
    def name(self) -> str:
        """As in "SASRec hidden=32 layers=2", numbers with as many digits as tell them from any others."""
        return " ".join([self.learner, *(f"{k}={v}" for k, v in self.hyperparameters.items())])


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How the candidates of a search are trained and compared."""

    seeds: int = 3  # learners per candidate, trained on the summary
    full_seeds: int = 0  # learners per candidate, trained on the full data
    protocol: Protocol = "uni100"  # that the candidates are ranked by, on validation data
    metric: Metric = "NDCG@10"
    rank_by: RankBy = "metric"  # that figure; "loss": the mean inner loss over training on the summary
    steps: int | None = None  # of training on the summary; None: as it was distilled for
    dropout: bool | None = True  # in that training: each candidate's own; None: as it was distilled for
    start: Start = "nothing"  # of that training: all is learned, or the summary's pretrained tables are there
    fit: FitConfig = field(default_factory=FitConfig)  # of the learners trained on the full data

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.full_seeds < 0:
            raise ValueError(f"a search needs at least 1 seed, got {self.seeds} and {self.full_seeds}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"SearchConfig.steps must be at least 1, got {self.steps}")
        check_choices(self)

    def fit_changes(self) -> dict[str, Any]:
        """What is different from training on the summary as it was distilled for."""
        trained = "trained" if self.start == "nothing" else None
        changes = {"steps": self.steps, "dropout": self.dropout, "item_embedding": trained}
        return {name: value for name, value in changes.items() if value is not None}


class Trial(NamedTuple):
    """A learner that was trained and ranked on validation data."""

    scores: Scores
    seconds: float  # of training and ranking
    loss: float | None = None  # mean inner loss over training on the summary; None: trained on the full data


TrialKey = tuple[str, Source, int]  # a candidate's name, what it was trained on, and the number of the run


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What is known of a candidate; metrics as fractions, {"mean", "sd"} over runs, by protocol."""

    candidate: Candidate
    summary: dict[Protocol, dict[str, dict[str, float]]]  # of the learners trained on the summary
    full: dict[Protocol, dict[str, dict[str, float]]] | None  # on the full data; None: not trained yet
    summary_seconds: float  # of all its runs
    full_seconds: float
    summary_loss: dict[str, float]  # mean inner loss over training on the summary, {"mean", "sd"} over runs

    def figure(self, protocol: Protocol, metric: str, rank_by: RankBy) -> float:
        """What it is ranked by after training on the summary, the higher the better."""
        return -self.summary_loss["mean"] if rank_by == "loss" else self.summary[protocol][metric]["mean"]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The search on the summary, judged by that on the full data, over the candidates trained on both."""

    candidates: int
    kendall_tau: float | None  # tau-b; None where all candidates are level
    chosen: str  # the best on the summary
    best: str  # on the full data
    regret: float  # what the full-data figure of the chosen one lacks to that of the best
    summary_seconds: float
    full_seconds: float


def grid(
    summary: Summary,
    *,
    learners: Sequence[str] = tuple(LEARNERS),
    widths: Sequence[int] | None = None,
    depths: Sequence[int] = DEPTHS,
    dropouts: Sequence[float] = DROPOUTS,
    start: Start = "nothing",
) -> list[Candidate]:
    """Every combination of architecture, width of the item table, layers and dropout of inputs.

    widths: that of the summary's item table and half of it by default. start: as of `SearchConfig`. Of pretrained
    tables one of less width is the summary's in its principal axes; more width is refused, as nothing would fill it.
    """
    if summary.metadata is None:
        raise ValueError("the summary does not say whose item table it has: set `summary.metadata`")
    own = int(summary.metadata.training.learner_config["hidden"])
    widths = (own, own // 2) if widths is None else widths
    candidates = []
    for name, width, layers, rate in itertools.product(learners, widths, depths, dropouts):
        name = learner_named(name)
        known = {entry.name for entry in fields(LEARNERS[name][1])}
        rated = next(entry for entry in DROPOUT_FIELDS if entry in known)
        candidate = Candidate(learner=name, hyperparameters={"hidden": width, "layers": layers, rated: rate})
        _learner(summary, candidate, start, seed=0)  # what cannot be is refused
        candidates.append(candidate)
    return candidates


def search(
    summary: Summary,
    split: Split,
    candidates: Sequence[Candidate] | None = None,
    *,
    config: SearchConfig | None = None,
    seed: int = 0,
    known: Mapping[TrialKey, Trial] | None = None,
    on_trial: Callable[[TrialKey, Trial], None] | None = None,
    progress: Progress = silent,
) -> list[Standing]:
    """Train each candidate on `summary`, rank it on the validation part of `split`, and order them, best first.

    candidates: `grid(summary)` by default. All are trained on the device of `summary`. A learner is trained as the
    summary was distilled for, whatever its class, but with dropout, as candidates may differ in nothing else and
    there are summaries that leave it out; and from nothing, the item table included, as it would be on the data:
    the summary's pretrained tables (`start="pretrained"`) make better learners, but favour those that are like the
    one that the tables come from. By the mean loss over training (`rank_by="loss"`, a measure of training speed, Ru
    et al., "Speedy Performance Estimation for Neural Architecture Search", 2021) candidates are told apart with
    less noise than by ranks of a few hundred users, but a regularisation that costs loss and helps on the data is
    not seen. With `config.full_seeds` each candidate is also trained on all of the training part, from nothing and
    with early stopping, after all of them are on the summary.
    known: finished trials, which are not run again; on_trial: sees each one that is run. The test part is not touched.
    """
    config = config or SearchConfig()
    candidates = grid(summary, start=config.start) if candidates is None else candidates
    if len({candidate.name for candidate in candidates}) < len(candidates):
        raise ValueError("a candidate occurs twice")
    if not candidates:
        raise ValueError("there is no candidate to search among")
    trials = dict(known or {})
    ranker = Ranker(split.validation, seed=derive_seed(seed, "ranker"))
    todo: list[tuple[Candidate, Source, int]] = []
    todo += [(c, "summary", run) for c in candidates for run in range(config.seeds)]
    todo += [(c, "full", run) for run in range(config.full_seeds) for c in candidates]
    for done, (candidate, source, run) in enumerate(todo):
        progress("search", done, len(todo), {})
        key = (candidate.name, source, run)
        if key in trials:
            continue
        begun = time.perf_counter()
        run_seed = derive_seed(seed, "run", run)
        learner, loss = _trained(
            summary, split, candidate, source, config, ranker, seed=run_seed, progress=progress
        )
        trials[key] = Trial(ranker.metrics(learner), time.perf_counter() - begun, loss)
        if on_trial is not None:
            on_trial(key, trials[key])
    progress("search", len(todo), len(todo), {})
    return standings(candidates, trials, config)


def standings(
    candidates: Sequence[Candidate], trials: Mapping[TrialKey, Trial], config: SearchConfig
) -> list[Standing]:
    """The candidates with a trial on the summary, best first."""
    found = []
    for candidate in candidates:
        runs: dict[Source, int] = {"summary": config.seeds, "full": config.full_seeds}
        on_summary, on_data = (
            [trials[key] for run in range(count) if (key := (candidate.name, source, run)) in trials]
            for source, count in runs.items()
        )
        if on_summary:
            found.append(
                Standing(
                    candidate=candidate,
                    summary=_means(on_summary),
                    full=_means(on_data) if on_data else None,
                    summary_seconds=sum(trial.seconds for trial in on_summary),
                    full_seconds=sum(trial.seconds for trial in on_data),
                    summary_loss=mean_and_sd([{"loss": _loss(trial)} for trial in on_summary])["loss"],
                )
            )
    return sorted(found, key=lambda s: -s.figure(config.protocol, config.metric, config.rank_by))


def agreement(
    found: Sequence[Standing], *, protocol: Protocol, metric: str, rank_by: RankBy = "metric"
) -> Agreement | None:
    """How the order on the summary agrees with that by the metric on the full data; None with fewer than two."""
    both = [
        (standing, standing.figure(protocol, metric, rank_by), standing.full[protocol][metric]["mean"])
        for standing in found
        if standing.full is not None
    ]
    if len(both) < 2:
        return None
    chosen = max(both, key=lambda entry: entry[1])
    best = max(both, key=lambda entry: entry[2])
    return Agreement(
        candidates=len(both),
        kendall_tau=kendall_tau([entry[1] for entry in both], [entry[2] for entry in both]),
        chosen=chosen[0].candidate.name,
        best=best[0].candidate.name,
        regret=best[2] - chosen[2],
        summary_seconds=sum(entry[0].summary_seconds for entry in both),
        full_seconds=sum(entry[0].full_seconds for entry in both),
    )


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's tau-b of paired figures: (concordant - discordant) / sqrt of the pairs not tied in each.

    None where either side is tied throughout.
    """
    signs = [
        (_sign(a[0] - b[0]), _sign(a[1] - b[1]))
        for a, b in itertools.combinations(zip(first, second, strict=True), 2)
    ]
    untied = [sum(1 for pair in signs if pair[side]) for side in (0, 1)]
    if not all(untied):
        return None
    return float(sum(x * y for x, y in signs) / (untied[0] * untied[1]) ** 0.5)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _means(trials: Sequence[Trial]) -> dict[Protocol, dict[str, dict[str, float]]]:
    return {protocol: mean_and_sd([t.scores[protocol] for t in trials]) for protocol in trials[0].scores}


def _loss(trial: Trial) -> float:
    return DIVERGED if trial.loss is None else trial.loss


def _learner(summary: Summary, candidate: Candidate, start: Start, *, seed: int) -> Learner:
    make = learner_for if start == "pretrained" else untrained_learner
    return make(summary, name=candidate.learner, hyperparameters=candidate.hyperparameters, seed=seed)


def _trained(
    summary: Summary,
    split: Split,
    candidate: Candidate,
    source: Source,
    config: SearchConfig,
    ranker: Ranker,
    *,
    seed: int,
    progress: Progress,
) -> tuple[Learner, float | None]:
    """A learner and, if it was trained on the summary, the mean of its loss over the steps."""
    learner = _learner(summary, candidate, config.start if source == "summary" else "nothing", seed=seed)
    if source == "summary":
        try:
            losses = summary.fit(learner, seed=seed, progress=progress, **config.fit_changes())
        except FloatingPointError:  # a candidate like any other, and the last
            return learner, DIVERGED
        return learner, math.fsum(losses) / len(losses)
    try:
        fit_examples(learner, split.train, ranker, config.fit, seed=seed, progress=progress)
    except FloatingPointError:
        with torch.no_grad():
            for parameter in learner.parameters():
                parameter.fill_(torch.nan)  # which ranks nothing well, as one left by training on the summary
    return learner, None
