"""Several steps of an inner loop in one call on the CPU, and the way back through them.

`unroll.InnerLoop` is their reference, step by step, with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from td3_fast.ops.library import has_fused
from td3_fast.ops.transformer_encoder import EncoderShape, packed_sizes


class StepTensors(NamedTuple):
    """What several steps take beside the state, a row of each for every step where nothing else is said."""

    # of all synthetic users: their soft embeddings (μ, ζ, d), or where the table is trained the probabilities (μ, ζ, n)
    # whose products with it these are
    source: Tensor
    items: Tensor  # (n, d), the table where it is not trained
    users: Tensor  # (steps, b) int64
    targets: Tensor  # (steps, b, k) int64
    seeds: Tensor  # (steps, 1) int64, of the dropout, or (steps, 0) for none
    step_sizes: list[float]  # of the optimiser
    rates: list[float]  # beta1, beta2, eps, weight_decay
    shape: EncoderShape

    def part(self, first: int, end: int) -> StepTensors:
        """Of the steps first, ..., end - 1."""
        users, targets, seeds = (tensor[first:end] for tensor in (self.users, self.targets, self.seeds))
        return self._replace(users=users, targets=targets, seeds=seeds, step_sizes=self.step_sizes[first:end])


class KeptSteps(NamedTuple):
    """Of steps that were taken what the way back needs, one step after the other."""

    states: list[
        Tensor
    ]  # before each step: a parameter and its moments, or the encoder's and then the table's
    gradients: list[Tensor]  # of the parameters of each
    to_embeds: list[Tensor]  # (b, ζ, d), the gradient of the soft embeddings, where the table is trained
    saved: list[Tensor]


def has_inner_steps(device: torch.device) -> bool:
    """Whether these are there for tensors of a device."""
    return device.type == "cpu" and has_fused(device)


def inner_steps_(state: Sequence[Tensor], steps: StepTensors) -> Tensor:
    """Take steps, overwriting a state: parameters and their two moments, or the encoder's (size,) and then the trained
    table's (n, d), contiguous float32 or float64. Returns the losses (steps,).

    Raises:
        ValueError: sizes or dtypes do not agree.
        IndexError: a target is not one of the positions, or the first, or a user is none of them.
    """
    shape, inputs = steps.shape, steps[:-1]
    losses: Tensor = torch.ops.td3_fast.inner_steps_(state, *inputs, packed_sizes(shape))
    return losses


def kept_inner_steps(state: Sequence[Tensor], steps: StepTensors) -> tuple[Tensor, list[Tensor], KeptSteps]:
    """The same, leaving the state as it is: losses, the state after the last step, and what `pull_back_inner_steps_`
    needs."""
    shape, inputs = steps.shape, steps[:-1]
    losses, states, gradients, to_embeds, saved = torch.ops.td3_fast.kept_inner_steps(
        state, *inputs, packed_sizes(shape)
    )
    states = [*state, *states]
    before, after = states[: -len(state)], states[-len(state) :]
    return losses, after, KeptSteps(before, gradients, to_embeds, saved)


def pull_back_inner_steps_(
    adjoint: Sequence[Tensor], kept: KeptSteps, steps: StepTensors, limit: float | None = None
) -> tuple[list[Tensor], list[Tensor], bool]:
    """Take the cotangents of a state, in its order, from after the last of steps to before the first, overwriting them.

    Or not so far: until the cotangent of the encoder's parameters is longer than `limit`.

    Returns of each step, the last one first, the cotangent of the soft embeddings (b, ζ, d) that the derivative of the
    gradient has, and, where the table is trained, the one (n, d) with which the soft embeddings have `kept.to_embeds`
    as a cotangent; and whether the limit was passed.
    """
    source, items, users, targets, _, step_sizes, rates, shape = steps
    cotangents, tables, beyond = torch.ops.td3_fast.pull_back_inner_steps_(
        adjoint, *kept, source, items, users, targets, step_sizes, rates, packed_sizes(shape), limit
    )
    return cotangents, tables, beyond
