"""The gradient of an inner step in one call, and its derivative in a direction in another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from td3_fast.ops.dropout import DropoutStream
from td3_fast.ops.library import register_fake
from td3_fast.ops.transformer_encoder import EncoderShape, dropout_words, packed_sizes

# At most, of items and of the targets of a sequence, where a GPU compares its outputs with all items in the same
# kernel; as in csrc/cuda/gradient_operators.cpp.
ITEMS_IN_PASS = 8192
ASKED_IN_PASS = 8


def for_inner_gradient(items: Tensor) -> Tensor:
    """A frozen item table (n, d) as `inner_gradient` reads it without a copy: on a GPU a small one column by column."""
    if items.is_cuda and len(items) <= ITEMS_IN_PASS:
        return items.t().contiguous().t()
    return items


class InnerGradient(NamedTuple):
    """What `inner_gradient` returns."""

    loss: Tensor  # ()
    parameters: Tensor  # (size,), the gradient of the loss
    items: Tensor | None  # (n, d), and where the table is trained
    embeds: Tensor | None  # (b, ζ, d)
    inputs: tuple[Tensor, Tensor, Tensor, Tensor]  # of the call
    saved: list[Tensor]
    words: list[Tensor]
    sizes: list[int]
    users: Tensor | None = None

    def tangent(
        self, parameters: Tensor, items: Tensor | None = None, embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The derivative of the gradients where the inputs of the call move in that direction; None: not at all.

        Second derivatives being symmetric, these are also the gradients of the inner product of the direction and the
        gradients. Returns those towards parameters (size,), items (n, d), None where the table does not move, and
        embeds (b, ζ, d).
        """
        to_parameters, to_items, to_embeds = torch.ops.td3_fast.inner_gradient_tangent(
            parameters, items, embeds, *self.inputs, self.saved, self.words, self.sizes, self.users
        )
        return to_parameters, None if items is None else to_items, to_embeds


def inner_gradient(
    parameters: Tensor,  # (size,)
    items: Tensor,  # (n, d)
    embeds: Tensor,  # (b, ζ, d)
    targets: Tensor,  # (b, k) int64
    shape: EncoderShape,
    *,
    dropout: DropoutStream | None = None,
    trained: bool = False,
    users: Tensor | None = None,  # (b,) int64
) -> InnerGradient:
    """The mean over sequences and targets of `item_cross_entropy(h, items, x)`, and its gradients.

    x: the rows of `embeds` at the targets; h: what `transformer_encoder` makes of the rows before each. The same as by
    autograd, with no graph, and on the CPU with the encoder's forward pass made once for both (unless that keeps
    more than 32 MiB). Its reference is `unroll.InnerLoop.loss` and its derivatives.

    Args:
        parameters, shape, dropout: as `transformer_encoder` takes them, where `has_transformer_encoder` says so.
        items: of the dtype of the parameters, or of 16 bits.
        targets: positions 1 to ζ - 1; ζ - 1 <= shape.positions.
        trained: whether to differentiate towards items and embeds too.
        users: which of `embeds` the sequences are, where these are (μ, ζ, d) of all users.

    Raises:
        ValueError: sizes or dtypes do not agree.
        IndexError: on the CPU, a target is not one of the positions, or the first; a GPU is left unusable to the
            process by that.
    """
    words = _words(dropout, shape, embeds, targets)
    sizes = packed_sizes(shape)
    loss, to_parameters, to_items, to_embeds, saved = torch.ops.td3_fast.inner_gradient(
        parameters, embeds, targets, items, words, sizes, trained, users
    )
    inputs = (parameters, embeds, targets, items)
    if not trained:
        return InnerGradient(loss, to_parameters, None, None, inputs, saved, words, sizes, users)
    return InnerGradient(loss, to_parameters, to_items, to_embeds, inputs, saved, words, sizes, users)


def _words(
    dropout: DropoutStream | None, shape: EncoderShape, embeds: Tensor, targets: Tensor
) -> list[Tensor]:
    batch, asked = targets.shape
    return dropout_words(dropout, shape, batch, embeds.shape[1] - 1, asked, device=embeds.device)


def gradient_is_enough(parameters: Tensor, items: Tensor, targets: Tensor, *, trained: bool) -> bool:
    """Whether `InnerGradient.tangent` needs nothing of the call but its inputs, so that `known_gradient` serves: where
    a GPU compares outputs with all items in the same kernel."""
    return (
        parameters.is_cuda
        and not trained
        and items.dtype == parameters.dtype
        and len(items) <= ITEMS_IN_PASS
        and targets.shape[1] <= ASKED_IN_PASS
    )


def known_gradient(
    gradient: Tensor,  # (size,)
    parameters: Tensor,
    items: Tensor,
    embeds: Tensor,
    targets: Tensor,
    shape: EncoderShape,
    *,
    dropout: DropoutStream | None = None,
    users: Tensor | None = None,
) -> InnerGradient:
    """What `inner_gradient` returned for the same arguments, but the loss, from the gradient that is kept of it."""
    words = _words(dropout, shape, embeds, targets)
    inputs = (parameters, embeds, targets, items)
    return InnerGradient(gradient[:0], gradient, None, None, inputs, [], words, packed_sizes(shape), users)


@register_fake("td3_fast::inner_gradient")
def _(
    parameters: Tensor,
    embeds: Tensor,
    targets: Tensor,
    items: Tensor,
    words: list[Tensor],
    sizes: list[int],
    trained: bool,
    users: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    hidden = embeds.new_empty(targets.numel(), embeds.shape[2])
    logsumexp, remainder, mean, probabilities = torch.ops.td3_fast.item_logsumexp_forward(
        hidden, items, True, trained
    )
    nothing_saved = gradient_is_enough(parameters, items, targets, trained=trained)
    return (
        embeds.new_empty(()),
        torch.empty_like(parameters),
        items.new_empty(items.shape if trained else 0),
        embeds.new_empty((len(targets), *embeds.shape[1:]) if trained else 0),
        [] if nothing_saved else [hidden, logsumexp, remainder, mean, probabilities],
    )


@register_fake("td3_fast::inner_gradient_tangent")
def _(
    tangent_parameters: Tensor,
    tangent_items: Tensor | None,
    tangent_embeds: Tensor | None,
    parameters: Tensor,
    embeds: Tensor,
    targets: Tensor,
    items: Tensor,
    saved: list[Tensor],
    words: list[Tensor],
    sizes: list[int],
    users: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    to_items = items.new_empty(0 if tangent_items is None else items.shape)
    return torch.empty_like(parameters), to_items, embeds.new_empty(len(targets), *embeds.shape[1:])
