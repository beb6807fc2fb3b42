"""Training a learner on a summary, and the derivative of what comes out with respect to the summary.

The inner loop touches the summary only through its soft embeddings X, and the item table only through log-sum-exps,
so nothing of size positions × items takes part in it. The adjoint of a window of steps is taken one step at a time,
last to first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from td3_fast.learners import FlatParameters, Learner
from td3_fast.ops import (
    DropoutStream,
    EncoderShape,
    derive_seed,
    derive_seeds,
    gradient_is_enough,
    inner_gradient,
    known_gradient,
    seed_path,
    seeded_generator,
)
from td3_fast.parallel import WHOLE, ItemTables
from td3_fast.progress import Progress, silent
from td3_fast.unroll.adam import AdamConfig, AdamState, adam_adjoint_, adam_step_, step_size
from td3_fast.unroll.mixture import Embeddings, ItemMixture
from td3_fast.unroll.window import (
    KEPT_STATES_LIMIT,
    Evaluation,
    StepInputs,
    Window,
    WindowStep,
    stride_of,
)

ItemEmbedding = Literal["frozen", "trained"]
FIRST_MIDDLE_POSITION = 5
STEPS_AT_ONCE = 64  # whose target positions are drawn together


@functools.lru_cache(maxsize=64)
def _cyclic(first: int, size: int, num_users: int) -> Tensor:
    return torch.arange(first, first + size, device="cpu") % num_users


def middle_places(num_positions: int) -> tuple[int, int]:
    """The first position that a middle target may have, and the one after the last; 0-based."""
    high = max(num_positions - 1, 2)
    return min(FIRST_MIDDLE_POSITION, high - 1), high


@functools.lru_cache(maxsize=8)
def _targets(seed: int, block: int, users: int, num_positions: int, middle_positions: int) -> Tensor:
    """The target positions of a block of steps: (STEPS_AT_ONCE, users, 1 + middle_positions)."""
    shape = (STEPS_AT_ONCE, users, 1)
    last = torch.full(shape, num_positions - 1, dtype=torch.int64, device="cpu")
    if middle_positions == 0:
        return last
    low, high = middle_places(num_positions)
    generator = seeded_generator(seed, "middle", block)
    if middle_positions == 1:
        middle = torch.randint(low, high, shape, generator=generator, device="cpu")
    else:
        shape = (STEPS_AT_ONCE, users, high - low)
        drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
        middle = low + drawn.argsort(-1)[..., :middle_positions]
    return torch.cat([last, middle], dim=-1)


@functools.lru_cache(maxsize=8)
def _sizes(count: int, adam: AdamConfig) -> Tensor:
    sizes = [step_size(step + 1, adam) for step in range(count)]
    return torch.tensor(sizes, dtype=torch.float64, device="cpu")


@functools.lru_cache(maxsize=8)
def _dropout_paths(count: int, passes: int) -> list[bytes]:
    return [seed_path("dropout", step, index) for step in range(count) for index in range(passes)]


@dataclass(frozen=True, kw_only=True)
class InnerLoop:
    """The inner problem of one outer step, and of training on a finished summary.

    Step `t` (0-based) takes the synthetic users `batch(t)` and minimises the mean over them and over the target
    positions of `lse(h Eᵀ) − h·x`: the KL divergence from the summary's distribution, up to a constant of the summary.
    An `AdamState` holds the flat parameters (size,) of the learner and, where the item table is trained, the table.
    """

    learner: Learner
    num_users: int
    num_positions: int
    batch_size: int
    adam: AdamConfig
    seed: int
    augmentation: bool = True  # ALT: middle positions beside the last one
    middle_positions: int = 1  # of each user, as many of them as there are, all different
    dropout: bool = True
    separate_passes: bool = (
        False  # an encoder pass with its own dropout for each of the two, as the authors do
    )
    restart_batches_at: int | None = None  # the step at which the cycle of users starts over
    tables: ItemTables = WHOLE  # where the rows of item tables are
    flat: FlatParameters | None = None  # of the learner, where it is there

    def __post_init__(self) -> None:
        if self.num_positions < 2:
            raise ValueError(f"a summary needs at least 2 positions to predict one, got {self.num_positions}")
        if self.middle_positions < 1:
            raise ValueError(f"middle_positions must be at least 1, got {self.middle_positions}")
        if self.num_positions - 1 > self.learner.max_len:
            raise ValueError(
                f"a summary of {self.num_positions} positions needs a learner with max_len >= "
                f"{self.num_positions - 1}, got {self.learner.max_len}"
            )

    @functools.cached_property
    def flat_parameters(self) -> FlatParameters:
        """The learner's encoder as one vector."""
        return FlatParameters(self.learner) if self.flat is None else self.flat

    def batch(self, step: int) -> Tensor:
        """The synthetic users of a step, cyclic and in order: (b,) int64, not to be written to."""
        size = min(self.batch_size, self.num_users)
        if self.restart_batches_at is not None and step >= self.restart_batches_at:
            step -= self.restart_batches_at
        return _cyclic(step * size % self.num_users, size, self.num_users)

    def targets(self, step: int) -> Tensor:
        """The target positions of a step: (b, 1 + middle positions) int64, the last one first; not to be written to."""
        block, row = divmod(step, STEPS_AT_ONCE)
        return self._target_block(block)[row]

    def _target_block(self, block: int) -> Tensor:
        users = min(self.batch_size, self.num_users)
        middle = self.middle_positions if self.augmentation else 0
        return _targets(self.seed, block, users, self.num_positions, middle)

    def seeds(self, step: int) -> list[int]:
        """Of the dropout of a step, one for each encoder pass; empty without dropout."""
        return [derive_seed(self.seed, "dropout", step, index) for index in range(self._num_seeds)]

    @property
    def _num_seeds(self) -> int:
        if not self.dropout:
            return 0
        return 1 + self.augmentation * self.middle_positions if self.separate_passes else 1

    def inputs(self, step: int) -> StepInputs:
        """All that a step takes beside the learner, the item table and the summary."""
        seeds = torch.tensor(self.seeds(step), dtype=torch.int64, device="cpu")
        return StepInputs(self.batch(step), self.targets(step), seeds, step_size(step + 1, self.adam))

    def first_inputs(self, count: int) -> StepInputs:
        """The inputs of the first `count` steps, at least one, in a few operations: each field has a row for each of
        them, and `size` is a tensor (count,) float64. Not to be written to."""
        users = min(self.batch_size, self.num_users)
        steps = torch.arange(count, device="cpu")
        if self.restart_batches_at is not None:
            steps[self.restart_batches_at :] -= self.restart_batches_at
        targets = torch.cat([self._target_block(block) for block in range(-(-count // STEPS_AT_ONCE))])
        seeds = derive_seeds(self.seed, _dropout_paths(count, self._num_seeds))
        return StepInputs(
            (steps.unsqueeze(1) * users + torch.arange(users, device="cpu")) % self.num_users,
            targets[:count],
            torch.tensor(seeds, dtype=torch.int64, device="cpu").view(count, self._num_seeds),
            _sizes(count, self.adam),
        )

    def _inputs_of(self, steps: range, device: torch.device) -> Iterator[StepInputs]:
        """`inputs` of steps that follow one another, on a device."""
        if len(steps) == 0:
            return
        *fields, sizes = self.first_inputs(steps.stop)
        assert isinstance(sizes, Tensor)
        rows = (field[steps.start :].unbind() for field in fields)
        for users, targets, seeds, size in zip(*rows, sizes[steps.start :].tolist(), strict=True):
            yield StepInputs(users, targets, seeds, size).to(device)

    def passes(self, inputs: StepInputs) -> list[tuple[Tensor, DropoutStream | None]]:
        """The encoder passes of a step: their target positions (b, k), and their dropout if there is any."""
        parts = inputs.targets.split(1, dim=1) if self.separate_passes else (inputs.targets,)
        return [
            (part, DropoutStream(inputs.seeds[index]) if self.dropout else None)
            for index, part in enumerate(parts)
        ]

    def loss(
        self, flat: FlatParameters, theta: Tensor, items: Tensor, embeds: Tensor, inputs: StepInputs
    ) -> Tensor:
        """The inner loss of a step.

        theta: (flat.size,); items: (n, d); embeds: (b, ζ, d), the soft embeddings of the users of `inputs`.
        Differentiable twice in all three.
        """
        histories = embeds[:, :-1]
        passes = self.passes(inputs)
        hidden = [flat.encode(theta, histories, targets - 1, dropout=dropout) for targets, dropout in passes]
        targets = torch.cat([targets for targets, _ in passes], dim=1)
        rows = embeds.gather(1, targets.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))
        outputs = torch.cat(hidden, dim=1).flatten(0, 1)
        return self.tables.item_cross_entropy(outputs, items, rows.flatten(0, 1)).mean()

    def run(
        self,
        state: AdamState,
        items: Tensor,
        mixture: ItemMixture,
        *,
        until: int,
        progress: Progress = silent,
    ) -> tuple[AdamState, Tensor]:
        """Take optimiser steps, overwriting the tensors of `state`, until `until` steps are taken in all.

        items: (n, d), the table where `state` holds none. Returns the last state and the loss of each step.
        """
        losses: list[Tensor] = []
        steps = range(state.step, until)
        for taken, inputs in enumerate(self._inputs_of(steps, items.device), start=1):
            evaluated = self.evaluate(
                self.flat_parameters, state.parameters, items, mixture, inputs, create_graph=False
            )
            state = adam_step_(state, evaluated.gradients, self.adam, inputs.size)
            losses.append(evaluated.loss)
            if progress is not silent:
                progress("fit", taken, len(steps), {"loss": float(evaluated.loss)})
        return state, torch.stack(losses) if losses else items.new_empty(0)

    def run_window(
        self,
        state: AdamState,
        items: Tensor,
        mixture: ItemMixture,
        *,
        until: int,
        kept_limit: int = KEPT_STATES_LIMIT,
    ) -> tuple[AdamState, Window]:
        """The same, keeping what `pull_back` needs: of each step the state before it and the graph of its gradients,
        or where those take more than `kept_limit` bytes, of every ⌈√steps⌉-th step the state.

        A graph holds activations of a batch of synthetic users and nothing of the size of the catalogue, so keeping
        it costs less than evaluating the step again; a state holds three item tables where they are trained.
        """
        # by the largest table of all processes, so that all keep the same steps
        size = sum(
            (p.numel() if i == 0 else self.tables.most_rows(p) * p.shape[1]) * p.element_size()
            for i, p in enumerate(state.parameters)
        )
        stride = stride_of(until - state.step, size, kept_limit)
        checkpoints: list[AdamState] = []
        while until - state.step > stride:
            checkpoints.append(state.clone())
            state, _ = self.run(state, items, mixture, until=state.step + stride)
        state, steps = self._keep_steps(state, items, mixture, until=until)
        return state, Window(steps=steps, checkpoints=checkpoints, items=items)

    def _keep_steps(
        self, state: AdamState, items: Tensor, mixture: ItemMixture, *, until: int
    ) -> tuple[AdamState, list[WindowStep]]:
        steps: list[WindowStep] = []
        for inputs in self._inputs_of(range(state.step, until), items.device):
            before = state.clone()
            evaluated = self.evaluate(
                self.flat_parameters, before.parameters, items, mixture, inputs, create_graph=True
            )
            steps.append(WindowStep(before, evaluated))
            state = adam_step_(state, evaluated.gradients, self.adam, inputs.size)
        return state, steps

    def evaluate(
        self,
        flat: FlatParameters,
        parameters: tuple[Tensor, ...],
        items: Tensor,
        mixture: ItemMixture,
        inputs: StepInputs,
        *,
        create_graph: bool,
        gradient: Tensor | None = None,
    ) -> Evaluation:
        """The loss of a step and its gradients; with `create_graph` those can be differentiated again.

        gradient: that of the parameters, where `gradient_is_enough` and it is known; the loss is left out then.
        """
        trained = len(parameters) > 1
        table = (parameters[1] if trained else items).detach()
        shape = flat.fused_shape(parameters[0])
        if shape is not None and self.takes_one_call:
            evaluated = self._in_one_call(
                shape, parameters[0].detach(), table, mixture, inputs, trained=trained, known=gradient
            )
        else:
            embeds = mixture.embed(inputs.users, table)
            leaves = [p.detach().requires_grad_() for p in parameters]
            evaluated = self._by_autograd(flat, leaves, table, embeds, inputs, create_graph=create_graph)
        if evaluated.to_embeds is not None:
            # in the place of the part that may be differentiated again: its values are needed no more, and it may be
            # large
            evaluated.gradients[1].add_(mixture.embed_transposed(inputs.users, evaluated.to_embeds))
        # what it holds may be as large as the table
        return evaluated if create_graph else evaluated._replace(second_order=None)

    @property
    def takes_one_call(self) -> bool:
        """Whether one pass of the encoder is all of a step, and all items are here."""
        return not self.separate_passes and self.tables is WHOLE

    def gradient_is_enough(self, flat: FlatParameters, parameters: tuple[Tensor, ...], items: Tensor) -> bool:
        """Whether `evaluate` takes the gradient of a step that was taken before, in place of taking it again."""
        return (
            self.takes_one_call
            and flat.fused_shape(parameters[0]) is not None
            and gradient_is_enough(parameters[0], items, self.targets(0), trained=len(parameters) > 1)
        )

    def _in_one_call(
        self,
        shape: EncoderShape,
        theta: Tensor,
        table: Tensor,
        mixture: Embeddings,
        inputs: StepInputs,
        *,
        trained: bool,
        known: Tensor | None,
    ) -> Evaluation:
        ((_, dropout),) = self.passes(inputs)
        embeds, users = mixture.whole, None
        if embeds is None:
            embeds = mixture.embed(inputs.users, table)
        else:
            users = inputs.users
        given = (theta, table, embeds, inputs.targets, shape)
        if known is None:
            made = inner_gradient(*given, dropout=dropout, trained=trained, users=users)
        else:
            made = known_gradient(known, *given, dropout=dropout, users=users)
        gradients = (made.parameters,) if made.items is None else (made.parameters, made.items)

        def second_order(cotangents: list[Tensor]) -> tuple[Tensor, ...]:
            to_theta, to_table, to_embeds = made.tangent(*cotangents)
            return (to_theta, to_embeds) if to_table is None else (to_theta, to_table, to_embeds)

        return Evaluation(made.loss, inputs, gradients, made.embeds, second_order)

    def _by_autograd(
        self,
        flat: FlatParameters,
        leaves: list[Tensor],
        table: Tensor,
        embeds: Tensor,
        inputs: StepInputs,
        *,
        create_graph: bool,
    ) -> Evaluation:
        trained = len(leaves) > 1
        if trained or create_graph:
            embeds.requires_grad_()
        loss = self.loss(flat, leaves[0], leaves[1] if trained else table, embeds, inputs)
        sources = [*leaves, embeds]
        first_order = torch.autograd.grad(loss, sources if trained else leaves, create_graph=create_graph)

        def second_order(cotangents: list[Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(first_order, sources, cotangents)

        gradients = tuple(g.detach() for g in first_order)
        to_embeds = gradients[-1] if trained else None
        return Evaluation(loss.detach(), inputs, gradients[: len(leaves)], to_embeds, second_order)

    def pull_back(
        self,
        window: Window,
        cotangents: tuple[Tensor, ...],
        mixture: ItemMixture,
        *,
        growth_limit: float | None = None,
    ) -> Tensor:
        """The gradient of the tensor that `mixture` was made from, pulled back through a window of steps.

        window: as `run_window` returns it, emptied on the way and told how many steps were pulled back; cotangents: of
        the parameters after the last step, overwritten.
        growth_limit: the window is cut short at the step before which the cotangent of the encoder's parameters has
        more than so many times the norm that it has after the last one. None: never.
        """
        adjoint = [(c, torch.zeros_like(c), torch.zeros_like(c)) for c in cotangents]
        theta = cotangents[0]
        limit = None if growth_limit is None else growth_limit * float(torch.linalg.vector_norm(theta))
        while window.steps:
            first = window.steps[0].state.step
            while window.steps:
                self.pull_back_step(window.steps.pop(), adjoint, mixture)
                window.pulled_back += 1
                if limit is not None and not float(torch.linalg.vector_norm(theta)) <= limit:
                    window.steps.clear()
                    window.checkpoints.clear()
            if window.checkpoints:
                state = window.checkpoints.pop()
                _, window.steps = self._keep_steps(state, window.items, mixture, until=first)
        return mixture.gradient()

    def pull_back_step(
        self, step: WindowStep, adjoint: list[tuple[Tensor, Tensor, Tensor]], mixture: Embeddings
    ) -> None:
        """Take the cotangents of parameters and moments from after a step to before it, overwriting them."""
        state, evaluated = step
        inputs, users = evaluated.inputs, evaluated.inputs.users
        to_gradients = [
            adam_adjoint_((p, m, v), gradient, cotangents, inputs.size, self.adam)
            for p, m, v, gradient, cotangents in zip(*state[:3], evaluated.gradients, adjoint, strict=True)
        ]
        if evaluated.to_embeds is not None:
            # the table's gradient has a part that came through X
            to_gradients.append(mixture.embed(users, to_gradients[1]))
            mixture.note(users, evaluated.to_embeds, to_gradients[1])
        assert evaluated.second_order is not None, "evaluated without create_graph"
        second_order = evaluated.second_order(to_gradients)
        mixture.note(users, second_order[-1], state.parameters[-1])
        for (to_parameter, _, _), more in zip(adjoint, second_order, strict=False):
            to_parameter.add_(more)
        if evaluated.to_embeds is not None:
            adjoint[1][0].add_(mixture.embed_transposed(users, second_order[-1]))
