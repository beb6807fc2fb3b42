"""What a learner offers, and its parameters as one flat vector."""

from __future__ import annotations

import copy
import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from td3_fast.ops import (
    DropoutStream,
    EncoderShape,
    has_next_item_gradient,
    has_transformer_encoder,
    item_cross_entropy,
    look_up,
    next_item_gradient,
    transformer_encoder,
)

# (rows, d) outputs, (n, d) item table, (rows,) targets -> (rows,): `item_cross_entropy` or what stands in for it
CrossEntropy: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


class Learner(nn.Module):
    """A recommender that maps a sequence of item embeddings to a vector scored against the item table.

    Two tables are named, because summaries hand them over: `item_embeddings` (num_items, d), row 0 the padding item,
    and `position_embeddings`, None for architectures that have none. All else is the encoder. A learner with a bias per
    item keeps it in the last column of its item table, and outputs a constant 1 there.
    """

    item_embeddings: nn.Parameter
    position_embeddings: nn.Parameter | None

    @property
    @abstractmethod
    def max_len(self) -> int:
        """The longest history that is read, in items."""

    @abstractmethod
    def encode(
        self, inputs_embeds: Tensor, positions: Tensor, *, dropout: DropoutStream | None = None
    ) -> Tensor:
        """Outputs at the asked positions only.

        inputs_embeds: (batch, length, d); positions: (batch, k) int64, 0-based; an output depends on the inputs up to
        its own position. Without `dropout` the pass is deterministic. Returns (batch, k, d); differentiable twice.
        """

    @abstractmethod
    def reset_encoder(self, *, seed: int) -> None:
        """Draw every parameter anew, except the item and position embeddings."""

    @abstractmethod
    def hyperparameters(self) -> dict[str, Any]:
        """What `type(self)` needs to be built again, as plain JSON values."""

    def encoder_shape(self) -> EncoderShape | None:
        """That of `transformer_encoder` where this is `encode`, on the vector of `FlatParameters`; else None."""
        return None

    def forward(self, histories: Tensor, lengths: Tensor, *, dropout: DropoutStream | None = None) -> Tensor:
        """The output after the last item of each history: (batch, length) int64, (batch,) int64 -> (batch, d)."""
        check_encoder_dtype(self)
        embeds = look_up(self.item_embeddings, histories)
        return self.encode(embeds, (lengths - 1).unsqueeze(1), dropout=dropout).squeeze(1)

    def loss(
        self,
        items: Tensor,
        histories: Tensor,
        lengths: Tensor,
        targets: Tensor,
        *,
        dropout: DropoutStream,
        cross_entropy: CrossEntropy = item_cross_entropy,
    ) -> Tensor:
        """What training on real examples minimises: the mean cross-entropy of the next item.

        items: (n, d), the item table; histories: (batch, length) int64; lengths and targets: (batch,) int64.
        """
        return next_item_loss(
            self.encode, items, histories, lengths, targets, dropout=dropout, cross_entropy=cross_entropy
        )


def check_length(learner: Learner, length: int) -> None:
    """ValueError where sequences are longer than a learner has positions for."""
    if length > learner.max_len:
        raise ValueError(
            f"got sequences of {length} items, but this {type(learner).__name__} has {learner.max_len} positions: "
            "cut the histories or build it with a larger max_len"
        )


def check_encoder_dtype(learner: Learner) -> None:
    """ValueError where parameters beside the item table are kept in 16 bits."""
    for name, parameter in learner.named_parameters():
        if name != "item_embeddings" and parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {parameter.dtype}: an encoder works in float32 or float64, and only item_embeddings can "
                "be kept in 16 bits; convert these alone, or use torch.autocast"
            )


def next_item_loss(
    encode: Callable[..., Tensor],
    items: Tensor,
    histories: Tensor,
    lengths: Tensor,
    targets: Tensor,
    *,
    dropout: DropoutStream,
    cross_entropy: CrossEntropy,
) -> Tensor:
    """The mean cross-entropy of the item after each history."""
    embeds = look_up(items, histories)
    hidden = encode(embeds, (lengths - 1).unsqueeze(1), dropout=dropout).squeeze(1)
    return cross_entropy(hidden, items, targets).mean()


def predicts_next_item(learner: type[Learner]) -> bool:
    """Whether it is trained on the next item and nothing else, so that its loss is `next_item_loss`."""
    return learner.loss is Learner.loss


