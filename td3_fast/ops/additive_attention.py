"""Attention whose weights are energies of sigmoids and are not normalised, with kernels of its derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from td3_fast.ops.library import register_fake
from td3_fast.ops.precision import autocast_off, widened
from td3_fast.ops.twice_differentiable import TwiceDifferentiable, has_twice_differentiable


def additive_attention(
    query: Tensor,  # (batch, k, h)
    states: Tensor,  # (batch, length, h)
    key_weight: Tensor,  # (h, h)
    energy: Tensor,  # (h,)
    lengths: Tensor,  # (batch, k) int64
) -> Tensor:
    """The local encoder of NARM (Li et al., CIKM 2017): what each query makes of the states that it sees.

        c_i = Σ_j (v · sigmoid(q_i + B s_j)) s_j    over the states j < lengths_i

    On the CPU, in float32 and float64, sequences are the lanes of vectors, and nothing is made of size length × h but
    the gradient of the states: twice differentiable in all but the lengths, under `torch.func` and `torch.vmap` too; a
    third order raises. Elsewhere, and under `torch.compile`, it is `additive_attention_reference`.

    Args:
        query: q, (batch, k, h).
        states: s, (batch, length, h).
        key_weight: B, (h, h).
        energy: v, (h,).
        lengths: (batch, k) int64, how many states a query sees.

    Returns:
        (batch, k, h).

    Raises:
        ValueError: by the kernel, where sizes, dtypes or devices do not agree.
        IndexError: by the kernel, where a length is negative or more than there are states.
    """
    query, states = widened(query), widened(states)
    if not has_twice_differentiable(states):
        with autocast_off(states):
            return additive_attention_reference(query, states, key_weight, energy, lengths)
    return _fused(query, states, key_weight, energy, lengths)


def additive_attention_reference(
    query: Tensor, states: Tensor, key_weight: Tensor, energy: Tensor, lengths: Tensor
) -> Tensor:
    """`additive_attention` with a number for each query, state and feature; differentiable to any order."""
    matched = torch.sigmoid(
        query.unsqueeze(2) + (states @ key_weight.T).unsqueeze(1)
    )  # (batch, k, length, h)
    unseen = torch.arange(states.shape[1], device=states.device) >= lengths.unsqueeze(-1)
    return torch.bmm((matched @ energy).masked_fill(unseen, 0.0), states)


_fused = TwiceDifferentiable(
    name="additive_attention",
    differentiable=4,
    forward=lambda *inputs: torch.ops.td3_fast.additive_attention_forward(*inputs),
    backward=lambda needed, *inputs: torch.ops.td3_fast.additive_attention_backward(*inputs),
    double_backward=lambda needed, *inputs: torch.ops.td3_fast.additive_attention_double_backward(*inputs),
)


@register_fake("td3_fast::additive_attention_forward")
def _(query: Tensor, states: Tensor, key_weight: Tensor, energy: Tensor, lengths: Tensor) -> Tensor:
    return query.new_empty(query.shape)


@register_fake("td3_fast::additive_attention_backward")
def _(
    grad_local: Tensor, query: Tensor, states: Tensor, key_weight: Tensor, energy: Tensor, lengths: Tensor
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (query, states, key_weight, energy))


@register_fake("td3_fast::additive_attention_double_backward")
def _(
    grad_grad_query: Tensor | None,
    grad_grad_states: Tensor | None,
    grad_grad_key_weight: Tensor | None,
    grad_grad_energy: Tensor | None,
    grad_local: Tensor,
    query: Tensor,
    states: Tensor,
    key_weight: Tensor,
    energy: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (grad_local, query, states, key_weight, energy))
