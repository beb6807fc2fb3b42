"""SASRec (Kang and McAuley, ICDM 2018) with post-norm blocks, as the paper's base library builds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from td3_fast.checks import check_rates, check_sizes
from td3_fast.learners.base import Learner, causal_bias, check_length, normal_
from td3_fast.learners.transformer import INITIAL_STD, LAYER_NORM_EPS, Block, check_heads, reset_layers
from td3_fast.ops import DropoutStream, EncoderShape, seeded_generator


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
        check_sizes(self, "num_items", "max_len", "hidden", "inner", "heads", "layers")
        check_heads(self.hidden, self.heads)
        check_rates(self, "hidden_dropout", "attention_dropout")


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
        self.blocks = nn.ModuleList(
            Block(
                hidden=config.hidden,
                inner=config.inner,
                heads=config.heads,
                hidden_dropout=config.hidden_dropout,
                attention_dropout=config.attention_dropout,
            )
            for _ in range(config.layers)
        )
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
        reset_layers(self, seeded_generator(seed, "encoder"))

    def encoder_shape(self) -> EncoderShape:
        config = self.config
        return EncoderShape(
            positions=config.max_len,
            width=config.hidden,
            inner=config.inner,
            heads=config.heads,
            layers=config.layers,
            hidden_dropout=config.hidden_dropout,
            attention_dropout=config.attention_dropout,
        )

    def encode(
        self, inputs_embeds: Tensor, positions: Tensor, *, dropout: DropoutStream | None = None
    ) -> Tensor:
        batch, length, d = inputs_embeds.shape
        check_length(self, length)
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
