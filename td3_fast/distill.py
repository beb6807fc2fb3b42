"""Step 2 of the method: learning a summary by differentiating through the training it leads to (Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from td3_fast.data import ExamplesOnDevice, Split, shuffled
from td3_fast.distill_config import DistillConfig, Limits
from td3_fast.distill_state import DistillState, mean_of
from td3_fast.initial import summary_of_sequences, training_sequences
from td3_fast.learner_classes import OtherClass, PretrainedClass, to_width
from td3_fast.objective import TeacherFeatures
from td3_fast.ops import derive_seed, full_precision, seeded_generator
from td3_fast.parallel import ALONE, Group, Ranks, item_tables
from td3_fast.progress import Progress, silent
from td3_fast.summary import (
    FarziSummary,
    Preprocessing,
    Summary,
    SummaryMetadata,
    TrainingRecipe,
    TuckerSummary,
)
from td3_fast.training import Pretrained
from td3_fast.trajectory import Follower, Trajectory
from td3_fast.unroll import (
    TENSORS_PER_STEP,
    AdamConfig,
    FixedEmbeddings,
    ItemMixture,
    Lanes,
    adam_step_,
    flat_pair,
    initial_state,
    make_mixture,
)
from td3_fast.validation import FOUND, Validation

FIGURES = ("cross_entropy", "alignment", "inner", "window")  # of an outer step, means over its trajectories


class Distiller:
    """Algorithm 1 on given data. `run` does the whole; `outer_step` one step, for tests and benchmarks.

    ranks: the processes that do it together, all by the same calls. Those of `ranks.work` share out the trajectories of
    an outer step where there are at least as many as processes, else the real examples of each. Those of `ranks.items`
    hold the item tables among them; `pretrained` then has this process's rows, as `Pretrained.cut` makes them.
    """

    @full_precision()
    def __init__(
        self,
        split: Split,
        pretrained: Pretrained,
        config: DistillConfig,
        *,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        pretrained = for_item_embedding(pretrained, config)
        config.check_pretrained(pretrained.learner_name)
        self.ranks = ranks
        self.tables = item_tables(ranks.items, split.interactions.num_items)
        _check_ranks(config, ranks)
        # inner loops are most of an outer step, and only whole trajectories share them out
        enough = config.trajectories >= ranks.work.size
        self.sharing_trajectories, self.sharing_examples = (
            (ranks.work, Group()) if enough else (Group(), ranks.work)
        )
        self.split = split
        self.pretrained = pretrained
        self.config = config
        self.seed = seed
        self.teacher = pretrained.learner(share_items=True)
        self.items = self.teacher.item_embeddings.detach()
        self.classes = [
            PretrainedClass(self.teacher),
            *(OtherClass(name, self.teacher) for name in config.other_learners),
        ]
        self.flat = self.classes[0].flat
        self.pool = [
            (self.flat.gather(checkpoint), checkpoint.get("item_embeddings", self.items))
            for checkpoint in pretrained.pool
        ]
        self.steps_per_epoch = -(-len(split.train) // config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self._order: tuple[int, np.ndarray] | None = None
        self.form = self._initial_summary()  # says what the factors mean
        self.limits = self._choose_limits()
        self.validation = Validation(
            split=split,
            config=config,
            classes=self.classes,
            seed=seed,
            group=ranks.everyone,
            tables=self.tables,
            cached_limit=self.limits.cached_probabilities,
        )
        features = TeacherFeatures(self.teacher, self.flat, tables=self.tables)
        # masks are drawn alike on every device, for the widths that the host cuts
        train_there = None
        if self.items.device.type != "cpu" and not config.semantics.masks_real_examples:
            train_there = ExamplesOnDevice(split.train, self.teacher.max_len, self.items.device)
        self.followers = [
            Follower(
                config,
                each.learner,
                each.flat,
                split.train,
                self.limits,
                features=features,
                tables=self.tables,
                sharing=self.sharing_examples,
                train_there=train_there,
            )
            for each in self.classes
        ]
        self.follower = self.followers[0]
        own = len(self.sharing_trajectories.turns(config.trajectories))
        # a limit of memory is kept by one trajectory after another
        self.lanes = Lanes(
            self.items.device, own if config.memory_limit is None else 1, bytes_each=self._bytes_of_lane()
        )

    def _initial_summary(self) -> Summary:
        config = self.config
        sizes: dict[str, Any] = {
            "users": config.users,
            "positions": config.positions,
            "item_factors": self.items,
            "seed": derive_seed(self.seed, "factors"),
            "normalize": config.normalize,
        }
        tucker: dict[str, Any] = {"user_rank": config.user_rank, "position_rank": config.position_rank}
        summary: Summary
        if config.summary == "farzi":
            summary = FarziSummary.initialise(rank=config.latent_rank, **sizes)
        elif config.initial == "sequences":
            sequences = training_sequences(
                self.split.train, users=config.users, positions=config.positions, seed=sizes["seed"]
            )
            embedded = self.tables.look_up(torch.from_numpy(sequences).to(self.items.device), self.items)
            summary = summary_of_sequences(
                embedded, self.items, sharpness=config.sharpness, seed=sizes["seed"], **tucker
            )
            summary.normalize = config.normalize
        else:
            summary = TuckerSummary.initialise(**sizes, **tucker)
        positions = self.teacher.position_embeddings
        summary.position_embeddings = None if positions is None else positions.detach()
        return summary

    def _choose_limits(self) -> Limits:
        if self.config.memory_limit is None:
            return Limits(micro_batch=self.config.micro_batch)
        from td3_fast.memory import plan_memory

        pretrained = self.pretrained
        return plan_memory(
            self.split,
            self.config,
            learner_name=pretrained.learner_name,
            learner_config=pretrained.learner_config,
            pool=len(pretrained.pool),
            dtype=pretrained.dtype,
            device=self.items.device,
        ).limits

    def _bytes_of_lane(self) -> int:
        """What the recorded steps of a trajectory hold: the states of a window, and the probabilities if these are
        kept."""
        config = self.config
        moving = sum(each.flat.size for each in self.classes) * self.items.element_size()
        held = 0
        if config.item_embedding == "trained":
            moving += self.items.nbytes
            probabilities = config.users * config.positions * len(self.items) * self.items.element_size()
            held = probabilities if 2 * probabilities <= self.limits.cached_probabilities else 0
        window = config.inner_steps if config.window_kind == "full" else config.window
        return held + (window + 1) * TENSORS_PER_STEP * moving

    def initial_state(self) -> DistillState:
        """The factors before the first outer step."""
        return DistillState(factors=initial_state(self.form.factors))

    def summary(self, factors: tuple[Tensor, ...]) -> Summary:
        """Factors as a summary."""
        return self.form.with_factors(factors)

    def metadata(self, state: DistillState) -> SummaryMetadata:
        """What the best summary so far stands for; the filters of the log are not known here."""
        log = self.split.interactions
        best = state.history[state.best_epoch - 1]
        return SummaryMetadata(
            item_ids=tuple(log.item_ids.tolist()),
            preprocessing=Preprocessing(data=log.name, filters={}, fingerprint=log.fingerprint),
            training=TrainingRecipe(
                learner=self.pretrained.learner_name,
                learner_config={**self.pretrained.learner_config, "num_items": log.num_items},
                **self.config.fit_options(),
            ),
            metrics={name: value for name, value in best.items() if "@" in name},
            settings={"seed": self.seed, "distill": self.config.settings()},
        )

    def best(self, state: DistillState) -> Summary:
        """The summary of the best epoch so far, with all that it needs to be saved and evaluated.

        Raises:
            FloatingPointError: there is none, for on the summary of every epoch a learner's training diverged.
        """
        if state.best is None:
            raise FloatingPointError(
                f"after none of {len(state.history)} epochs could all learners be trained on the summary, their loss "
                f"was not finite: lower learner_lr ({self.config.learner_lr:g}) or summary_lr "
                f"({self.config.summary_lr:g})"
            )
        summary = self.summary(state.best)
        summary.metadata = self.metadata(state)
        return summary

    def batch_index(self, step: int, trajectory: int = 0) -> np.ndarray:
        """The real examples of an outer step.

        Every trajectory meets all the examples in an epoch. They start from places that are equally far apart in one
        order, so that those of a step differ wherever there are as many batches as trajectories.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        ahead = trajectory * self.steps_per_epoch // self.config.trajectories
        position = (position + ahead) % self.steps_per_epoch
        shuffle_of = epoch if self.config.semantics.shuffle else 0
        if self._order is None or self._order[0] != shuffle_of:
            order = shuffled(len(self.split.train), seed=derive_seed(self.seed, "order", shuffle_of))
            self._order = (shuffle_of, order)
        return self._order[1][position * self.config.batch_size : (position + 1) * self.config.batch_size]

    def draw(
        self, state: DistillState, trajectory: int = 0, *, window: tuple[int, int] | None = None
    ) -> Trajectory:
        """What the learner `trajectory` of an outer step does; window: instead of the drawn one."""
        # the first has the seeds of a distillation with no other
        seed = derive_seed(self.seed, "outer", state.step, *([trajectory] if trajectory else []))
        generator = seeded_generator(seed, "draws")
        start = self._start(state, generator, trajectory)
        warm_up, differentiated = window or self.config.draw_window(generator)
        return Trajectory(
            start=start,
            warm_up=warm_up,
            differentiated=differentiated,
            examples=self.batch_index(state.step, trajectory),
            seed=seed,
        )

    def turn(self, state: DistillState, trajectory: int = 0) -> int:
        """Which of `classes` the learner of a trajectory is of: they take turns, over trajectories and outer steps."""
        return (state.step * self.config.trajectories + trajectory) % len(self.classes)

    def _start(
        self, state: DistillState, generator: torch.Generator, trajectory: int = 0
    ) -> tuple[Tensor, ...]:
        """The learner of a trajectory."""
        # drawn whether it is needed or not, so that what is drawn after it is the same
        drawn = int(torch.randint(max(len(self.pool), 1), (), generator=generator, device="cpu"))
        reload = self.config.semantics.reload_learner == "step" or state.step % self.steps_per_epoch == 0
        if not reload and state.carried is not None:
            size = len(state.carried) // self.config.trajectories
            return state.carried[trajectory * size : (trajectory + 1) * size]
        if self.config.start == "fresh":
            path = (state.step, trajectory) if trajectory else (state.step,)
            drawn_class = self.classes[self.turn(state, trajectory)]
            theta = drawn_class.fresh_parameters(seed=derive_seed(self.seed, "start", *path))
            items = self.items
        else:
            theta, items = self.pool[drawn]
        return (theta, items) if self.config.item_embedding == "trained" else (theta,)

    def meta_gradient(
        self, state: DistillState, *, window: tuple[int, int] | None = None
    ) -> tuple[tuple[Tensor, ...], dict[str, float]]:
        """The gradient of one outer step with respect to the summary's factors, and its losses.

        Both are means over the trajectories. On a GPU those of a process run side by side, as many as `LANES_LIMIT`
        allows and none with a `memory_limit`, which is for one; elsewhere one after another, so that the memory is that
        of one: on a CPU no batching of theirs is as fast.
        A step of 16 learners of ml-100k's size took 15 ms in a loop and 18 under `torch.vmap`, which cannot have the
        fused encoder, and its adjoint 38 ms against 67.

        window: (warm-up, differentiated) steps instead of the drawn ones.
        """
        gradients, losses, _ = self._differentiated(state, window)
        return gradients, losses

    @torch.enable_grad()
    @full_precision()
    def _differentiated(
        self, state: DistillState, window: tuple[int, int] | None
    ) -> tuple[tuple[Tensor, ...], dict[str, float], tuple[Tensor, ...] | None]:
        """`meta_gradient`, and what `DistillState.carried` is after the step."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError("torch.inference_mode records nothing to differentiate: distil outside of it")
        if self.config.engine == "higher":
            return *self._with_higher(state, window), state.carried
        factors = [f.detach().requires_grad_() for f in state.factors.parameters]
        made, mixture = self._mixture(factors)
        count = self.config.trajectories
        cotangents, by_trajectory, carried = [], [], []
        with self.lanes.side_by_side() as lanes:
            for turn, index in enumerate(self.sharing_trajectories.turns(count)):
                with lanes.lane(turn) as lane:
                    drawn = self.draw(state, index, window=window)
                    of_class = self.turn(state, index)
                    own = mixture.apart() if of_class == 0 else self._for_other(of_class, mixture)
                    cotangent, loss, between = self.followers[of_class].follow(drawn, own, lane)
                    cotangents.append(cotangent if of_class == 0 else to_width(cotangent, made.shape[-1]))
                by_trajectory.append(loss)
                carried.append(between)
        # not by grad_outputs, for which autograd imports symbolic algebra: 34 MiB, and a second of every run
        pulled = (made * (torch.stack(cotangents).sum(0) / count)).sum()
        gradients = torch.autograd.grad(pulled, factors)
        shares = {
            name: torch.stack([loss[name] for loss in by_trajectory]).double().sum() / count
            for name in FIGURES
        }
        # a process that takes a part of the examples has all of the inner loop
        shares["inner"] /= self.sharing_examples.size
        shares["window"] /= self.sharing_examples.size
        gradients, figures = self._over_ranks(gradients, shares)
        losses = {"loss": figures["cross_entropy"] + figures["alignment"], **figures}
        if self.config.semantics.reload_learner != "epoch":
            return gradients, losses, state.carried
        every = self.sharing_trajectories.in_order(carried, count)
        return gradients, losses, tuple(tensor for learner in every for tensor in learner)

    def _mixture(self, factors: list[Tensor]) -> tuple[Tensor, ItemMixture]:
        """The tensor that soft embeddings are made from, differentiable in the factors, and what makes them."""
        config = self.config
        queries, keys = self.form.queries_and_keys(tuple(factors))
        if config.item_embedding == "trained":
            learned = keys.requires_grad
            mixture = make_mixture(
                queries.detach(),
                keys.detach(),
                normalize=config.normalize,
                learned_keys=learned,
                cached_limit=self.limits.cached_probabilities,
                tables=self.tables,
            )
            return flat_pair(queries, keys) if learned else queries, mixture
        embeddings = self.tables.normalized_embedding(
            queries, keys.to(self.items.dtype), self.items, normalize=config.normalize
        )
        return embeddings, FixedEmbeddings(embeddings)

    def _for_other(self, of_class: int, mixture: ItemMixture) -> ItemMixture:
        """The soft embeddings, of a frozen table, as wide as the item table of that class.

        Cut or filled with zeros, which is its own adjoint: cotangents come back to the first width in the same way.
        """
        assert mixture.whole is not None
        return FixedEmbeddings(to_width(mixture.whole, self.classes[of_class].columns))

    def _over_ranks(
        self, gradients: tuple[Tensor, ...], figures: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, float]]:
        """Gradients and figures of all processes, from those of each one's share; everywhere the same bits.

        With recorded steps the figures are the first that the host reads of an outer step, when all of it is under way.
        """
        ranks = self.ranks
        own = torch.stack([figure.double() for figure in figures.values()])
        # the adjoint is linear in what it pulls back, so it is the small gradients of the factors that are added up
        *summed, every = [ranks.items.common(ranks.work.total(part)) for part in (*gradients, own)]
        return tuple(summed), dict(zip(figures, every.tolist(), strict=True))

    def _with_higher(
        self, state: DistillState, window: tuple[int, int] | None
    ) -> tuple[tuple[Tensor, ...], dict[str, float]]:
        """`meta_gradient` by the engine of that name."""
        factors = [f.detach().requires_grad_() for f in state.factors.parameters]
        followed = [
            self.followers[self.turn(state, index)].follow_with_higher(
                self.draw(state, index, window=window), factors, self.form.queries_and_keys
            )
            for index in range(self.config.trajectories)
        ]
        by_factor = zip(*(gradients for gradients, _ in followed), strict=True)
        return tuple(torch.stack(g).mean(0) for g in by_factor), mean_of([losses for _, losses in followed])

    def outer_step(self, state: DistillState) -> dict[str, float]:
        """One outer step, overwriting `state`; returns its losses."""
        config = self.config
        gradients, losses, carried = self._differentiated(state, None)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        losses["gradient_norm"] = float(norm)
        if not math.isfinite(losses["gradient_norm"]) or not math.isfinite(losses["loss"]):
            raise FloatingPointError(
                f"outer step {state.step + 1}: the meta-gradient is not finite (loss {losses['loss']:.4g}); "
                "lower learner_lr or summary_lr, or shorten the window"
            )
        scale = min(1.0, config.max_norm / (losses["gradient_norm"] + 1e-6))
        rate = config.summary_lr * 0.5 * (1 + math.cos(math.pi * state.step / self.total_steps))
        adam = AdamConfig(learning_rate=rate, weight_decay=config.summary_weight_decay)
        state.factors = adam_step_(state.factors, [g * scale for g in gradients], adam)
        state.carried = carried
        state.step += 1
        state.losses.append(losses)
        return losses

    def run(
        self,
        state: DistillState | None = None,
        *,
        on_step: Callable[[DistillState], None] | None = None,
        progress: Progress = silent,
    ) -> DistillState:
        """Distil to the end, from the start or from `state`; `on_step` sees the state after every outer step."""
        state = state or self.initial_state()
        while state.step < self.total_steps:
            losses = self.outer_step(state)
            progress("distill", state.step, self.total_steps, losses)
            if state.step % self.steps_per_epoch == 0:
                self._end_epoch(state)
                progress("distill", state.step, self.total_steps, state.history[-1])
            if on_step is not None:
                on_step(state)
        return state

    def choose(
        self,
        epochs: Sequence[tuple[Tensor, ...]],
        history: Sequence[Mapping[str, float]],
        *,
        on_epoch: Callable[[DistillState], None] | None = None,
        progress: Progress = silent,
    ) -> DistillState:
        """The end of `run` where its steps led to these factors after each epoch; `history` has their losses."""
        state = self.initial_state()
        for factors, entry in zip(epochs, history, strict=True):
            on_device = tuple(factor.to(self.items.device) for factor in factors)
            state.factors = state.factors._replace(parameters=on_device)
            state.step += self.steps_per_epoch
            # the rest of an entry is what validation found
            of_steps = [name for name in entry if "@" not in name and name not in FOUND]
            state.losses.append({name: entry[name] for name in of_steps})
            self._end_epoch(state)
            progress("choose", state.step, self.total_steps, state.history[-1])
            if on_epoch is not None:
                on_epoch(state)
        return state

    def _end_epoch(self, state: DistillState) -> None:
        summary = self.summary(state.factors.parameters)
        self.validation.end_epoch(summary, state, epoch=state.step // self.steps_per_epoch)


def _check_ranks(config: DistillConfig, ranks: Ranks) -> None:
    if ranks.items.size > 1 and config.summary == "farzi":
        raise ValueError(
            "the decoder of a Farzi summary is learned for all items in one process: use a Tucker summary, "
            "or do not split the item tables"
        )
    if ranks.items.size > 1 and config.memory_limit is not None:
        raise ValueError("memory_limit is planned for whole item tables: leave it out where they are split")
    if ranks.everyone.size > 1 and config.engine == "higher":
        raise ValueError('engine="higher" is for one process: use engine="native", or start one')
    if ranks.items.size > 1 and (
        config.semantics.reload_learner == "epoch" or config.semantics.carry_embeddings
    ):
        raise ValueError(
            "a learner or item table that is carried from step to step is written into checkpoints as a whole: "
            "use the paper's semantics, or do not split the item tables"
        )


def distill(
    split: Split,
    pretrained: Pretrained,
    config: DistillConfig,
    *,
    seed: int,
    state: DistillState | None = None,
    ranks: Ranks = ALONE,
    on_step: Callable[[DistillState], None] | None = None,
    progress: Progress = silent,
) -> tuple[Summary, DistillState]:
    """Distil the training part of `split` into a summary of `config.users` × `config.positions`.

    Returns the summary of the epoch that is the best by `config.criterion` on the validation part, with all that it
    needs to be saved and evaluated, and the final state with the history. `state` continues an interrupted run, with
    the bits of an unbroken one.
    ranks: as for `Distiller`; where item tables are split, the summary has this process's rows of its item factors.
    Source: TD3 (WWW '25), Algorithm 1.
    """
    distiller = Distiller(split, pretrained, config, seed=seed, ranks=ranks)
    state = distiller.run(state, on_step=on_step, progress=progress)
    return distiller.best(state), state


def for_item_embedding(pretrained: Pretrained, config: DistillConfig) -> Pretrained:
    """What a distillation by `config` needs of a pretrained learner: one item table, in its dtype, if it is frozen.

    Raises:
        ValueError: learners start from the pool, which is empty, or from its tables, which it has none of.
    """
    if config.start == "pool" and not pretrained.pool:
        raise ValueError(
            'start="pool" starts learners from checkpoints of pretraining, and this pool is empty: keep some, or take '
            'start="fresh"'
        )
    if config.item_embedding == "frozen":
        table = pretrained.best["item_embeddings"]
        return pretrained.for_frozen_items(torch.bfloat16 if config.item_dtype == "bfloat16" else table.dtype)
    if config.start == "pool" and not all("item_embeddings" in entry for entry in pretrained.pool):
        raise ValueError(
            'item_embedding="trained" starts from the item tables of the pool, and this pool was kept without them: '
            'pretrain with pool_items=True, or take item_embedding="frozen" or start="fresh"'
        )
    return pretrained
