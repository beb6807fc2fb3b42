"""NARM (Li et al., CIKM 2017): what a history says as a whole, and what its last item makes of the rest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from td3_fast.checks import check_rates, check_sizes
from td3_fast.learners.base import Learner, normal_, xavier_std, xavier_uniform_
from td3_fast.learners.recurrent import GRU, recurrent_states
from td3_fast.ops import DropoutStream, additive_attention, seeded_generator


@dataclass(frozen=True, kw_only=True)
class NARMConfig:
    """Sizes and rates of a NARM; `num_items` counts the padding item."""

    num_items: int
    max_len: int
    hidden: int = 32  # of item embeddings
    inner: int = 64  # of the recurrent state and of the attention
    layers: int = 1  # of the recurrence
    embedding_dropout: float = 0.25
    session_dropout: float = 0.5  # of what is decoded

    def __post_init__(self) -> None:
        check_sizes(self, "num_items", "max_len", "hidden", "inner", "layers")
        check_rates(self, "embedding_dropout", "session_dropout")


class NARM(Learner):
    """Two encoders of the history on one recurrence, and a bilinear decoder.

    With states s_1 … s_t, the global encoder is s_t itself and the local one Σ_j α_tj s_j, over j ≤ t, where
    α_tj = v·sigmoid(A s_t + B s_j) is not normalised. The two have the same states in the paper (its figure 4), so
    there is one recurrence. An item of embedding e scores e·D [s_t; Σ_j α_tj s_j], and D maps to the width of the
    embeddings. Weights start from Xavier's distributions, uniform in the recurrent layers and normal elsewhere.
    """

    def __init__(self, config: NARMConfig, *, seed: int) -> None:
        super().__init__()
        self.config = config
        inner = config.inner
        self.item_embeddings = nn.Parameter(torch.empty(config.num_items, config.hidden))
        self.position_embeddings = None
        self.recurrent = nn.ModuleList(
            GRU(config.hidden if layer == 0 else inner, inner) for layer in range(config.layers)
        )
        self.query = nn.Linear(inner, inner, bias=False)
        self.key = nn.Linear(inner, inner, bias=False)
        self.energy = nn.Linear(inner, 1, bias=False)
        self.decoder = nn.Linear(2 * inner, config.hidden, bias=False)
        normal_(self.item_embeddings, xavier_std(self.item_embeddings), seeded_generator(seed, "embeddings"))
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
        for layer in (self.query, self.key, self.energy, self.decoder):
            normal_(layer.weight, xavier_std(layer.weight), generator)

    def encode(
        self, inputs_embeds: Tensor, positions: Tensor, *, dropout: DropoutStream | None = None
    ) -> Tensor:
        states = inputs_embeds
        if dropout is not None:
            states = dropout(states, self.config.embedding_dropout)
        states = recurrent_states(self.recurrent, states, positions)
        last = states.gather(1, positions.unsqueeze(-1).expand(-1, -1, states.shape[-1]))  # (batch, k, inner)
        energy = self.energy.weight.squeeze(0)
        local = additive_attention(self.query(last), states, self.key.weight, energy, positions + 1)
        session = torch.cat([last, local], dim=-1)
        if dropout is not None:
            session = dropout(session, self.config.session_dropout)
        return self.decoder(session)
