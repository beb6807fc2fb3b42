"""Several steps of an inner loop in one call on the CPU, and the way back through them.

`unroll.InnerLoop` is their reference, step by step, with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from td3_fast.ops.dropout import WORDS_PER_BLOCK
from td3_fast.ops.library import has_fused, register_fake
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

    states: list[Tensor]  # before each: a parameter and its moments, or the encoder's and then the table's
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


def _words(sizes: list[int], batch: int, length: int, asked: int, width: int) -> int:
    """The random words of a step, whole blocks of each site that drops."""
    _, _, heads, layers, of_hidden, of_attention, _ = sizes
    words = 0
    for site in range(1 + 3 * layers):
        attends = site % 3 == 1
        rows = length if (site + 2) // 3 < layers else asked
        count = batch * rows * (heads * length if attends else width)
        if of_attention if attends else of_hidden:
            words += count + -count % WORDS_PER_BLOCK
    return words


@register_fake("td3_fast::inner_steps_")
def _(
    state: Sequence[Tensor],
    source: Tensor,
    items: Tensor,
    users: Tensor,
    targets: Tensor,
    seeds: Tensor,
    step_sizes: Sequence[float],
    rates: Sequence[float],
    sizes: list[int],
) -> Tensor:
    return state[0].new_empty(len(step_sizes))


@register_fake("td3_fast::kept_inner_steps")
def _(
    state: Sequence[Tensor],
    source: Tensor,
    items: Tensor,
    users: Tensor,
    targets: Tensor,
    seeds: Tensor,
    step_sizes: Sequence[float],
    rates: Sequence[float],
    sizes: list[int],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    count, trained = len(step_sizes), len(state) > 3
    (batch, asked), width = targets.shape[1:], items.shape[1]
    embeds = source.new_empty(batch, source.shape[1], width)
    words = _words(sizes, batch, source.shape[1] - 1, asked, width) if seeds.numel() else 0
    states, gradients, to_embeds, saved = [], [], [], []
    for _step in range(count):
        hidden = state[0].new_empty(batch * asked, width)
        table = state[3] if trained else items
        states += [torch.empty_like(tensor) for tensor in state]
        gradients += [torch.empty_like(tensor) for tensor in state[::3]]
        saved += [hidden, *torch.ops.td3_fast.item_logsumexp_forward(hidden, table, True, trained)]
        saved.append(users.new_empty(words, dtype=torch.int16))
        if trained:
            to_embeds.append(torch.empty_like(embeds))
            saved.append(torch.empty_like(embeds))
    return state[0].new_empty(count), states, gradients, to_embeds, saved


@register_fake("td3_fast::pull_back_inner_steps_")
def _(
    adjoint: Sequence[Tensor],
    states: Sequence[Tensor],
    gradients: Sequence[Tensor],
    to_embeds: Sequence[Tensor],
    saved: Sequence[Tensor],
    source: Tensor,
    items: Tensor,
    users: Tensor,
    targets: Tensor,
    step_sizes: Sequence[float],
    rates: Sequence[float],
    sizes: list[int],
    limit: float | None = None,
) -> tuple[list[Tensor], list[Tensor], bool]:
    # as many as there are where no limit is passed, which a tensor without numbers does not say
    count, trained = len(step_sizes), len(adjoint) > 3
    shape = (users.shape[1], source.shape[1], items.shape[1])
    cotangents = [source.new_empty(shape) for _ in range(count)]
    return cotangents, [torch.empty_like(adjoint[3]) for _ in range(count if trained else 0)], False
