"""Adam in one pass over the elements, on the CPU; `unroll.adam` is its reference and says what it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from td3_fast.ops.library import has_fused, register_fake


def has_one_pass_adam(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors, which are alike in shape."""
    first = tensors[0]
    return (
        first.device.type == "cpu"
        and first.dtype in (torch.float32, torch.float64)
        and has_fused("cpu")
        and all(t.dtype == first.dtype and t.is_contiguous() for t in tensors)
    )


def one_pass_adam_step_(
    parameter: Tensor, first_moment: Tensor, second_moment: Tensor, gradient: Tensor, rates: list[float]
) -> None:
    """A step, overwriting all but the gradient.

    rates: beta1, beta2, eps, weight_decay, and what m / (sqrt(v) + eps) is multiplied by.
    """
    torch.ops.td3_fast.adam_step_(parameter, first_moment, second_moment, gradient, rates)


def one_pass_adam_adjoint_(
    parameter: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    gradient: Tensor,
    to_parameter: Tensor,
    to_first_moment: Tensor,
    to_second_moment: Tensor,
    rates: list[float],
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
        rates,
    )
    return to_gradient


@register_fake("td3_fast::adam_step_")
def _(
    parameter: Tensor, first_moment: Tensor, second_moment: Tensor, gradient: Tensor, rates: list[float]
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
) -> Tensor:
    return torch.empty_like(gradient)
