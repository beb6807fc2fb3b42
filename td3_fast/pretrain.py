"""Step 1 of the method: a learner trained on the log, and the pool of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from td3_fast.data import Split
from td3_fast.learners import FlatParameters, Learner
from td3_fast.ops import derive_seed
from td3_fast.progress import Progress, silent
from td3_fast.training import FitConfig, FitState, Pretrained, Ranker, fit_examples


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How the pretrained learner is made; checkpoints of epochs `pool_first` to `pool_last` form the pool.

    A distillation with a frozen item table takes all of a checkpoint but its table: `pool_items=False` leaves these
    out, which are nearly the whole pool where items are many.
    """

    fit: FitConfig = field(default_factory=FitConfig)
    pool_first: int = 5
    pool_last: int = 30
    pool_items: bool = True

    @property
    def pool_size(self) -> int:
        """Checkpoints at most; a training that stops early has fewer."""
        return max(min(self.pool_last, self.fit.max_epochs) - self.pool_first + 1, 1)


@dataclass(kw_only=True)
class PretrainState:
    """Where pretraining stands after a batch."""

    fit: FitState
    pool: list[tuple[Tensor, ...]]  # flat parameters, and the item table where the pool has it

    def to(self, device: torch.device) -> PretrainState:
        """The same with every tensor on a device."""
        pool = [tuple(t.to(device) for t in entry) for entry in self.pool]
        return PretrainState(fit=self.fit.to(device), pool=pool)


def pretrain(
    split: Split,
    learner: Learner,
    config: PretrainConfig,
    *,
    seed: int,
    state: PretrainState | None = None,
    on_step: Callable[[PretrainState], None] | None = None,
    progress: Progress = silent,
) -> Pretrained:
    """Train `learner` in place on the training part of `split` with early stopping, keeping the pool.

    `state` continues an interrupted run, with the bits of an unbroken one; `on_step` sees the state after each batch.
    A run that stops before `pool_first` has its best checkpoint for a pool.
    """
    flat = FlatParameters(learner)
    pool = [] if state is None else state.pool

    def keep(fit: FitState) -> None:
        if fit.batch == 0 and config.pool_first <= fit.epoch <= config.pool_last:
            kept = fit.optimiser.parameters[: 2 if config.pool_items else 1]
            pool.append(tuple(p.clone() for p in kept))
        if on_step is not None:
            on_step(PretrainState(fit=fit, pool=pool))

    fit = fit_examples(
        learner,
        split.train,
        Ranker(split.validation, seed=derive_seed(seed, "ranker"), protocols=(config.fit.selection,)),
        config.fit,
        seed=seed,
        state=None if state is None else state.fit,
        on_step=keep,
        progress=progress,
    )
    best = {name: value.detach().clone() for name, value in learner.state_dict().items()}
    checkpoints = [
        flat.scatter(theta) | ({"item_embeddings": items[0]} if items else {}) for theta, *items in pool
    ] or [{name: value for name, value in best.items() if config.pool_items or name != "item_embeddings"}]
    return Pretrained(
        learner_name=type(learner).__name__,
        learner_config=learner.hyperparameters(),
        best=best,
        pool=checkpoints,
        history=fit.history,
        best_epoch=fit.best_epoch,
    )
