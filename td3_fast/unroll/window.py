"""What is kept of the differentiated steps of an inner loop until their adjoint is taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from td3_fast.unroll.adam import AdamState

KEPT_STATES_LIMIT = 2**30  # bytes
TENSORS_PER_STEP = 4  # as large as the parameters: they, two moments, and the gradient


class StepInputs(NamedTuple):
    """What differs from step to step of an inner loop."""

    users: Tensor  # (b,) int64, the synthetic users
    targets: Tensor  # (b, k) int64, their target positions, the last one first
    seeds: Tensor  # int64, of the dropout of each encoder pass; empty without dropout
    size: float | Tensor  # `step_size` of the optimiser

    def to(self, device: torch.device) -> StepInputs:
        """The same on a device."""
        if device.type == "cpu":
            return self
        users, targets, seeds = (tensor.to(device, non_blocking=True) for tensor in self[:3])
        return StepInputs(users, targets, seeds, self.size)


class Evaluation(NamedTuple):
    """The loss of one step and its derivatives."""

    loss: Tensor  # ()
    inputs: StepInputs
    gradients: tuple[Tensor, ...]  # of the state's parameters
    to_embeds: Tensor | None  # the gradient with respect to X, where the item table is trained
    # From what the gradients with X held fixed, and then that of X where there is one, have as cotangents, to the
    # cotangents of the state's parameters and of X. None where that was not asked for.
    second_order: Callable[[list[Tensor]], tuple[Tensor, ...]] | None


class WindowStep(NamedTuple):
    """What the adjoint of a step needs."""

    state: AdamState
    evaluation: Evaluation


@dataclass(kw_only=True)
class Window:
    """A run of steps, to be pulled back from the last one to the first.

    The last `steps` are whole. Of what lies before them one state in a few is kept, in `checkpoints`: from
    each of them the steps up to what is already pulled back are taken again, with the same bits.
    """

    steps: list[WindowStep]
    checkpoints: list[AdamState]
    items: Tensor  # (n, d), the table where the states hold none
    pulled_back: int = 0  # steps, so far

    @property
    def loss(self) -> Tensor:
        """Of the last step."""
        return self.steps[-1].evaluation.loss


def stride_of(steps: int, parameters: int, limit: int = KEPT_STATES_LIMIT) -> int:
    """How many steps of a window are kept at once, at least 1, for so many bytes of parameters: all of them, or
    ⌈√steps⌉ where all their states and gradients would take more than `limit` bytes."""
    size = steps * TENSORS_PER_STEP * parameters
    return max(steps if size <= limit else math.ceil(math.sqrt(steps)), 1)
