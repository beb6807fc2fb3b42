"""How a class of learners is best trained on a summary, found on validation data.

A summary comes with the options that it was distilled for, which suit the class that distilled it. Another class may
want another rate, longer training or dropout, as it would on the log.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from td3_fast.checks import check_choices
from td3_fast.data import Split
from td3_fast.evaluate import Scores, has_own_positions, learner_for
from td3_fast.metrics import Metric, mean_and_sd
from td3_fast.ops import derive_seed
from td3_fast.progress import Progress, silent
from td3_fast.summary import Summary
from td3_fast.training import Protocol, Ranker, fresh_like


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What is tried, every combination of it, and how it is judged.

    Each combination trains one learner; the best `finalists`, and the options of the summary if they are among them,
    train `seeds` in all, and the best mean of those wins.
    """

    rates: tuple[float, ...] = (1.0, 2.0, 4.0)  # multiples of the summary's own learning rate
    lengths: tuple[float, ...] = (1.0, 2.0)  # and of its number of steps
    dropouts: tuple[bool, ...] = (False, True)
    middle_positions: tuple[int, ...] = (1, 8)  # targets of augmentation of each user, where it has that
    finalists: int = 6
    seeds: int = 3
    protocol: Protocol = "uni100"  # of the figure on validation data
    metric: Metric = "NDCG@10"

    def __post_init__(self) -> None:
        for name in ("rates", "lengths", "dropouts", "middle_positions"):
            if not getattr(self, name):
                raise ValueError(f"TuneConfig.{name} is empty: name at least one to try")
        check_choices(self)
        if min(*self.rates, *self.lengths, *self.middle_positions) <= 0:
            raise ValueError("TuneConfig's rates, lengths and middle_positions must be above 0")
        if self.finalists < 1 or self.seeds < 1:
            raise ValueError(
                f"tuning needs at least 1 finalist and 1 seed, got {self.finalists} and {self.seeds}"
            )

    def settings(self, own: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The options of every combination, as `fit_on_summary` takes them; own: those of the summary."""
        middles = self.middle_positions if own["augmentation"] else (own["middle_positions"],)
        made = [
            {
                **own,
                "learning_rate": rate * own["learning_rate"],
                "steps": max(1, round(length * own["steps"])),
                "dropout": dropout,
                "middle_positions": middle,
            }
            for rate, length, dropout, middle in itertools.product(
                self.rates, self.lengths, self.dropouts, middles
            )
        ]
        return [options for i, options in enumerate(made) if options not in made[:i]]


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A combination of options and the metrics of the learners trained by it, on validation data."""

    options: dict[str, Any]  # as `fit_on_summary` takes them
    metrics: dict[str, dict[str, float]]  # of `TuneConfig.protocol`: metric -> {"mean", "sd"}, fractions
    learners: int


def tune(
    summary: Summary,
    split: Split,
    *,
    learner: str | None = None,
    config: TuneConfig | None = None,
    seed: int = 0,
    known: Mapping[tuple[int, int], Scores] | None = None,
    on_trial: Callable[[tuple[int, int], Scores], None] | None = None,
    progress: Progress = silent,
) -> list[Tried]:
    """Train learners of one class on `summary` by combinations of options; the finalists, best first.

    learner: the class; None: the one that the summary was distilled for. All have the summary's pretrained embeddings
    (`learner_for`) and are scored on the validation part of `split`; its test part is not touched.
    Then `summary.fit(learner, **found[0].options)` and `evaluate(..., fit_options=found[0].options)` train by the best.
    known: scores by combination and learner, which are not made again; on_trial: sees all others as they are made.

    Raises:
        ValueError: the summary has no metadata, or the data are others than it was distilled from.
    """
    config = config or TuneConfig()
    if summary.metadata is None:
        raise ValueError("the summary does not say how it is used: set `summary.metadata`")
    summary.metadata.check_items(split.interactions.item_ids.tolist())
    own = summary.metadata.training.fit_options()
    settings = config.settings(own)
    ranker = Ranker(split.validation, seed=derive_seed(seed, "ranker"), protocols=(config.protocol,))
    teacher = learner_for(summary, name=learner)
    scores = dict(known or {})
    most_finalists = min(config.finalists + (own in settings), len(settings))
    total = len(settings) + most_finalists * (config.seeds - 1)
    done = 0

    def train(number: int, run: int) -> None:
        nonlocal done
        progress("tune", done, total, {})
        done += 1
        if (number, run) in scores:
            return
        options, run_seed = settings[number], derive_seed(seed, "tune", run)
        trained = fresh_like(
            teacher,
            seed=run_seed,
            share_items=options["item_embedding"] == "frozen",
            draw_positions=has_own_positions(summary, type(teacher).__name__),
        )
        with suppress(FloatingPointError):  # a learner of no finite numbers ranks nothing well
            summary.fit(trained, seed=run_seed, progress=progress, **options)
        scores[number, run] = ranker.metrics(trained)
        if on_trial is not None:
            on_trial((number, run), scores[number, run])

    for number in range(len(settings)):
        train(number, 0)
    ranked = sorted(range(len(settings)), key=lambda i: -scores[i, 0][config.protocol][config.metric])
    finalists = [i for place, i in enumerate(ranked) if place < config.finalists or settings[i] == own]
    for number, run in itertools.product(finalists, range(1, config.seeds)):
        train(number, run)
    progress("tune", total, total, {})
    tried = [
        Tried(
            options=settings[number],
            metrics=mean_and_sd([scores[number, run][config.protocol] for run in range(config.seeds)]),
            learners=config.seeds,
        )
        for number in finalists
    ]
    return sorted(tried, key=lambda entry: -entry.metrics[config.metric]["mean"])
