"""Probabilities that are kept, and their products with item tables much narrower than the catalogue is long."""

from collections.abc import Sequence

import torch
from torch import Tensor

from td3_fast.ops.library import has_fused, register_fake


def item_probabilities(queries: Tensor, keys: Tensor) -> Tensor:
    """``softmax(queries @ keys.T)``: (rows, rank), (n, rank) -> (rows, n). Not differentiable."""
    if _fused(queries, keys):
        probabilities: Tensor = torch.ops.td3_fast.item_probabilities(queries, keys)
        return probabilities
    return torch.softmax(queries @ keys.T, dim=-1)


def mix_items(probabilities: Tensor, items: Tensor) -> Tensor:
    """``probabilities @ items``: (rows, n), (n, d) -> (rows, d). Not differentiable.

    General matrix products run at half their rate or less where d is a few dozen; the CPU kernel reads the
    probabilities once, in place, in any slice of rows.
    """
    if _fused(probabilities, items):
        mixed: Tensor = torch.ops.td3_fast.mix_items(probabilities, items)
        return mixed
    return probabilities @ items


def mix_items_transposed(probabilities: Tensor, cotangent: Tensor) -> Tensor:
    """``probabilities.T @ cotangent``: (rows, n), (rows, d) -> (n, d), as `mix_items`."""
    if _fused(probabilities, cotangent):
        mixed: Tensor = torch.ops.td3_fast.mix_items_transposed(probabilities, cotangent)
        return mixed
    return probabilities.T @ cotangent


def weigh_products(
    probabilities: Tensor,
    cotangents: Sequence[Tensor],
    tables: Sequence[Tensor],
    keys: Tensor,
    queries: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of ``W = probabilities * sum(c @ t.T)`` over pairs of a cotangent c (rows, d) and a table t (n, d), at least
    one pair, without (rows, n) numbers in memory on the CPU. Not differentiable.

    Where each ``c`` is the cotangent of ``mix_items(probabilities, t)``, and the probabilities are the softmax of
    ``queries @ keys.T``, the gradient of these scores is W less the probabilities times its sums over items.

    Args:
        keys: (n, rank).
        queries: (rows, rank), or None.

    Returns:
        ``W @ keys`` (rows, rank), the sums over items (rows, 1), and ``W.T @ queries`` (n, rank) or None.
    """
    if _fused(probabilities, *cotangents, *tables, keys, *(() if queries is None else (queries,))):
        sums: tuple[Tensor, Tensor, Tensor]
        sums = torch.ops.td3_fast.weigh_products(probabilities, cotangents, tables, keys, queries)
        by_keys, of_rows, of_items = sums
        return by_keys, of_rows, None if queries is None else of_items
    weighted = torch.cat(list(cotangents), dim=1) @ torch.cat(list(tables), dim=1).T
    weighted *= probabilities
    by_queries = None if queries is None else weighted.T @ queries
    return weighted @ keys, weighted.sum(-1, keepdim=True), by_queries


def _fused(first: Tensor, *others: Tensor) -> bool:
    needs_gradient = first.requires_grad
    for tensor in others:
        needs_gradient = needs_gradient or tensor.requires_grad
    if needs_gradient and torch.is_grad_enabled():
        raise RuntimeError(
            "probabilities that are kept have no derivative: detach the inputs, or use soft_embedding"
        )
    return first.is_cpu and has_fused(first.device)


@register_fake("td3_fast::item_probabilities")
def _(queries: Tensor, keys: Tensor) -> Tensor:
    return queries.new_empty(queries.shape[0], keys.shape[0])


@register_fake("td3_fast::mix_items")
def _(probabilities: Tensor, items: Tensor) -> Tensor:
    return items.new_empty(probabilities.shape[0], items.shape[1])


@register_fake("td3_fast::mix_items_transposed")
def _(probabilities: Tensor, cotangent: Tensor) -> Tensor:
    return cotangent.new_empty(probabilities.shape[1], cotangent.shape[1])


@register_fake("td3_fast::weigh_products")
def _(
    probabilities: Tensor,
    cotangents: Sequence[Tensor],
    tables: Sequence[Tensor],
    keys: Tensor,
    queries: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, rank = probabilities.shape[0], keys.shape[1]
    items = 0 if queries is None else keys.shape[0]
    return keys.new_empty(rows, rank), keys.new_empty(rows, 1), keys.new_empty(items, rank)
