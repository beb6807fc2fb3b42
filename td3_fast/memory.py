"""How much memory a distillation takes, told before it begins, and how to make it take less.

Whatever has the size of the item table is counted. What depends on the learner's architecture is measured: some passes
of a twin with few items, whose tensors are followed from birth to death.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from td3_fast.data import Batch, Split
from td3_fast.distill_config import DistillConfig, Limits
from td3_fast.learner_classes import OtherClass, PretrainedClass
from td3_fast.learners import build_learner
from td3_fast.live_bytes import LiveBytes
from td3_fast.objective import OuterObjective, TeacherFeatures
from td3_fast.ops import EXAMPLES_AT_ONCE, SMALL_TABLE, has_fused, has_next_item_gradient, kept_score_bytes
from td3_fast.training import RANKED_AT_ONCE
from td3_fast.unroll import (
    NOTED_LIMIT,
    TENSORS_PER_STEP,
    AdamConfig,
    FixedEmbeddings,
    InnerLoop,
    initial_state,
    middle_places,
    stride_of,
)

MIB = 2**20
SMALLEST_MICRO_BATCH = 64
TWIN_ITEMS = 64  # or as many as make its table one that is not small, where the learner's is none
TWIN_EXAMPLES = (32, 96)  # passes over so many tell what an example takes
# glibc gives blocks up to a size that it learns back to its heap, and some of that stays between others; as measured
LARGEST_BLOCK_OF_HEAP = 32 * MIB
LOST_IN_HEAP = 0.25
LOST_BESIDE_TABLES = 0.32  # where tables are among what comes and goes
LOST_IN_ONE_CALL = 0.05  # where they do so within a kernel's call
SCRATCH = 16 * MIB  # of a kernel, at most
LIBRARIES = 52 * MIB  # code and buffers that come into memory with the first steps, as measured
OF_AUTOGRAD = 32 * MIB  # of these, what autograd imports when it is first given a cotangent

POOL = "pretrained learner and its pool"
TEACHER = "teacher, shared item table"
FACTORS = "factors, queries, soft embeddings"
PROBABILITIES = "probabilities of the summary"
LEARNER = "learner and its optimiser"
STATES = "adjoint states"
GRAPHS = "graphs of the inner steps"
NOTED = "cotangents that wait"
ADJOINT = "adjoint of a step"
BATCH = "real batch"
VALIDATION = "validation"
HEAP = "lost between blocks"
OTHER = "libraries, kernels' scratch"

# what makes a part smaller, beyond what `memory_limit` decides by itself
REMEDIES = {
    POOL: "pretrain with a smaller pool (PretrainConfig.pool_last) or a narrower learner (hidden)",
    TEACHER: "a narrower learner (hidden) makes it smaller",
    FACTORS: "a smaller summary (--size) makes it smaller",
    PROBABILITIES: "a smaller summary (--size) makes it smaller",
    LEARNER: "--item-embedding frozen leaves out the tables",
    STATES: "--item-embedding frozen leaves out the tables, and a shorter --window keeps fewer",
    GRAPHS: "a shorter --window or smaller --users-per-step makes it smaller",
    NOTED: "--item-embedding frozen does without",
    ADJOINT: "--item-embedding frozen leaves out the tables",
    BATCH: "a smaller --batch-size makes it smaller",
    VALIDATION: "--item-embedding frozen leaves out the optimiser's tables",
    HEAP: "a smaller --batch-size makes it smaller",
    OTHER: "it is the least that any run takes: raise the limit",
}


class MemoryLimitError(ValueError):
    """A distillation does not fit; the message names what is largest and what would help."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a distillation has in memory above data and libraries when it has most, in bytes by part."""

    parts: dict[str, int]
    moment: str  # when that is
    limits: Limits
    kept: str  # what is kept and what recomputed, in words
    moments: dict[str, int]  # the total of every moment
    all_kept: int | None = (
        None  # the total if nothing were recomputed, where something is and no limit asks for it
    )

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())

    def lines(self) -> list[str]:
        """The plan in words."""
        parts = sorted(self.parts.items(), key=lambda part: -part[1])
        lines = [
            f"{in_words(self.total)} above the data, most of it {self.moment}; {self.kept}",
            "; ".join(f"{name} {in_words(size)}" for name, size in parts if size >= self.total / 200),
        ]
        if self.all_kept is not None:
            lines.append(
                f"nothing is recomputed, which is faster, with a limit of {in_words(self.all_kept)} or more"
            )
        return lines


class _Twin(NamedTuple):
    """What passes of a learner take, the item table aside, in bytes."""

    width: int  # of the item table, not bytes
    other_columns: int  # of tables of other widths, of other classes
    parameters: int
    step: int  # kept of an inner step, with a frozen table: state, gradients and graph
    adjoint: int  # beside that, while a step is taken or pulled back
    length: int  # of the longest history that is read
    by_autograd: bool  # whether that is how steps are differentiated
    real: tuple[float, float]  # of a pass over real examples: at none, and of each
    ranked: tuple[float, float]  # of ranking, likewise


