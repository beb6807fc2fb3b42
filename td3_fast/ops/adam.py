"""Adam in one pass over the elements; `unroll.adam` is its reference and says what it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from td3_fast.ops.library import has_fused, register_fake


def has_one_pass_adam(*tensors: Tensor, size: float | Tensor) -> bool:
    """Whether the kernels take these tensors, which are alike in shape, and this size of a step.

    One in a tensor is for a GPU, which reads it when the step is taken.
    """
    device, dtype = tensors[0].device, tensors[0].dtype
    if isinstance(size, Tensor) and (device.type != "cuda" or size.device != device or size.dtype != dtype):
        return False
    if device.type not in ("cpu", "cuda") or dtype not in (torch.float32, torch.float64):
        return False
    # no generator: this is asked in every step of an inner loop
    for tensor in tensors:
        if tensor.dtype is not dtype or tensor.device != device or not tensor.is_contiguous():
            return False
    return has_fused(device)


def one_pass_adam_step_(
    parameter: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    gradient: Tensor,
    rates: list[float],
    size: float | Tensor,
) -> None:
    """A step, overwriting all but the gradient.

    rates: beta1, beta2, eps, weight_decay; size: what m / (sqrt(v) + eps) is multiplied by, a tensor () being of
    the dtype and on the device of the parameter.
    """
    torch.ops.td3_fast.adam_step_(parameter, first_moment, second_moment, gradient, *_sized(rates, size))


def one_pass_adam_adjoint_(
    parameter: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    gradient: Tensor,
    to_parameter: Tensor,
    to_first_moment: Tensor,
    to_second_moment: Tensor,
    rates: list[float],
    size: float | Tensor,
) -> Tensor:
    """The cotangent of the gradient, from those of the three after the step, which become those before it."""
    to_gradient: Tensor = torch.ops.td3_fast.adam_adjoint_(
        parameter,
        first_moment,
        second_moment,
        gradient,
        to_parameter,
        to_first_moment,
        to_second_moment,
        *_sized(rates, size),
    )
    return to_gradient


def _sized(rates: list[float], size: float | Tensor) -> tuple[list[float], Tensor | None]:
    return (rates, size) if isinstance(size, Tensor) else ([*rates, size], None)


@register_fake("td3_fast::adam_step_")
def _(
    parameter: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    gradient: Tensor,
    rates: list[float],
    size: Tensor | None = None,
) -> None:
    return None


@register_fake("td3_fast::adam_adjoint_")
def _(
    parameter: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    gradient: Tensor,
    to_parameter: Tensor,
    to_first_moment: Tensor,
    to_second_moment: Tensor,
    rates: list[float],
    size: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(gradient)
