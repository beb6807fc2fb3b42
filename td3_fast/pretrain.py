"""Step 1 of the method: a learner trained on the log, and the pool of its checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from td3_fast.checks import check_sizes
from td3_fast.data import Split
from td3_fast.ensemble import Ensemble, Member, check_share, check_taught
from td3_fast.learners import LEARNERS, FlatParameters, Learner, build_learner
from td3_fast.ops import derive_seed
from td3_fast.progress import Progress, silent
from td3_fast.training import FitConfig, FitState, Pretrained, Ranker, fit_examples


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How the pretrained learner is made; checkpoints of epochs `pool_first` to `pool_last` form the pool.

    A distillation with a frozen item table takes all of a checkpoint but its table: `pool_items=False` leaves these
    out, which are nearly the whole pool where items are many.

    With an ensemble, as many learners of other seeds are trained first, each as without one; half of what the learner
    itself is then taught is the mean of their predictions. It takes their time, and that of their predictions.
    """

    fit: FitConfig = field(default_factory=FitConfig)
    pool_first: int = 5
    pool_last: int = 30
    pool_items: bool = True
    ensemble: int = 0
    ensemble_share: float = 0.5  # of the targets

    def __post_init__(self) -> None:
        check_sizes(self, "ensemble", least=0)
        check_sizes(self, "pool_first")
        if self.pool_last < self.pool_first:
            raise ValueError(
                f"PretrainConfig.pool_last must be at least pool_first, got {self.pool_last} and {self.pool_first}"
            )
        check_share(self.ensemble_share)
        if self.ensemble and self.fit.loss == "sampled":
            raise ValueError(
                'an ensemble teaches all items: choose FitConfig.loss="full", or PretrainConfig.ensemble=0'
            )

    def settings(self) -> dict[str, Any]:
        """What the pretrained learner depends on; as it was before there were ensembles, where there is none."""
        settings = asdict(self)
        if not self.ensemble:
            del settings["ensemble"], settings["ensemble_share"]
        return settings

    @property
    def pool_size(self) -> int:
        """Checkpoints at most; a training that stops early has fewer."""
        return max(min(self.pool_last, self.fit.max_epochs) - self.pool_first + 1, 1)


@dataclass(kw_only=True)
class PretrainState:
    """Where pretraining stands after a batch."""

    fit: FitState
    pool: list[tuple[Tensor, ...]]  # flat parameters, and the item table where the pool has it
    members: list[Member] = field(default_factory=list)  # of the ensemble, that are trained

    def to(self, device: torch.device) -> PretrainState:
        """The same with every tensor on a device."""
        pool = [tuple(t.to(device) for t in entry) for entry in self.pool]
        members = [(theta.to(device), items.to(device)) for theta, items in self.members]
        return PretrainState(fit=self.fit.to(device), pool=pool, members=members)


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

    Raises:
        ValueError: there is nothing to train on or to validate with, or an ensemble is asked for and `learner` is
            trained on more than the next item.
    """
    name = type(learner).__name__
    if LEARNERS.get(name, (None,))[0] is not type(learner):
        raise ValueError(
            f"{name} is no learner that can be built again from a file: call td3_fast.register_learner({name}, its "
            "configuration class) first"
        )
    if learner.hyperparameters()["num_items"] != split.interactions.num_items:
        raise ValueError(
            f"the learner is over {learner.hyperparameters()['num_items']} items, padding included, and the data have "
            f"{split.interactions.num_items}: build it with num_items={split.interactions.num_items}"
        )
    if config.ensemble:
        check_taught(type(learner))
    flat = FlatParameters(learner)
    pool = [] if state is None else state.pool
    members = [] if state is None else state.members
    ranker = Ranker(split.validation, seed=derive_seed(seed, "ranker"), protocols=(config.fit.selection,))

    def keep(fit: FitState, *, pooled: bool) -> None:
        if pooled and fit.batch == 0 and config.pool_first <= fit.epoch <= config.pool_last:
            kept = fit.optimiser.parameters[: 2 if config.pool_items else 1]
            pool.append(tuple(p.clone() for p in kept))
        if on_step is not None:
            on_step(PretrainState(fit=fit, pool=pool, members=members))

    def report(stage: str, done: int, total: int, values: Mapping[str, float]) -> None:
        progress(stage, len(members) * total + done, (config.ensemble + 1) * total, values)

    def trained(
        learner: Learner, seed: int, fit: FitState | None, ensemble: Ensemble | None, *, pooled: bool
    ) -> FitState:
        return fit_examples(
            learner,
            split.train,
            ranker,
            config.fit,
            seed=seed,
            state=fit,
            ensemble=ensemble,
            on_step=functools.partial(keep, pooled=pooled),
            progress=report,
        )

    def member(number: int, fit: FitState | None) -> Member:
        own_seed = derive_seed(seed, "ensemble", number)
        other = build_learner(type(learner).__name__, learner.hyperparameters(), seed=own_seed)
        parameters, items = trained(other.to(learner.item_embeddings), own_seed, fit, None, pooled=False).best
        return parameters, items

    in_progress = None if state is None else state.fit
    del state  # tensors of a training that is over are freed
    while len(members) < config.ensemble:
        members.append(member(len(members), in_progress))
        in_progress = None
    ensemble = Ensemble(flat, members, share=config.ensemble_share) if members else None
    fit = trained(learner, seed, in_progress, ensemble, pooled=True)
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
