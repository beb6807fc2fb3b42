"""The gradient of the loss on real examples in one call; on the CPU for item tables that stay in cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from td3_fast.ops.dropout import DropoutStream
from td3_fast.ops.library import register_fake
from td3_fast.ops.transformer_encoder import EncoderShape, dropout_words, packed_sizes

# Of the item table, in bytes: every few hundred examples meet all of it.
SMALL_TABLE = 2**21
EXAMPLES_AT_ONCE = 256  # at most, as in csrc/cpu/next_item_gradient.cpp


class NextItemGradient(NamedTuple):
    """What `next_item_gradient` returns."""

    loss: Tensor  # ()
    aligned: Tensor  # ()
    parameters: Tensor  # (size,), the gradient of their sum
    items: Tensor | None  # (n, d), and where the table is trained


def has_next_item_gradient(items: Tensor, parameters: Tensor) -> bool:
    """Whether `next_item_gradient` serves such a table, where `has_transformer_encoder` says so of the encoder."""
    return items.dtype == parameters.dtype and (items.is_cuda or items.nbytes <= SMALL_TABLE)


def next_item_gradient(
    parameters: Tensor,  # (size,)
    items: Tensor,  # (n, d)
    histories: Tensor,  # (batch, length) int64
    lengths: Tensor,  # (batch,) int64
    targets: Tensor,  # (batch,) int64
    shape: EncoderShape,
    *,
    dropout: DropoutStream | None = None,
    features: Tensor | None = None,  # (batch, d)
    alignment: float = 0.0,
    trained: bool = False,
) -> NextItemGradient:
    """The mean cross-entropy of the item after each history, `alignment` times the mean square of the distance of the
    encoder's outputs from `features` where there are some, and the gradients of their sum.

    The same as `look_up`, `transformer_encoder` and `item_cross_entropy` by autograd, which are its reference.

    Args:
        parameters, shape, dropout: as `transformer_encoder` takes them, where `has_transformer_encoder` says so.
        trained: whether to differentiate towards items too.

    Raises:
        ValueError: sizes or dtypes do not agree.
        IndexError: an item is not one of the table, or a length not one of the histories.
    """
    batch, length = histories.shape
    words = dropout_words(dropout, shape, batch, length, 1, device=items.device)
    loss, aligned, to_parameters, to_items = torch.ops.td3_fast.next_item_gradient(
        parameters,
        items,
        histories,
        lengths,
        targets,
        features,
        alignment,
        words,
        packed_sizes(shape),
        trained,
    )
    return NextItemGradient(loss, aligned, to_parameters, to_items if trained else None)


@register_fake("td3_fast::next_item_gradient")
def _(
    parameters: Tensor,
    items: Tensor,
    histories: Tensor,
    lengths: Tensor,
    targets: Tensor,
    features: Tensor | None,
    alignment: float,
    words: list[Tensor],
    sizes: list[int],
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    to_items = items.new_empty(items.shape if trained else 0)
    return items.new_empty(()), items.new_empty(()), torch.empty_like(parameters), to_items
