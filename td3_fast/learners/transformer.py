"""The transformer block that SASRec and BERT4Rec are made of, and how its layers start."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from td3_fast.learners.base import normal_
from td3_fast.ops import DropoutStream

LAYER_NORM_EPS = 1e-12
INITIAL_STD = 0.02


def check_heads(hidden: int, heads: int) -> None:
    """ValueError unless the width divides into that many heads."""
    if hidden % heads:
        raise ValueError(f"hidden ({hidden}) must be a multiple of heads ({heads})")


def reset_layers(module: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights of all linear layers from N(0, 0.02²); biases are 0, norms the identity."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            normal_(layer.weight, INITIAL_STD, generator)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)


class Block(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, addition and LayerNorm."""

    def __init__(
        self, *, hidden: int, inner: int, heads: int, hidden_dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.heads = heads
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        d = hidden
        self.query = nn.Linear(d, d)
        self.key = nn.Linear(d, d)
        self.value = nn.Linear(d, d)
        self.attention_output = nn.Linear(d, d)
        self.attention_norm = nn.LayerNorm(d, eps=LAYER_NORM_EPS)
        self.feed_forward = nn.Linear(d, inner)
        self.feed_forward_output = nn.Linear(inner, d)
        self.feed_forward_norm = nn.LayerNorm(d, eps=LAYER_NORM_EPS)

    def forward(
        self,
        hidden: Tensor,  # (batch, length, d)
        asked: Tensor,  # (batch, k, d), the rows of `hidden` whose outputs are asked for
        bias: Tensor,  # (batch, k, length)
        dropout: DropoutStream | None,
    ) -> Tensor:  # (batch, k, d)
        few = self.heads * asked.shape[1] < hidden.shape[-1]
        attend = self._attend_few if few else self._attend
        output = self.attention_output(attend(hidden, asked, bias, dropout))
        if dropout is not None:
            output = dropout(output, self.hidden_dropout)
        attended = self.attention_norm(output + asked)
        output = self.feed_forward_output(F.gelu(self.feed_forward(attended)))
        if dropout is not None:
            output = dropout(output, self.hidden_dropout)
        return self.feed_forward_norm(output + attended)

    def tensors(self) -> list[Tensor]:
        """Its parameters, in the order of `named_parameters`, also where they are views of a vector."""
        layers: list[nn.Linear | nn.LayerNorm] = [
            self.query,
            self.key,
            self.value,
            self.attention_output,
            self.attention_norm,
            self.feed_forward,
            self.feed_forward_output,
            self.feed_forward_norm,
        ]
        return [tensor for layer in layers for tensor in (layer.weight, layer.bias)]

    def _weights(self, query: Tensor, key: Tensor, bias: Tensor, dropout: DropoutStream | None) -> Tensor:
        scale = 1 / math.sqrt(self.query.out_features // self.heads)
        weights = torch.softmax(torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale), dim=-1)
        return weights if dropout is None else dropout(weights, self.attention_dropout)

    def _attend(self, hidden: Tensor, asked: Tensor, bias: Tensor, dropout: DropoutStream | None) -> Tensor:
        batch, k, d = asked.shape
        heads = self.heads
        query, key, value = (
            x.unflatten(-1, (heads, d // heads)).transpose(1, 2).flatten(0, 1)
            for x in (self.query(asked), self.key(hidden), self.value(hidden))
        )  # (batch * heads, k or length, d / heads)
        weights = self._weights(
            query, key, bias.repeat_interleave(heads, dim=0) if heads > 1 else bias, dropout
        )
        return (
            torch.bmm(weights, value).view(batch, heads, k, d // heads).transpose(1, 2).reshape(batch, k, d)
        )

    def _attend_few(
        self, hidden: Tensor, asked: Tensor, bias: Tensor, dropout: DropoutStream | None
    ) -> Tensor:
        """The same for few outputs, without a key or value for every input: q·(W h) = (Wᵀ q)·h; values likewise.

        The key's bias adds the same to all scores of a row, so the softmax does not see it.
        """
        batch, k, d = asked.shape
        heads, width = self.heads, d // self.heads
        query = self.query(asked).view(batch * k, heads, width).transpose(0, 1)
        query = torch.bmm(query, self.key.weight.view(heads, width, d))  # (heads, batch * k, d)
        query = query.view(heads, batch, k, d).transpose(0, 1).reshape(batch, heads * k, d)
        weights = self._weights(query, hidden, bias.repeat(1, heads, 1) if heads > 1 else bias, dropout)
        mixed = (
            torch.bmm(weights, hidden).view(batch, heads, k, d).transpose(0, 1).reshape(heads, batch * k, d)
        )
        total = (
            weights.sum(-1).view(batch, heads, k).transpose(0, 1).reshape(heads, batch * k, 1)
        )  # 1 but for dropout
        context = torch.bmm(mixed, self.value.weight.view(heads, width, d).transpose(1, 2))
        context = torch.addcmul(context, total, self.value.bias.view(heads, 1, width))
        return context.transpose(0, 1).reshape(batch, k, d)
