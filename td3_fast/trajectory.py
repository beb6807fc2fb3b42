"""What an outer step follows: learners that are trained on the summary, judged on real examples and pulled back."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from td3_fast.data import Examples, ExamplesOnDevice
from td3_fast.distill_config import DistillConfig, Limits
from td3_fast.learners import FlatParameters, Learner
from td3_fast.objective import OuterObjective, TeacherFeatures
from td3_fast.ops import derive_seed
from td3_fast.parallel import WHOLE, Group, ItemTables
from td3_fast.unroll import (
    AdamConfig,
    CudaGraphs,
    FusedLoop,
    InnerLoop,
    ItemMixture,
    RecordedLoop,
    Recorder,
    initial_state,
    may_be_fused,
    may_be_recorded,
    pull_back_with_higher,
    stride_of,
)


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One learner of an outer step: where it starts, the steps it takes and the examples that judge it."""

    start: tuple[Tensor, ...]  # flat parameters, and the item table if it is trained; not to be overwritten
    warm_up: int
    differentiated: int
    examples: np.ndarray  # (batch,) indices
    seed: int


class Follower:
    """Follows trajectories of one class of learners: the inner loop, the outer loss, and the way back through the
    differentiated steps.

    learner: of that class, whose encoder `flat` has as one vector and whose item table is the learners' where theirs is
    frozen; features: of the pretrained learner; train: the real examples; limits: what memory allows; sharing:
    processes among which the real examples of a trajectory are dealt out; train_there: the examples on the learner's
    device, where the host would be waited for.
    """

    def __init__(
        self,
        config: DistillConfig,
        learner: Learner,
        flat: FlatParameters,
        train: Examples,
        limits: Limits,
        *,
        features: TeacherFeatures,
        tables: ItemTables = WHOLE,
        sharing: Group | None = None,
        train_there: ExamplesOnDevice | None = None,
    ) -> None:
        self.config = config
        self.learner = learner
        self.flat = flat
        self.features = features
        self.items = learner.item_embeddings.detach()
        self.train = train
        self.limits = limits
        self.tables = tables
        self.sharing = sharing or Group()
        # makes what records the steps of the inner loop; None where they are taken one by one
        device = self.items.device
        self.recorder: Callable[[], Recorder] | None = None
        if device.type == "cuda":
            use = f"outer step of {type(learner).__name__}"
            self.recorder = functools.partial(CudaGraphs, device, use=use)
        self.recorded: dict[int, RecordedLoop] = {}  # by lane
        self.train_there = train_there

    def inner_loop(self, trajectory: Trajectory) -> InnerLoop:
        """The inner problem of a trajectory."""
        config = self.config
        return InnerLoop(
            learner=self.learner,
            num_users=config.users,
            num_positions=config.positions,
            batch_size=config.users_per_step,
            adam=AdamConfig(learning_rate=config.learner_lr, weight_decay=config.learner_weight_decay),
            seed=derive_seed(trajectory.seed, "inner"),
            augmentation=config.augmentation,
            middle_positions=config.middle_positions,
            dropout=config.inner_dropout,
            separate_passes=config.semantics.separate_passes,
            restart_batches_at=trajectory.warm_up if config.semantics.restart_batches else None,
            tables=self.tables,
            flat=self.flat,
        )

    def objective(self, trajectory: Trajectory) -> OuterObjective:
        """The real examples that judge a trajectory's learner; this process's share of them."""
        return OuterObjective(
            self.config,
            self.learner,
            self.flat,
            self.train,
            trajectory.examples,
            features=self.features,
            seed=derive_seed(trajectory.seed, "real"),
            micro_batch=self.limits.micro_batch,
            tables=self.tables,
            sharing=self.sharing,
            there=self.train_there,
        )

    def _engine(
        self, trajectory: Trajectory, mixture: ItemMixture, lane: int
    ) -> InnerLoop | FusedLoop | RecordedLoop:
        """What takes the steps of a trajectory on a lane."""
        loop, config = self.inner_loop(trajectory), self.config
        if self.recorder is None and may_be_fused(loop, trajectory.start, self.items, mixture):
            return FusedLoop(loop)
        window = config.inner_steps if config.window_kind == "full" else config.window
        size = sum(p.nbytes for p in trajectory.start)
        kept_whole = stride_of(window, size, self.limits.kept_states) == window
        worth = kept_whole and may_be_recorded(trajectory.start)
        if self.recorder is None or not worth or self.tables is not WHOLE:
            return loop
        steps = max(config.inner_steps, trajectory.warm_up + trajectory.differentiated)
        window = max(window, trajectory.differentiated)
        recorded = self.recorded.get(lane)
        if recorded is None or recorded.limits != (steps, window):
            recorded = self.recorded[lane] = RecordedLoop(
                loop,
                trajectory.start,
                self.items,
                mixture,
                steps=steps,
                window=window,
                record=self.recorder(),
                losses=False,
            )
        return recorded.begin(loop, mixture)

    def follow(
        self, trajectory: Trajectory, mixture: ItemMixture, lane: int
    ) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
        """A trajectory's gradient of what the mixture was made from, its losses, and the learner after warm-up where
        the next outer step goes on with it."""
        loop: Any = self._engine(trajectory, mixture, lane)  # either takes what it has returned
        learner = initial_state(trajectory.start)
        learner, _ = loop.run(learner, self.items, mixture, until=trajectory.warm_up)
        between: tuple[Tensor, ...] = ()
        if self.config.semantics.reload_learner == "epoch":
            between = learner.clone().parameters
        end = trajectory.warm_up + trajectory.differentiated
        learner, window = loop.run_window(
            learner, self.items, mixture, until=end, kept_limit=self.limits.kept_states
        )
        inner = window.loss
        fit, aligned, cotangents = self.objective(trajectory).gradient(
            self.flat, learner.parameters, self.items
        )
        del learner  # as large as three item tables
        limit = self.config.growth_limit
        if limit is not None and self.sharing.size > 1:
            # all processes go back as far as one would, each with the mean of their cotangents
            size = self.sharing.size
            cotangents = tuple(self.sharing.total(c) / size for c in cotangents)
        gradient = loop.pull_back(window, cotangents, mixture, growth_limit=limit)
        pulled_back = window.pulled_back
        if not isinstance(pulled_back, Tensor):
            pulled_back = fit.new_full((), pulled_back)  # which the host does not wait for
        window_length = pulled_back.to(fit.dtype)
        losses = {"cross_entropy": fit, "alignment": aligned, "inner": inner, "window": window_length}
        return gradient, losses, between

    def follow_with_higher(
        self,
        trajectory: Trajectory,
        factors: list[Tensor],
        queries_and_keys: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[tuple[Tensor, ...], dict[str, float]]:
        """The gradient of a trajectory by the engine "higher", of the factors, and its losses."""
        learner = copy.deepcopy(self.learner)
        self.flat.write(learner, *trajectory.start)
        objective = self.objective(trajectory)
        parts: list[float] = [0.0, 0.0]

        def probabilities(users: Tensor, sources: Sequence[Tensor]) -> Tensor:
            queries, keys = queries_and_keys(tuple(sources), users)
            scores = queries @ keys.T
            return scores.softmax(-1) if self.config.normalize == "softmax" else scores

        def outer_loss(encode: Callable[..., Tensor], items: Tensor) -> Tensor:
            total = items.new_zeros(())
            for fit, aligned in objective.losses(encode, items):
                parts[0] += float(fit.detach())
                parts[1] += float(aligned.detach())
                total = total + fit + aligned
            return total

        loss, gradients = pull_back_with_higher(
            self.inner_loop(trajectory),
            learner,
            probabilities,
            outer_loss,
            factors,
            warm_up=trajectory.warm_up,
            window=trajectory.differentiated,
            trained=self.config.item_embedding == "trained",
        )
        return gradients, {"loss": loss, "cross_entropy": parts[0], "alignment": parts[1]}
