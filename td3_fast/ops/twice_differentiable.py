"""Kernels of a function, of its gradient and of that one's gradient, as a function that autograd takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from td3_fast.ops.library import has_fused

Tensors = tuple[Tensor, ...]
Needed = frozenset[int]  # places of inputs; not a tuple, which PyTorch would take apart


def has_twice_differentiable(like: Tensor) -> bool:
    """Whether such kernels serve the device and dtype of `like`.

    Not where `torch.compile` traces, which does not take functions with a derivative of their own in forward mode.
    """
    return (
        like.device.type == "cpu"
        and has_fused("cpu")
        and like.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
    )


@dataclass(frozen=True, kw_only=True)
class TwiceDifferentiable:
    """A function of tensors, of which the first `differentiable` have derivatives, to one tensor.

    Differentiable twice by `torch.autograd` and by `torch.func`, in every mixture of modes but forward over forward;
    `torch.vmap` calls it for each element of a batch. A third order raises. The gradient's derivative in the inputs is
    a symmetric map, so the one kernel serves all mixtures.
    """

    name: str
    differentiable: int
    forward: Callable[..., Tensor]  # (*inputs)
    # (needed, upstream gradient, *inputs): a gradient for each differentiable input; needed: places of those in use
    backward: Callable[..., Tensors]
    # (needed, *directions of the gradients or None, upstream gradient, *inputs): the tangent of the function, and the
    # derivative of each gradient in those directions of the inputs
    double_backward: Callable[..., Tensors]

    def __call__(self, *inputs: Tensor) -> Tensor:
        devices = {str(x.device) for x in inputs}
        if len(devices) > 1:
            raise ValueError(
                f"{self.name}: expected all tensors on one device, got {', '.join(sorted(devices))}"
            )
        result: Tensor = _Forward.apply(self, *inputs)
        return result


class _OneByOne(torch.autograd.Function):
    @classmethod
    def vmap(cls, info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[Any, Any]:
        # of no element the results have the sizes of any
        calls = [
            cls.apply(*(_element(x, dim, i) for x, dim in zip(inputs, list(in_dims), strict=True)))
            for i in range(max(info.batch_size, 1))
        ]

        def stacked(parts: Sequence[Tensor]) -> Tensor:
            return torch.stack(list(parts))[: info.batch_size]

        if isinstance(calls[0], Tensor):
            return stacked(calls), 0
        return tuple(map(stacked, zip(*calls, strict=True))), (0,) * len(calls[0])


def _element(x: Any, dim: int | None, i: int) -> Any:
    if dim is None:
        return x
    shape = [size for at, size in enumerate(x.shape) if at != dim % x.dim()]
    return x.select(dim, i) if x.shape[dim] else x.new_zeros(shape)


class _Forward(_OneByOne):
    @staticmethod
    def forward(function: TwiceDifferentiable, *inputs: Tensor) -> Tensor:
        return function.forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        count = ctx.function.differentiable
        wanted = ctx.needs_input_grad[1 : 1 + count]
        inputs = ctx.saved_tensors
        gradients = _Backward.apply(ctx.function, _places(wanted), upstream, *inputs)
        return None, *_only(wanted, gradients), *[None] * (len(inputs) - count)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        # no upstream gradient has a part in how the result moves
        function, inputs = ctx.function, ctx.saved_tensors
        upstream = torch.zeros_like(function.forward(*inputs))
        moved = _DoubleBackward.apply(
            function, Needed(), *tangents[: function.differentiable], upstream, *inputs
        )
        return moved[0]


class _Backward(_OneByOne):
    @staticmethod
    def forward(function: TwiceDifferentiable, needed: Needed, upstream: Tensor, *inputs: Tensor) -> Tensors:
        return function.backward(needed, upstream, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.function, ctx.needed, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        count = ctx.function.differentiable
        wanted = ctx.needs_input_grad[2 : 3 + count]
        upstream, *inputs = ctx.saved_tensors
        gradients = _DoubleBackward.apply(ctx.function, _places(wanted[1:]), *directions, upstream, *inputs)
        return None, None, *_only(wanted, gradients), *[None] * (len(inputs) - count)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, of_upstream: Tensor | None, *tangents: Any) -> Tensors:
        # the gradients are linear in the upstream one, and their derivative in the inputs is symmetric
        function, needed = ctx.function, ctx.needed
        upstream, *inputs = ctx.saved_tensors
        directions = tangents[: function.differentiable]
        moved = _DoubleBackward.apply(function, needed, *directions, upstream, *inputs)[1:]
        if of_upstream is None:
            return tuple(moved)
        with_upstream = _Backward.apply(function, needed, of_upstream, *inputs)
        return tuple(a + b for a, b in zip(moved, with_upstream, strict=True))


class _DoubleBackward(_OneByOne):
    @staticmethod
    def forward(function: TwiceDifferentiable, needed: Needed, *inputs: Tensor | None) -> Tensors:
        return function.double_backward(needed, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.function, ctx.needed, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, of_tangent: Tensor | None, *of_gradients: Tensor | None) -> tuple[Any, ...]:
        """Of the function's tangent, which is linear in the directions; of the others it would be a third order."""
        function, count = ctx.function, ctx.function.differentiable
        if any(gradient is not None for gradient in of_gradients):
            raise _third_order(function)
        directions, (_, *inputs) = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        towards = ctx.needs_input_grad[2 : 2 + count]
        along = ctx.needs_input_grad[3 + count : 3 + 2 * count]
        linear: list[Tensor | None] = [None] * count
        moved: list[Tensor | None] = [None] * count
        if any(towards):
            linear = _only(towards, _Backward.apply(function, _places(towards), of_tangent, *inputs))
        if any(along):
            gradients = _DoubleBackward.apply(function, _places(along), *directions, of_tangent, *inputs)[1:]
            moved = _only(along, gradients)
        return None, None, *linear, None, *moved, *[None] * (len(inputs) - count)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(
            f"{ctx.function.name} has no forward mode over forward mode and no third order: its reference has both"
        )


def _third_order(function: TwiceDifferentiable) -> NotImplementedError:
    return NotImplementedError(f"{function.name} is differentiable twice, not three times: its reference is")


def _places(wanted: Sequence[bool]) -> Needed:
    return Needed(place for place, asked in enumerate(wanted) if asked)


def _only(wanted: Sequence[bool], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    return [gradient if asked else None for gradient, asked in zip(gradients, wanted, strict=True)]
