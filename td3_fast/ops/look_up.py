"""Rows of an item table, with a gradient whose rows are added in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from td3_fast.ops.library import has_fused, register_fake


def look_up(items: Tensor, ids: Tensor) -> Tensor:
    """The rows of an item table (n, d) at ids (...) int64: (..., d), in float32 where the table is kept in 16 bits.

    Differentiable to any order in the table.

    Raises:
        ValueError: ids are not int64.
        IndexError: an id is no row of the table.
    """
    if ids.dtype != torch.int64:
        raise ValueError(f"item ids must be int64, got {ids.dtype}: convert them with .long()")
    if items.requires_grad and items.device.type == "cpu":
        rows = _LookUp.apply(items, ids) if _has_kernel(items) else _gathered(items, ids)
    else:
        rows = F.embedding(ids, items)
    return rows.to(torch.promote_types(items.dtype, torch.float32))


def _has_kernel(items: Tensor) -> bool:
    # torch.compile does not take functions with a derivative of their own in forward mode
    return (
        has_fused("cpu")
        and items.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
    )


def _gathered(items: Tensor, ids: Tensor) -> Tensor:
    # the reference; F.embedding's gradient takes twice the time of this one's
    index = ids.reshape(-1, 1).expand(-1, items.shape[1])
    return items.gather(0, index).view(*ids.shape, items.shape[1])


# What torch.func and torch.vmap ask for is said in terms of the reference.


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(items: Tensor, ids: Tensor) -> Tensor:
        return F.embedding(ids, items)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        items, ids = inputs
        ctx.save_for_backward(ids)
        ctx.save_for_forward(ids)
        ctx.num_ids = len(items)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        return _SumById.apply(grad, ids, ctx.num_ids), None

    @staticmethod
    def jvp(ctx: Any, items: Tensor, ids: None) -> Tensor:
        return _gathered(items, ctx.saved_tensors[0])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None], items: Tensor, ids: Tensor
    ) -> tuple[Tensor, int]:
        return torch.vmap(_gathered, in_dims=in_dims)(items, ids), 0


class _SumById(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, ids: Tensor, num_ids: int) -> Tensor:
        return torch.ops.td3_fast.sum_rows_by_id(_as_matrix(rows, ids), ids.flatten(), num_ids)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        _, ids, ctx.num_ids = inputs
        ctx.save_for_backward(ids)
        ctx.save_for_forward(ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        return look_up(grad, ids), None, None

    @staticmethod
    def jvp(ctx: Any, rows: Tensor, ids: None, num_ids: None) -> Tensor:
        return _summed(rows, ctx.saved_tensors[0], ctx.num_ids)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, int | None, None], rows: Tensor, ids: Tensor, num_ids: int
    ) -> tuple[Tensor, int]:
        summed = torch.vmap(lambda r, i: _summed(r, i, num_ids), in_dims=in_dims[:2])
        return summed(rows, ids), 0


def _summed(rows: Tensor, ids: Tensor, num_ids: int) -> Tensor:
    sums = rows.new_zeros(num_ids, rows.shape[-1])
    return sums.index_add(0, ids.flatten(), _as_matrix(rows, ids))


def _as_matrix(rows: Tensor, ids: Tensor) -> Tensor:
    return rows.reshape(ids.numel(), rows.shape[-1])


@register_fake("td3_fast::sum_rows_by_id")
def _(rows: Tensor, ids: Tensor, num_ids: int) -> Tensor:
    return rows.new_empty(num_ids, rows.shape[1])
