"""A gated recurrent layer whose derivatives, of both orders, are passes of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from td3_fast.ops.library import register_fake
from td3_fast.ops.precision import autocast_off, widened
from td3_fast.ops.twice_differentiable import TwiceDifferentiable, has_twice_differentiable


def gru(
    inputs: Tensor,  # (batch, length, d)
    input_weight: Tensor,  # (3 h, d)
    state_weight: Tensor,  # (3 h, h)
    lengths: Tensor,  # (batch,) int64
) -> Tensor:
    """The states of a layer of gated recurrent units (Cho et al., EMNLP 2014) without biases, after each input.

        r = sigmoid(W_r x + U_r h)    z = sigmoid(W_z x + U_z h)    n = tanh(W_n x + r ∘ U_n h)    h ← n + z ∘ (h − n)

    The state is 0 at first. On the CPU, in float32 and float64, sequences are the lanes of vectors, nothing is computed
    beyond their lengths, and only inputs are kept between orders: twice differentiable in inputs and weights, under
    `torch.func` and `torch.vmap` too; a third order raises. Elsewhere, and under `torch.compile`, it is
    `gru_reference`.

    Args:
        inputs: (batch, length, d).
        input_weight: W, (3 h, d), in blocks of rows for r, z and n, as in `torch.nn.GRU`.
        state_weight: U, (3 h, h), likewise.
        lengths: (batch,) int64, how many inputs of a sequence count.

    Returns:
        (batch, length, h), zero beyond the length of a sequence.

    Raises:
        ValueError: by the kernel, where sizes, dtypes or devices do not agree.
        IndexError: by the kernel, where a length is negative or more than there are inputs.
    """
    inputs = widened(inputs)
    if not has_twice_differentiable(inputs):
        with autocast_off(inputs):
            return gru_reference(inputs, input_weight, state_weight, lengths)
    return _fused(inputs, input_weight, state_weight, lengths)


def gru_reference(inputs: Tensor, input_weight: Tensor, state_weight: Tensor, lengths: Tensor) -> Tensor:
    """`gru` as a loop over time, differentiable to any order on every device.

    cuDNN's recurrence has no second order, and PyTorch's own on the CPU takes as long as this loop.
    """
    by_time = inputs.transpose(0, 1)
    # one tensor a gate and nothing cut out inside the loop, whose backward pass would fill in the rest with zeros
    to_reset, to_update, to_new = ((by_time @ weight.T).unbind(0) for weight in input_weight.chunk(3))
    reset_weight, update_weight, new_weight = (weight.T for weight in state_weight.chunk(3))
    state = inputs.new_zeros(len(inputs), len(new_weight))
    states = []
    for x_reset, x_update, x_new in zip(to_reset, to_update, to_new, strict=True):
        reset = torch.sigmoid(torch.addmm(x_reset, state, reset_weight))
        update = torch.sigmoid(torch.addmm(x_update, state, update_weight))
        new = torch.tanh(torch.addcmul(x_new, reset, state @ new_weight))
        state = torch.lerp(new, state, update)
        states.append(state)
    beyond = torch.arange(inputs.shape[1], device=inputs.device) >= lengths.unsqueeze(1)
    if not states:
        return inputs.new_zeros(len(inputs), 0, len(new_weight))
    return torch.stack(states, dim=1).masked_fill(beyond.unsqueeze(-1), 0.0)


_fused = TwiceDifferentiable(
    name="gru",
    differentiable=3,
    forward=lambda *inputs: torch.ops.td3_fast.gru_forward(*inputs),
    backward=lambda needed, *inputs: torch.ops.td3_fast.gru_backward(*inputs, 0 in needed),
    double_backward=lambda needed, *inputs: torch.ops.td3_fast.gru_double_backward(*inputs, 0 in needed),
)


@register_fake("td3_fast::gru_forward")
def _(inputs: Tensor, input_weight: Tensor, state_weight: Tensor, lengths: Tensor) -> Tensor:
    return inputs.new_empty(*inputs.shape[:2], state_weight.shape[1])


@register_fake("td3_fast::gru_backward")
def _(
    grad_states: Tensor,
    inputs: Tensor,
    input_weight: Tensor,
    state_weight: Tensor,
    lengths: Tensor,
    needs_inputs: bool,
) -> tuple[Tensor, ...]:
    grad_inputs = inputs.new_empty(inputs.shape if needs_inputs else 0)
    return grad_inputs, torch.empty_like(input_weight), torch.empty_like(state_weight)


@register_fake("td3_fast::gru_double_backward")
def _(
    grad_grad_inputs: Tensor | None,
    grad_grad_input_weight: Tensor | None,
    grad_grad_state_weight: Tensor | None,
    grad_states: Tensor,
    inputs: Tensor,
    input_weight: Tensor,
    state_weight: Tensor,
    lengths: Tensor,
    needs_inputs: bool,
) -> tuple[Tensor, ...]:
    grad_inputs = inputs.new_empty(inputs.shape if needs_inputs else 0)
    made = torch.empty_like(input_weight), torch.empty_like(state_weight)
    return grad_states.new_empty(grad_states.shape), grad_inputs, *made
