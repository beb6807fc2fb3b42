"""Collectives that autograd sees through, to any order.

Two kinds of tensors take part. A *common* tensor is the same in every process, and so is its gradient, the whole
derivative of the one loss that all compute. An *own* tensor is another one in each process, and so is its gradient.
Under this convention the adjoint of `gather` (own to common) is `select` (common to own) and the reverse. So the
adjoint of a sum over processes is a copy, and that of a copy is a sum, an all-reduce; no factor of the number of
processes appears at any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from td3_fast.parallel.group import Group


def gather(tensor: Tensor, group: Group) -> Tensor:
    """Every process's own `tensor`, in the order of their ranks, as a common one: (size, *shape)."""
    gathered: Tensor = _Gather.apply(tensor, group)
    return gathered


def select(tensor: Tensor, group: Group) -> Tensor:
    """The part of a common tensor (size, *shape) that has this process's number, as its own."""
    selected: Tensor = _Select.apply(tensor, group)
    return selected


def total(tensor: Tensor, group: Group) -> Tensor:
    """The sum over all processes, in the order of their ranks, of their own `tensor`, as a common one."""
    return tensor if group.size == 1 else gather(tensor, group).sum(0)


def copied(tensor: Tensor, group: Group) -> Tensor:
    """A common tensor for use with what is a process's own: gradients that come back are summed."""
    return tensor if group.size == 1 else select(tensor.expand(group.size, *tensor.shape), group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.stack(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return select(grads[0], ctx.group), None


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return tensor[group.rank].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather(grads[0], ctx.group), None
