"""GRU4Rec (Hidasi et al., ICLR 2016) over item embeddings, trained with full cross-entropy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from td3_fast.checks import check_rates, check_sizes
from td3_fast.learners.base import Learner, normal_, xavier_std, xavier_uniform_
from td3_fast.learners.recurrent import GRU, recurrent_states
from td3_fast.ops import DropoutStream, seeded_generator


@dataclass(frozen=True, kw_only=True)
class GRU4RecConfig:
    """Sizes and rates of a GRU4Rec; `num_items` counts the padding item."""

    num_items: int
    max_len: int
    hidden: int = 32  # of item embeddings
    inner: int = 64  # of the recurrent state
    layers: int = 1
    embedding_dropout: float = 0.3

    def __post_init__(self) -> None:
        check_sizes(self, "num_items", "max_len", "hidden", "inner", "layers")
        check_rates(self, "embedding_dropout")


class GRU4Rec(Learner):
    """Dropout on the item embeddings, recurrent layers, and a dense layer back to the width of the embeddings.

    Weights start from Xavier's distributions, uniform in the recurrent layers and normal elsewhere.
    """

    def __init__(self, config: GRU4RecConfig, *, seed: int) -> None:
        super().__init__()
        self.config = config
        self.item_embeddings = nn.Parameter(torch.empty(config.num_items, config.hidden))
        self.position_embeddings = None
        self.recurrent = nn.ModuleList(
            GRU(config.hidden if layer == 0 else config.inner, config.inner) for layer in range(config.layers)
        )
        self.output = nn.Linear(config.inner, config.hidden)
        generator = seeded_generator(seed, "embeddings")
        normal_(self.item_embeddings, xavier_std(self.item_embeddings), generator)
        self.reset_encoder(seed=seed)

    @property
    def max_len(self) -> int:
        return self.config.max_len

    def hyperparameters(self) -> dict[str, Any]:
        return asdict(self.config)

    def reset_encoder(self, *, seed: int) -> None:
        generator = seeded_generator(seed, "encoder")
        for weight in self.recurrent.parameters():
            xavier_uniform_(weight, generator)
        normal_(self.output.weight, xavier_std(self.output.weight), generator)
        nn.init.zeros_(self.output.bias)

    def encode(
        self, inputs_embeds: Tensor, positions: Tensor, *, dropout: DropoutStream | None = None
    ) -> Tensor:
        states = inputs_embeds
        if dropout is not None:
            states = dropout(states, self.config.embedding_dropout)
        states = recurrent_states(self.recurrent, states, positions)
        asked = states.gather(1, positions.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
        return self.output(asked)
