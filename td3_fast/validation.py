"""Which epoch of a distillation is kept: learners trained on the summary as it stands, on the validation part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from td3_fast.data import Split
from td3_fast.distill_config import DistillConfig
from td3_fast.distill_state import DistillState, mean_of
from td3_fast.learner_classes import PretrainedClass
from td3_fast.ops import derive_seed, full_precision
from td3_fast.parallel import Group, ItemTables
from td3_fast.summary import Summary
from td3_fast.training import SELECTION_METRIC, Ranker
from td3_fast.unroll import fit_on_summary

VALIDATION_LOSS = "validation_cross_entropy"
DIVERGED = "diverged"  # learners of an epoch's validation whose loss was not finite, if any
FOUND = ("epoch", VALIDATION_LOSS, DIVERGED)  # of an entry of the history, beside metrics of ranks


@dataclass(kw_only=True)
class Validation:
    """How good a summary is after each epoch, and whether it is the best so far.

    group: the processes that distil together, of which the first one's figures count.
    """

    split: Split
    config: DistillConfig
    classes: Sequence[PretrainedClass]  # that learners are of, in turn
    seed: int
    group: Group
    tables: ItemTables
    cached_limit: int  # bytes of the summary's probabilities, as `fit_on_summary` takes it

    @cached_property
    def ranker(self) -> Ranker:
        """Of the validation part, by the protocol that chooses."""
        return Ranker(
            self.split.validation,
            seed=derive_seed(self.seed, "ranker"),
            protocols=(self.config.selection,),
            tables=self.tables,
        )

    @property
    def learners(self) -> int:
        """After each epoch."""
        return max(self.config.validation_runs, len(self.classes))

    @full_precision()
    def metrics(self, summary: Summary, state: DistillState, *, epoch: int) -> dict[str, float]:
        """The mean of `validation_runs` learners, which the classes share out, and of at least one of each class.

        `DIVERGED` counts those that could not be trained. With `carry_embeddings` the state's table is overwritten.
        """
        config = self.config
        by_class: list[list[dict[str, float]]] = [[] for _ in self.classes]
        runs, diverged = self.learners, 0
        for run in range(runs):
            seed = derive_seed(self.seed, "validation", run)
            of_class = run % len(self.classes)
            learner = self.classes[of_class].fresh(seed=seed, share_items=config.item_embedding == "frozen")
            if config.semantics.carry_embeddings and state.validation_items is not None:
                with torch.no_grad():
                    learner.item_embeddings.copy_(state.validation_items)
            try:
                fit_on_summary(
                    learner,
                    summary,
                    seed=seed,
                    cached_limit=self.cached_limit,
                    tables=self.tables,
                    **config.fit_options(),
                )
                trained = True
            except FloatingPointError:
                diverged, trained = diverged + 1, False
            if config.semantics.carry_embeddings and trained:
                state.validation_items = learner.item_embeddings.detach().clone()
            if config.semantics.redraw_negatives:
                self.ranker.redraw_negatives(epoch * runs + run)
            dropout_seed = (
                derive_seed(seed, "dropout", epoch) if config.semantics.validation_dropout else None
            )
            metrics = self.ranker.metrics(learner, dropout_seed=dropout_seed)[config.selection]
            if config.criterion == "cross_entropy":
                metrics[VALIDATION_LOSS] = self.ranker.cross_entropy(learner, dropout_seed=dropout_seed)
            by_class[of_class].append(metrics)
        found = mean_of([mean_of(runs) for runs in by_class])
        # all processes name the same figures, whatever each has found
        agreed = self.group.first_of({**found, DIVERGED: float(diverged)})
        return agreed if agreed[DIVERGED] else {n: v for n, v in agreed.items() if n != DIVERGED}

    def end_epoch(self, summary: Summary, state: DistillState, *, epoch: int) -> None:
        """Enter an epoch into the state's history, and keep its factors where it is the best.

        From `selection_start` on none is compared with those before it, which are kept until then.
        """
        metrics = self.metrics(summary, state, epoch=epoch)
        figures = {"epoch": epoch, **mean_of(state.losses), **metrics}
        # a file of JSON has no place for others
        state.history.append({name: value for name, value in figures.items() if math.isfinite(value)})
        state.losses.clear()
        by_loss = self.config.criterion == "cross_entropy"
        score = -metrics[VALIDATION_LOSS] if by_loss else metrics[SELECTION_METRIC]
        if epoch == 1 + int(self.config.selection_start * self.config.epochs):
            state.best_score = float("-inf")
        all_diverged = metrics.get(DIVERGED, 0) >= self.learners
        if not all_diverged and score > state.best_score:  # no number is not above
            state.best_score, state.best_epoch = score, epoch
            state.best = tuple(p.clone() for p in state.factors.parameters)