class FlatParameters:
    """A learner as a function of one vector that holds all its parameters but the item table.

    One vector makes an optimiser step a handful of operations, and its adjoint as well.
    """

    def __init__(self, learner: Learner) -> None:
        parameters = {k: v for k, v in learner.named_parameters() if k != "item_embeddings"}
        self._shapes = {name: p.shape for name, p in parameters.items()}
        self._sizes = [p.numel() for p in parameters.values()]
        self.size = sum(self._sizes)
        # the learner's modules without its tensors, to be filled with views of the vector at each call
        self._shell = copy.deepcopy(learner, {id(p): None for p in learner.parameters()})
        self._predicts_next_item = predicts_next_item(type(learner))
        self._slots: list[tuple[dict[str, Any], str]] = []
        for name in parameters:
            owner, _, attribute = name.rpartition(".")
            module = self._shell.get_submodule(owner)
            del module._parameters[attribute]
            self._slots.append((module.__dict__, attribute))

    def gather(self, state: Mapping[str, Tensor]) -> Tensor:
        """The vector (size,) of a learner's `state_dict()`."""
        return torch.cat([state[name].detach().reshape(-1) for name in self._shapes])

    def scatter(self, flat: Tensor) -> dict[str, Tensor]:
        """The named tensors of a vector, as views."""
        parts = torch.split(flat, self._sizes)
        return {
            name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    @torch.no_grad()
    def write(self, learner: Learner, flat: Tensor, items: Tensor | None = None) -> None:
        """Copy a vector, and an item table where one is given, into the parameters of a learner."""
        named = dict(learner.named_parameters())
        for name, value in self.scatter(flat).items():
            named[name].copy_(value)
        if items is not None:
            learner.item_embeddings.copy_(items)

    def encode(
        self, flat: Tensor, inputs_embeds: Tensor, positions: Tensor, *, dropout: DropoutStream | None = None
    ) -> Tensor:
        """`learner.encode` with the parameters of `flat` (size,)."""
        shape = self.fused_shape(flat)
        if shape is not None:
            check_length(self._shell, inputs_embeds.shape[1])
            return transformer_encoder(flat, inputs_embeds, positions, shape, dropout=dropout)
        return self._filled(flat).encode(inputs_embeds, positions, dropout=dropout)

    def fused_shape(self, flat: Tensor) -> EncoderShape | None:
        """The shape to call `transformer_encoder` with in the place of the learner; None where that does not serve."""
        shape = self._shell.encoder_shape()
        return shape if shape is not None and has_transformer_encoder(shape, flat) else None

    def loss_gradient(
        self,
        flat: Tensor,
        items: Tensor,
        histories: Tensor,
        lengths: Tensor,
        targets: Tensor,
        *,
        dropout: DropoutStream,
        cross_entropy: CrossEntropy | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The value of `loss` and its gradients with respect to `flat` and `items`."""
        shape = self.fused_shape(flat)
        if (
            cross_entropy is None
            and shape is not None
            and self._predicts_next_item
            and has_next_item_gradient(items, flat)
        ):
            check_length(self._shell, histories.shape[1])
            made = next_item_gradient(
                flat, items, histories, lengths, targets, shape, dropout=dropout, trained=True
            )
            assert made.items is not None
            return made.loss, (made.parameters, made.items)
        flat, items = (p.detach().requires_grad_() for p in (flat, items))
        loss = self.loss(
            flat,
            items,
            histories,
            lengths,
            targets,
            dropout=dropout,
            cross_entropy=cross_entropy or item_cross_entropy,
        )
        to_flat, to_items = torch.autograd.grad(loss, (flat, items))
        return loss.detach(), (to_flat, to_items)

    def loss(
        self,
        flat: Tensor,
        items: Tensor,
        histories: Tensor,
        lengths: Tensor,
        targets: Tensor,
        *,
        dropout: DropoutStream,
        cross_entropy: CrossEntropy = item_cross_entropy,
    ) -> Tensor:
        """`learner.loss` with the parameters of `flat` (size,)."""
        if self._predicts_next_item:
            encode = functools.partial(self.encode, flat)
            return next_item_loss(
                encode, items, histories, lengths, targets, dropout=dropout, cross_entropy=cross_entropy
            )
        return self._filled(flat).loss(
            items, histories, lengths, targets, dropout=dropout, cross_entropy=cross_entropy
        )

    def _filled(self, flat: Tensor) -> Learner:
        for (attributes, name), tensor in zip(self._slots, self.scatter(flat).values(), strict=True):
            attributes[name] = tensor
        return self._shell


def normal_(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill in place with N(0, std²)."""
    _fill(tensor, lambda drawn: drawn.normal_(0.0, std, generator=generator))


def xavier_uniform_(weight: Tensor, generator: torch.Generator) -> None:
    """Fill in place with Xavier's uniform distribution."""
    _fill(weight, lambda drawn: nn.init.xavier_uniform_(drawn, generator=generator))


@torch.no_grad()
def _fill(tensor: Tensor, draw: Callable[[Tensor], Tensor]) -> None:
    """Fill in place, on every device with what is drawn on the CPU."""
    if tensor.device.type == "cpu":
        draw(tensor)
    else:
        tensor.copy_(draw(torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")), non_blocking=True)


def xavier_std(weight: Tensor) -> float:
    """Of Xavier's normal distribution for a matrix: sqrt(2 / (rows + columns))."""
    return math.sqrt(2 / sum(weight.shape))


def causal_bias(positions: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """(batch, k, length): 0 where an output may look, -inf at later inputs."""
    later = torch.arange(length, device=positions.device) > positions.unsqueeze(-1)
    return torch.zeros(later.shape, dtype=dtype, device=positions.device).masked_fill_(later, -math.inf)
