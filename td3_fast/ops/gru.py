"""A gated recurrent layer whose derivatives, of both orders, are passes of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from td3_fast.ops.library import has_fused, register_fake


def gru(
    inputs: Tensor,  # (batch, length, d)
    input_weight: Tensor,  # (3 h, d)
    state_weight: Tensor,  # (3 h, h)
    lengths: Tensor,  # (batch,) int64
) -> Tensor:
    """The states of a layer of gated recurrent units (Cho et al., EMNLP 2014) without biases, after each input.

        r = sigmoid(W_r x + U_r h)    z = sigmoid(W_z x + U_z h)    n = tanh(W_n x + r ∘ U_n h)    h ← n + z ∘ (h − n)

    The state is 0 at first. Its reference is `gru_reference`, which also serves where no kernel does: on a GPU. On the
    CPU sequences are the lanes of vectors, and nothing is computed beyond their lengths; only inputs are kept between
    orders. Twice differentiable in inputs and weights, under `torch.func` and `torch.vmap` too; a third order raises.

    Args:
        inputs: (batch, length, d), float32 or float64.
        input_weight: W, (3 h, d), in blocks of rows for r, z and n, as in `torch.nn.GRU`.
        state_weight: U, (3 h, h), likewise.
        lengths: (batch,) int64, how many inputs of a sequence count.

    Returns:
        (batch, length, h), zero beyond the length of a sequence.

    Raises:
        ValueError: sizes or dtypes do not agree.
        IndexError: a length is negative or more than there are inputs; not on a GPU.
    """
    if not _has_kernel(inputs):
        return gru_reference(inputs, input_weight, state_weight, lengths)
    states: Tensor = _Gru.apply(inputs, input_weight, state_weight, lengths)
    return states


def gru_reference(inputs: Tensor, input_weight: Tensor, state_weight: Tensor, lengths: Tensor) -> Tensor:
    """`gru` as a loop over time, differentiable to any order."""
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
    return torch.stack(states, dim=1).masked_fill(beyond.unsqueeze(-1), 0.0)


def _has_kernel(inputs: Tensor) -> bool:
    return inputs.device.type == "cpu" and has_fused("cpu") and inputs.dtype in (torch.float32, torch.float64)


class _OneByOne(torch.autograd.Function):
    """A function that `torch.vmap` calls for each element of a batch."""

    @classmethod
    def vmap(cls, info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[Any, Any]:
        calls = [
            cls.apply(
                *(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), (0,) * len(calls[0])


class _Gru(_OneByOne):
    @staticmethod
    def forward(inputs: Tensor, input_weight: Tensor, state_weight: Tensor, lengths: Tensor) -> Tensor:
        return torch.ops.td3_fast.gru_forward(inputs, input_weight, state_weight, lengths)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        grads = _GruBackward.apply(grad_states, *ctx.saved_tensors, needed[0])
        return *(grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        # no upstream gradient has a part in how the states move
        inputs, _, state_weight, _ = ctx.saved_tensors
        upstream = inputs.new_zeros(*inputs.shape[:2], state_weight.shape[1])
        moved: Tensor = _GruDoubleBackward.apply(*tangents[:3], upstream, *ctx.saved_tensors, False)[0]
        return moved


class _GruBackward(_OneByOne):
    @staticmethod
    def forward(
        grad_states: Tensor,
        inputs: Tensor,
        input_weight: Tensor,
        state_weight: Tensor,
        lengths: Tensor,
        needs_inputs: bool,
    ) -> tuple[Tensor, ...]:
        return torch.ops.td3_fast.gru_backward(
            grad_states, inputs, input_weight, state_weight, lengths, needs_inputs
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.needs_inputs = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:4]
        grads = _GruDoubleBackward.apply(*grad_grads, *ctx.saved_tensors, needed[1])
        return *(grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)), None, None

    @staticmethod
    def jvp(ctx: Any, grad_states: Tensor | None, *tangents: Any) -> tuple[Tensor, ...]:
        # The gradients are linear in the upstream one, and their derivative in the others is symmetric.
        upstream, *others = ctx.saved_tensors
        moved = _GruDoubleBackward.apply(*tangents[:3], upstream, *others, ctx.needs_inputs)[1:]
        if grad_states is None:
            return tuple(moved)
        with_upstream = _GruBackward.apply(grad_states, *others, ctx.needs_inputs)
        return tuple(a + b for a, b in zip(moved, with_upstream, strict=True))


class _GruDoubleBackward(_OneByOne):
    @staticmethod
    def forward(
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
        return torch.ops.td3_fast.gru_double_backward(
            grad_grad_inputs,
            grad_grad_input_weight,
            grad_grad_state_weight,
            grad_states,
            inputs,
            input_weight,
            state_weight,
            lengths,
            needs_inputs,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            "gru is differentiable twice, not three times: `gru_reference` is to any order"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(
            "gru is differentiable twice, not three times: `gru_reference` is to any order"
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