def in_words(size: float) -> str:
    """Bytes as "12 KiB", "812 MiB" or "3.4 GiB"."""
    if size < MIB:
        return f"{size / 2**10:,.0f} KiB"
    return f"{size / MIB:,.0f} MiB" if size < 2**30 else f"{size / 2**30:,.1f} GiB"


def plan_memory(
    split: Split,
    config: DistillConfig,
    *,
    learner_name: str,
    learner_config: dict[str, Any],  # num_items among it
    pool: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> MemoryPlan:
    """The memory of a distillation from `pool` checkpoints on a device, made to fit `config.memory_limit` where that
    is set, and to use it; without one, within the limits of `Limits`.

    Of the ways that fit, the fastest: smaller passes over real examples, then states that are recomputed, then
    probabilities that are. Takes a fraction of a second, and no memory to speak of.

    Raises:
        MemoryLimitError: none fits.
        ValueError: the engine is "higher", whose memory grows with window × batch × positions × items; there is no
            training example.
    """
    if config.engine == "higher":
        raise ValueError('the memory of engine="higher" is not planned: use engine="native"')
    if len(split.train) == 0:
        raise ValueError("there is no training example: no user has two items to train on")
    twin = _measure(split, config, learner_name, learner_config, dtype)
    in_place = torch.device(device).type == "cpu" and has_fused("cpu")
    planned = functools.partial(
        _plan, split, config, twin, learner_config["num_items"], pool, dtype, in_place
    )
    if config.memory_limit is None:
        plan = planned(Limits(micro_batch=config.micro_batch))
        all_kept = planned(_nothing_recomputed(config))
        return plan if plan.kept == all_kept.kept else replace(plan, all_kept=all_kept.total)
    tried = []
    for limits in _choices(config):
        plan = planned(limits)
        if plan.total <= config.memory_limit:
            return plan
        tried.append(plan)
    least = min(tried, key=lambda plan: plan.total)
    part = max(least.parts, key=lambda name: least.parts[name])
    raise MemoryLimitError(
        f"a memory limit of {in_words(config.memory_limit)} is too small: the least that works is "
        f"{in_words(least.total)}, {in_words(least.parts[part])} of it for {part}; {REMEDIES[part]}"
    )


def _nothing_recomputed(config: DistillConfig) -> Limits:
    return Limits(micro_batch=config.micro_batch, kept_states=sys.maxsize, cached_probabilities=sys.maxsize)


def _choices(config: DistillConfig) -> Iterator[Limits]:
    """From the fastest to the smallest."""
    most = _nothing_recomputed(config)
    least = min(SMALLEST_MICRO_BATCH, config.micro_batch)
    halvings = math.ceil(math.log2(config.micro_batch / least))
    sizes = [max(config.micro_batch >> i, least) for i in range(halvings + 1)]
    for cached, kept, size in itertools.product((most.cached_probabilities, 0), (most.kept_states, 0), sizes):
        yield replace(most, cached_probabilities=cached, kept_states=kept, micro_batch=size)


def _plan(
    split: Split,
    config: DistillConfig,
    twin: _Twin,
    num_items: int,
    pool: int,
    dtype: torch.dtype,
    in_place: bool,  # whether kernels make probabilities, and sum what pairs weigh, with nothing as large beside
    limits: Limits,
) -> MemoryPlan:
    trained, size = config.item_embedding == "trained", dtype.itemsize
    kept_size = 2 if config.item_dtype == "bfloat16" else size
    table, theta = num_items * twin.width * kept_size, twin.parameters
    moving = table if trained else 0  # the table as a parameter of the learner
    users = min(config.users_per_step, config.users)
    soft = config.users * config.positions * twin.width * size
    numbers = config.user_rank * (config.position_rank * twin.width + config.users)
    numbers += config.position_rank * config.positions
    if config.summary == "farzi":
        numbers = config.latent_rank * (config.users * config.positions + num_items)
    low, high = middle_places(config.positions)
    rows = 1 + (min(config.middle_positions, high - low) if config.augmentation else 0)  # targets of a user

    probabilities = config.users * config.positions * num_items * size
    softmax = trained and config.normalize == "softmax"
    cached = softmax and 2 * probabilities <= limits.cached_probabilities
    of_step = probabilities * users // config.users
    window = config.inner_steps if config.window_kind == "full" else config.window
    stride = stride_of(window, theta + moving, limits.kept_states)
    checkpoints = math.ceil(window / stride) - 1
    last = window - checkpoints * stride
    state, kept = 3 * (theta + moving), TENSORS_PER_STEP * moving
    # the kernels keep scores only for the derivative by the table
    scores = kept_score_bytes(users * rows, num_items, twin.width, size) if trained else 0
    graph = twin.step - TENSORS_PER_STEP * theta + scores
    noted = 2 * window * table if cached else 0
    waiting = min(noted, NOTED_LIMIT + table)
    # those of a set of users side by side: with the kernels the cotangents alone
    of_pair = soft * users // config.users
    beside = waiting // math.ceil(config.users / users)
    if in_place:
        beside = beside * of_pair // (of_pair + table)
    made = probabilities if in_place else 2 * probabilities

    micro = min(limits.micro_batch, config.batch_size, len(split.train))
    histories = min(config.batch_size, len(split.train)) * (twin.length + 2) * 8
    real_scores = kept_score_bytes(micro, num_items, twin.width, size) if trained else 0
    real = int(twin.real[0] + twin.real[1] * micro) + real_scores

    autograd = twin.by_autograd or (softmax and not cached)
    always = {
        # a pool of one is the best checkpoint itself; a frozen table is there once, for all
        POOL: table
        + num_items * twin.other_columns * kept_size
        + theta
        + (pool if pool > 1 else 0) * (moving + theta),
        TEACHER: (2 + pool) * theta,
        FACTORS: 8 * numbers * size + 4 * soft,
        OTHER: LIBRARIES + SCRATCH - (0 if autograd else OF_AUTOGRAD),
    }
    if config.semantics.carry_embeddings:
        always[VALIDATION] = table
    if config.semantics.reload_learner == "epoch":
        always[LEARNER] = config.trajectories * (theta + moving)
    standing = {PROBABILITIES: probabilities} if cached else {}
    embedded = (1 if cached else 2) * moving  # of a table's gradient that came through X
    step = {ADJOINT: twin.adjoint + (moving + embedded)}
    held = {STATES: checkpoints * state + last * (TENSORS_PER_STEP * theta + kept), GRAPHS: last * graph}
    again = {
        STATES: max(checkpoints - 1, 0) * state + stride * (TENSORS_PER_STEP * theta + kept),
        GRAPHS: stride * graph,
    }
    moments = {
        # built with a table of its own before it takes the pretrained one, and before the kernels have any scratch; its
        # steps have been measured by then
        "where the learner is built": {TEACHER: max(table - SCRATCH, 0)},
        "where the probabilities are made": {PROBABILITIES: made if cached else 0},
        "in the window": {**standing, LEARNER: state, **held, **step},
        "in the outer loss": {
            **standing,
            LEARNER: state,
            **held,
            BATCH: histories + real + theta + 5 * moving,
        },
        "in the adjoint": {
            **standing,
            **(again if checkpoints else held),
            LEARNER: 3 * (theta + moving),
            ADJOINT: twin.adjoint + 2 * moving + embedded,
            NOTED: waiting if checkpoints else 0,
        },
        "where cotangents meet the probabilities": {
            PROBABILITIES: probabilities + (0 if in_place else 2 * of_step),
            LEARNER: 3 * moving,
            NOTED: waiting + beside,
        }
        if cached
        else {},
        "in validation": {
            **({PROBABILITIES: made} if cached else {}),
            LEARNER: moving + theta + state,
            VALIDATION: twin.adjoint + moving + embedded,
        },
        "in ranking": {
            LEARNER: moving + theta,
            VALIDATION: int(twin.ranked[0] + twin.ranked[1] * min(RANKED_AT_ONCE, len(split.validation))),
        },
    }
    for moment in (
        "in the window",
        "in the adjoint",
        "where cotangents meet the probabilities",
        "in validation",
    ):
        moments[moment][OTHER] = real_scores  # their memory waits for the next real batch
    blocks = dict.fromkeys((STATES, NOTED, ADJOINT, LEARNER, BATCH), moving)
    blocks |= {PROBABILITIES: probabilities, TEACHER: table}
    lost = LOST_IN_HEAP
    if trained:
        in_one_call = in_place and cached and not twin.by_autograd and not config.semantics.separate_passes
        lost = LOST_IN_ONE_CALL if in_one_call else LOST_BESIDE_TABLES
    for parts in moments.values():
        small = sum(n for name, n in parts.items() if blocks.get(name, 0) < LARGEST_BLOCK_OF_HEAP)
        parts[HEAP] = int(lost * small)
    totals = {moment: sum(always.values()) + sum(parts.values()) for moment, parts in moments.items()}
    moment = max(totals, key=lambda name: totals[name])
    parts = {
        name: always.get(name, 0) + moments[moment].get(name, 0) for name in {**always, **moments[moment]}
    }
    kept_words = "probabilities " + ("kept" if cached else "streamed")
    if checkpoints:
        kept_words += f", of {window} adjoint states every {stride}th kept"
    kept_words += f", real examples by {micro:,}"
    return MemoryPlan(parts=parts, moment=moment, limits=limits, kept=kept_words, moments=totals)


def _measure(
    split: Split, config: DistillConfig, name: str, learner_config: dict[str, Any], dtype: torch.dtype
) -> _Twin:
    num_items = TWIN_ITEMS
    of_item = learner_config["hidden"] * dtype.itemsize
    if learner_config["num_items"] * of_item > SMALL_TABLE:
        num_items = SMALL_TABLE // of_item + 1
    own = PretrainedClass(build_learner(name, {**learner_config, "num_items": num_items}, seed=0).to(dtype))
    features = TeacherFeatures(own.learner, own.flat)
    classes = [own, *(OtherClass(other, own.learner) for other in config.other_learners)]
    of_each = [_measure_class(split, config, each, features) for each in classes]

    def largest(line: str) -> tuple[float, float]:
        return max(getattr(each, line)[0] for each in of_each), max(
            getattr(each, line)[1] for each in of_each
        )

    # classes take turns, so of each figure it is the largest that counts
    return _Twin(
        width=max(each.width for each in of_each),
        other_columns=sum(each.columns for each in classes if each.columns != own.columns),
        parameters=max(each.parameters for each in of_each),
        step=max(each.step for each in of_each),
        adjoint=max(each.adjoint for each in of_each),
        length=of_each[0].length,
        by_autograd=any(each.by_autograd for each in of_each),
        real=largest("real"),
        ranked=largest("ranked"),
    )


def _measure_class(
    split: Split, config: DistillConfig, measured: PretrainedClass, features: TeacherFeatures
) -> _Twin:
    learner, flat = measured.learner, measured.flat
    items = learner.item_embeddings.detach()
    theta = flat.gather(learner.state_dict())
    fused = flat.fused_shape(theta) is not None
    real_fused = fused and has_next_item_gradient(items, theta)
    step, adjoint = _measure_steps(config, learner, items, theta)
    real: list[float] = []
    ranked: list[float] = []
    for count in TWIN_EXAMPLES:
        # the longest histories are the dearest
        index = np.argsort(split.train.lengths, kind="stable")[-count:]
        objective = OuterObjective(
            config, learner, flat, split.train, index, features=features, seed=0, micro_batch=count
        )
        ((_, part),) = objective.parts
        short = Batch(part.histories % len(items), part.lengths, part.targets % len(items))
        objective.parts = [
            (0, short),
            (1, short),
        ]  # what is left of a pass is there while the next one begins
        with LiveBytes() as live:
            objective.gradient(flat, (theta,), items)
        real.append(live.peak)
        with LiveBytes() as live, torch.no_grad():
            learner(short.histories, short.lengths)
        ranked.append(live.peak)
    length = min(int(split.train.lengths.max(initial=1)), learner.max_len)
    real_line = _line(TWIN_EXAMPLES, real)
    if real_fused:
        # embeddings and what comes back for them, of the examples that the op has at once
        within = 2 * EXAMPLES_AT_ONCE * length * items.shape[1] * items.element_size()
        real_line = (real_line[0] + within, real_line[1])
    return _Twin(
        width=items.shape[1],
        other_columns=0,
        parameters=theta.nbytes,
        step=step,
        adjoint=adjoint,
        length=length,
        by_autograd=not fused or config.semantics.separate_passes,
        real=real_line,
        ranked=_line(TWIN_EXAMPLES, ranked),
    )


def _measure_steps(config: DistillConfig, learner: Any, items: Tensor, theta: Tensor) -> tuple[int, int]:
    loop = InnerLoop(
        learner=learner,
        num_users=config.users,
        num_positions=config.positions,
        batch_size=config.users_per_step,
        adam=AdamConfig(learning_rate=config.learner_lr, weight_decay=config.learner_weight_decay),
        seed=0,
        augmentation=config.augmentation,
        middle_positions=config.middle_positions,
        dropout=config.inner_dropout,
        separate_passes=config.semantics.separate_passes,
    )
    mixture = FixedEmbeddings(items.new_zeros(config.users, config.positions, items.shape[1]))
    state = initial_state((theta,))
    steps = 2
    for step in range(steps):
        loop.inputs(step)  # drawn once for many steps
    with LiveBytes() as live:
        state, window = loop.run_window(state, items, mixture, until=steps)
        kept = live.now
        loop.pull_back(window, (torch.zeros_like(theta),), mixture)
    return kept // steps, live.peak - kept


def _line(at: tuple[int, int], values: list[float]) -> tuple[float, float]:
    """Value at 0 and slope of the line through two points."""
    slope = (values[1] - values[0]) / (at[1] - at[0])
    return max(values[0] - slope * at[0], 0.0), slope
