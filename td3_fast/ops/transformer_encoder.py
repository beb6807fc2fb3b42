"""A self-attention encoder in one call, for small models whose passes are bound by the cost of calls."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from td3_fast.ops.dropout import DropoutStream, dropped_of
from td3_fast.ops.library import has_fused, register_fake

MAX_LAYERS = 8  # kMaxLayers in csrc/encoder_sizes.h


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """Sizes and rates of a SASRec: `positions` rows of its position table, width d.

    With `bidirectional`, those of the blocks of a BERT4Rec: every row of every layer sees all inputs up to one that is
    given for the sequence, in the place of those up to its own.
    """

    positions: int
    width: int
    inner: int
    heads: int
    layers: int
    hidden_dropout: float
    attention_dropout: float
    bidirectional: bool = False


def has_transformer_encoder(shape: EncoderShape, like: Tensor) -> bool:
    """Whether `transformer_encoder` serves this shape on the device and dtype of `like`, outside of `torch.func` and of
    `torch.autograd.forward_ad`."""
    return (
        (like.device.type == "cpu" or (like.device.type == "cuda" and not shape.bidirectional))
        and torch._C._functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
        and like.dtype in (torch.float32, torch.float64)
        and shape.layers <= MAX_LAYERS
        and has_fused(like.device)
        and (
            like.device.type == "cpu"
            or _shared_bytes(shape, like.element_size()) <= _shared_memory(like.device)
        )
    )


def _shared_bytes(shape: EncoderShape, element_size: int) -> int:
    """What a block of threads keeps of the widest pass with two outputs, as csrc/cuda/encoder.cuh lays it out."""
    width, inner, heads, length = shape.width, shape.inner, shape.heads, shape.positions
    stride, asked, warps = width | 1, 2, 16
    most = max(length, asked) if shape.layers > 1 else asked  # rows of a block
    block = 4 * (width + 1) * width + 4 * width + (width + 1) * inner + (inner + 1) * width
    copied = 2 * width + shape.layers * block
    saved = (6 + 2 * heads) * stride + 2 * inner + 2 + heads * (2 * length + 1)
    duals = [
        copied + copied // 32 + 1,
        *[length * stride] * 3,
        length,
        *[most * stride] * 5,
        ((shape.layers - 1) * length + asked) * saved,
        *[most * heads * stride] * 2,
        most * heads * length,
        most * inner,
        most * heads,
        asked * warps,
    ]
    plain = [length * width + copied, asked * warps]
    sizes = [2 * element_size * n for n in duals] + [element_size * n for n in plain] + [4 * asked]
    return sum(-(-size // 16) * 16 for size in sizes)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)  # its type does not know of the field
    return int(properties.shared_memory_per_block_optin)


def transformer_encoder(
    parameters: Tensor,  # (size,)
    inputs_embeds: Tensor,  # (batch, length, d)
    positions: Tensor,  # (batch, k) int64, or (batch, k + 1)
    shape: EncoderShape,
    *,
    dropout: DropoutStream | None = None,
) -> Tensor:
    """The outputs of a SASRec at the asked positions, or of the blocks of a BERT4Rec.

    Its references are `learners.SASRec.encode` and what `learners.BERT4Rec` is without it. On the CPU sequences are
    the lanes of vectors, on a GPU a block of threads takes one. Nothing is computed beyond the last asked position,
    and only inputs and outputs are kept between orders: a pass is recomputed by its derivative. The double backward
    runs the same code on dual numbers. Twice differentiable in `parameters` and `inputs_embeds`; a third order
    raises. Dropout masks are those that the reference draws from an equal `dropout`. `torch.func` and `torch.vmap`
    do not take it; the reference they do. Attention both ways is the CPU's alone.

    Args:
        parameters: position table (positions, d); weight and bias of the first norm; for each layer weight and bias
            of query, key, value, attention output, its norm, feed-forward in, feed-forward out, its norm.
        inputs_embeds: (batch, length, d), length <= shape.positions.
        positions: (batch, k), 0-based. Of a bidirectional shape (batch, k + 1): before the last input that each
            sequence sees, the positions asked for, -1 where nothing is.

    Returns:
        (batch, k, d), zeros where nothing is asked.

    Raises:
        ValueError: sizes, dtypes or devices do not agree, or a bidirectional shape meets a GPU.
        IndexError: on the CPU, a position is not one of the inputs; a GPU is left unusable to the process by that.
    """
    batch, length, _ = inputs_embeds.shape
    device = inputs_embeds.device
    asked = positions.shape[1] - int(shape.bidirectional)
    words = dropout_words(dropout, shape, batch, length, asked, device=device)
    encoded: Tensor = torch.ops.td3_fast.transformer_encoder_forward(
        parameters, inputs_embeds, positions, words, packed_sizes(shape)
    )
    return encoded


def encode_histories(
    parameters: Tensor,  # (size,)
    items: Tensor,  # (n, d)
    histories: Tensor,  # (batch, length) int64
    lengths: Tensor,  # (batch,) int64
    shape: EncoderShape,
    *,
    dropout: DropoutStream | None = None,
) -> Tensor:
    """The outputs of `transformer_encoder` at the last of the `lengths` items of each history; without derivatives.

    On a GPU the rows of the items are read where they are, and no tensor of the histories' embeddings is made.

    Args:
        parameters, shape, dropout: as `transformer_encoder` takes them, where `has_transformer_encoder` says so.
        items: of the dtype of the parameters.
        histories: ids of items, of which those beyond the length do not count.
        lengths: at least 1.

    Returns:
        (batch, d).

    Raises:
        ValueError: sizes or dtypes do not agree.
        IndexError: on the CPU, an item is not one of the table, or a length not one of the histories; a GPU is left
            unusable to the process by that.
    """
    batch, length = histories.shape
    words = dropout_words(dropout, shape, batch, length, 1, device=items.device)
    encoded: Tensor = torch.ops.td3_fast.encode_histories(
        parameters, items, histories, lengths, words, packed_sizes(shape)
    )
    return encoded


def dropout_words(
    dropout: DropoutStream | None,
    shape: EncoderShape,
    batch: int,
    length: int,
    asked: int,
    *,
    device: torch.device,
) -> list[Tensor]:
    """The random words of each place where the encoder drops, in the order of its modules; empty without dropout."""
    if dropout is None:
        return []
    sites, counts = _dropout_sites(shape, batch, length, asked)
    words = dropout.words_of_masks(counts, device=device)
    if len(words) == len(sites):
        return words
    drawn = iter(words)
    return [next(drawn) if drops else torch.empty(0, dtype=torch.int16, device=device) for drops in sites]


@functools.lru_cache(maxsize=64)
def _dropout_sites(
    shape: EncoderShape, batch: int, length: int, asked: int
) -> tuple[tuple[bool, ...], tuple[int, ...]]:
    """Whether the encoder drops at each place where it may, and the elements of each place where it does."""
    hidden, attention = shape.hidden_dropout, shape.attention_dropout
    sites = [(batch * length * shape.width, hidden)]
    for layer in range(shape.layers):
        rows = asked if layer == shape.layers - 1 else length
        sites.append((batch * shape.heads * rows * length, attention))
        sites += [(batch * rows * shape.width, hidden)] * 2
    drops = tuple(dropped_of(rate) > 0 for _, rate in sites)
    return drops, tuple(count for (count, _), here in zip(sites, drops, strict=True) if here)


def packed_sizes(shape: EncoderShape) -> list[int]:
    """What the kernels take of a shape."""
    sizes = [shape.positions, shape.inner, shape.heads, shape.layers]
    dropped = [dropped_of(shape.hidden_dropout), dropped_of(shape.attention_dropout)]
    return [*sizes, *dropped, int(shape.bidirectional)]


@register_fake("td3_fast::encode_histories")
def _(
    parameters: Tensor,
    items: Tensor,
    histories: Tensor,
    lengths: Tensor,
    words: list[Tensor],
    sizes: list[int],
) -> Tensor:
    return items.new_empty(len(histories), items.shape[1])


@register_fake("td3_fast::transformer_encoder_forward")
def _(parameters: Tensor, inputs: Tensor, positions: Tensor, words: list[Tensor], sizes: list[int]) -> Tensor:
    batch, columns = positions.shape
    return inputs.new_empty(batch, columns - sizes[-1], inputs.shape[2])


@register_fake("td3_fast::transformer_encoder_backward")
def _(
    grad_outputs: Tensor,
    parameters: Tensor,
    inputs: Tensor,
    positions: Tensor,
    words: list[Tensor],
    sizes: list[int],
    needs_inputs: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(parameters), inputs.new_empty(inputs.shape if needs_inputs else 0)


@register_fake("td3_fast::transformer_encoder_double_backward")
def _(
    grad_grad_parameters: Tensor | None,
    grad_grad_inputs: Tensor | None,
    grad_outputs: Tensor,
    parameters: Tensor,
    inputs: Tensor,
    positions: Tensor,
    words: list[Tensor],
    sizes: list[int],
    needs_inputs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_inputs = inputs.new_empty(inputs.shape if needs_inputs else 0)
    return torch.empty_like(grad_outputs), torch.empty_like(parameters), grad_inputs
