"""SASRec (Kang and McAuley, ICDM 2018) with post-norm blocks, as the paper's base library builds it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from td3_fast.learners.base import Learner, causal_bias, normal_
from td3_fast.ops import DropoutStream, EncoderShape, causal_encoder, has_causal_encoder, seeded_generator

LAYER_NORM_EPS = 1e-12
INITIAL_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class SASRecConfig:
    """Sizes and rates of a SASRec; `num_items` counts the padding item."""

    num_items: int
    max_len: int
    hidden: int = 32
    inner: int = 64
    heads: int = 1
    layers: int = 1
    hidden_dropout: float = 0.2
    attention_dropout: float = 0.5

    def __post_init__(self) -> None:
        for name in ("num_items", "max_len", "hidden", "inner", "heads", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"SASRecConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden % self.heads:
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of heads ({self.heads})")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"SASRecConfig.{name} must lie in [0, 1), got {getattr(self, name)}")


class Block(nn.Module):
    """Causal self-attention and feed-forward, each followed by dropout, addition and LayerNorm."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.config = config
        d, inner = config.hidden, config.inner
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
        few = self.config.heads * asked.shape[1] < hidden.shape[-1]
        attend = self._attend_few if few else self._attend
        output = self.attention_output(attend(hidden, asked, bias, dropout))
        if dropout is not None:
            output = dropout(output, self.config.hidden_dropout)
        attended = self.attention_norm(output + asked)
        output = self.feed_forward_output(F.gelu(self.feed_forward(attended)))
        if dropout is not None:
            output = dropout(output, self.config.hidden_dropout)
        return self.feed_forward_norm(output + attended)

    def _weights(self, query: Tensor, key: Tensor, bias: Tensor, dropout: DropoutStream | None) -> Tensor:
        scale = 1 / math.sqrt(self.config.hidden // self.config.heads)
        weights = torch.softmax(torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale), dim=-1)
        return weights if dropout is None else dropout(weights, self.config.attention_dropout)

    def _attend(self, hidden: Tensor, asked: Tensor, bias: Tensor, dropout: DropoutStream | None) -> Tensor:
        batch, k, d = asked.shape
        heads = self.config.heads
        query, key, value = (
            x.unflatten(-1, (heads, d // heads)).transpose(1, 2).flatten(0, 1)
            for x in (self.query(asked), self.key(hidden), self.value(hidden))
        )  # (batch * heads, k or length, d / heads)
        weights = self._weights(
            query, key, bias.repeat_interleave(heads, dim=0) if heads > 1 else bias, dropout
        )
        return torch.bmm(weights, value).view(batch, heads, k, -1).transpose(1, 2).reshape(batch, k, d)

    def _attend_few(
        self, hidden: Tensor, asked: Tensor, bias: Tensor, dropout: DropoutStream | None
    ) -> Tensor:
        """The same for few outputs, without a key or value for every input: q·(W h) = (Wᵀ q)·h; values likewise.

        The key's bias adds the same to all scores of a row, so the softmax does not see it.
        """
        batch, k, d = asked.shape
        heads, width = self.config.heads, d // self.config.heads
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


class SASRec(Learner):
    """Token + position embedding, LayerNorm, dropout, causal attention blocks.

    The last block computes its queries and feed-forward only at the asked positions, which is exact and leaves of a
    one-layer pass little more than the keys and values. Weights start from N(0, 0.02²).
    """

    def __init__(self, config: SASRecConfig, *, seed: int) -> None:
        super().__init__()
        self.config = config
        self.item_embeddings = nn.Parameter(torch.empty(config.num_items, config.hidden))
        self.position_embeddings: nn.Parameter = nn.Parameter(torch.empty(config.max_len, config.hidden))
        self.norm = nn.LayerNorm(config.hidden, eps=LAYER_NORM_EPS)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        generator = seeded_generator(seed, "embeddings")
        normal_(self.item_embeddings, INITIAL_STD, generator)
        normal_(self.position_embeddings, INITIAL_STD, generator)
        self.reset_encoder(seed=seed)

    @property
    def max_len(self) -> int:
        return self.config.max_len

    def hyperparameters(self) -> dict[str, Any]:
        return asdict(self.config)

    def reset_encoder(self, *, seed: int) -> None:
        generator = seeded_generator(seed, "encoder")
        for module in self.modules():
            if isinstance(module, nn.Linear):
                normal_(module.weight, INITIAL_STD, generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def encode_flat(
        self, flat: Tensor, inputs_embeds: Tensor, positions: Tensor, *, dropout: DropoutStream | None
    ) -> Tensor | None:
        config = self.config
        shape = EncoderShape(
            positions=config.max_len,
            width=config.hidden,
            inner=config.inner,
            heads=config.heads,
            layers=config.layers,
            hidden_dropout=config.hidden_dropout,
            attention_dropout=config.attention_dropout,
        )
        if not has_causal_encoder(shape, flat):
            return None
        self._check_length(inputs_embeds)
        return causal_encoder(flat, inputs_embeds, positions, shape, dropout=dropout)

    def _check_length(self, inputs_embeds: Tensor) -> None:
        if inputs_embeds.shape[1] > self.max_len:
            raise ValueError(
                f"got sequences of {inputs_embeds.shape[1]} items, but this SASRec has {self.max_len} positions: "
                "cut the histories or build it with a larger max_len"
            )

    def encode(
        self, inputs_embeds: Tensor, positions: Tensor, *, dropout: DropoutStream | None = None
    ) -> Tensor:
        batch, length, d = inputs_embeds.shape
        self._check_length(inputs_embeds)
        hidden = self.norm(inputs_embeds + self.position_embeddings[:length])
        if dropout is not None:
            hidden = dropout(hidden, self.config.hidden_dropout)
        *first, last = self.blocks
        if first:
            everywhere = torch.arange(length, device=hidden.device).expand(1, length)
            bias = causal_bias(everywhere, length, hidden.dtype).expand(batch, length, length)
            for block in first:
                hidden = block(hidden, hidden, bias, dropout)
        asked = hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, d))
        return last(hidden, asked, causal_bias(positions, length, hidden.dtype), dropout)
