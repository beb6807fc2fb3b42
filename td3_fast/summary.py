"""A summary of synthetic users: its factors, what they stand for, and the file that holds both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from td3_fast.ops import seeded_generator, tucker_queries, tucker_soft_embedding
from td3_fast.ops.tucker import Normalize

if TYPE_CHECKING:
    from td3_fast.learners import Learner

FACTOR_SD = 0.02


class SummaryError(ValueError):
    """A summary cannot be read or written; the message names the file, what is wrong and what to do."""


class TuckerSummary(nn.Module):
    """S = normalized(core x_1 user_factors x_2 position_factors x_3 item_factors), (users, positions, n).

    S holds a probability over items at each position of each synthetic user; it is never formed unless asked
    for. `core`, `user_factors` and `position_factors` are parameters; `item_factors`, the item table of the
    pretrained learner, is a buffer and never learned. Source: TD3 (WWW '25).

    Args:
        core: (d1, d2, d3).
        user_factors: (users, d1).
        position_factors: (positions, d2).
        item_factors: (n, d3), row 0 the padding item.
        normalize: "softmax" over items, or "none", the bare product.

    Raises:
        ValueError: the shapes do not agree, or `normalize` is unknown.
    """

    item_factors: Tensor

    def __init__(
        self,
        core: Tensor,
        user_factors: Tensor,
        position_factors: Tensor,
        item_factors: Tensor,
        *,
        normalize: Normalize = "softmax",
    ) -> None:
        super().__init__()
        if normalize not in ("softmax", "none"):
            raise ValueError(f'normalize must be "softmax" or "none", got {normalize!r}')
        self.core = nn.Parameter(core)
        self.user_factors = nn.Parameter(user_factors)
        self.position_factors = nn.Parameter(position_factors)
        self.register_buffer("item_factors", item_factors)
        self.normalize: Normalize = normalize

    @classmethod
    def initialise(
        cls,
        *,
        users: int,
        positions: int,
        user_rank: int,
        position_rank: int,
        item_factors: Tensor,  # (n, d3)
        seed: int,
        normalize: Normalize = "softmax",
    ) -> TuckerSummary:
        """A summary to start from: user and position factors ~ N(0, 0.02^2), the core Kaiming-normal.

        The core's standard deviation is sqrt(2 / (d2 d3)). Drawn on the CPU in float64, then cast and moved to
        the dtype and device of `item_factors`: the same seed gives the same summary everywhere.
        """
        for name, count in {
            "users": users,
            "positions": positions,
            "user_rank": user_rank,
            "position_rank": position_rank,
        }.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        generator = seeded_generator(seed, "summary")

        def normal(*shape: int, sd: float) -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * sd
            return drawn.to(item_factors.device, item_factors.dtype)

        rank = item_factors.shape[-1]
        return cls(
            normal(user_rank, position_rank, rank, sd=(2 / (position_rank * rank)) ** 0.5),
            normal(users, user_rank, sd=FACTOR_SD),
            normal(positions, position_rank, sd=FACTOR_SD),
            item_factors,
            normalize=normalize,
        )

    @property
    def num_users(self) -> int:
        return self.user_factors.shape[0]

    @property
    def num_positions(self) -> int:
        return self.position_factors.shape[0]

    @property
    def num_items(self) -> int:
        """Items, the padding item 0 included."""
        return self.item_factors.shape[0]

    @property
    def size(self) -> str:
        """Users x positions, as in "50x50"."""
        return f"{self.num_users}x{self.num_positions}"

    def queries(self, users: Tensor | None = None) -> Tensor:
        """core x_1 user_factors x_2 position_factors of the users (u,) at these indices: (u, positions, d3)."""
        return tucker_queries(self.core, self._chosen(users), self.position_factors)

    def forward(self, users: Tensor | None = None, item_embeddings: Tensor | None = None) -> Tensor:
        """Soft embeddings S @ item_embeddings, (u, positions, d), without forming S.

        users: (u,) int64 indices, all users by default; item_embeddings: (n, d), `item_factors` by default.
        """
        table = self.item_factors if item_embeddings is None else item_embeddings
        return tucker_soft_embedding(
            self.core,
            self._chosen(users),
            self.position_factors,
            self.item_factors,
            table,
            normalize=self.normalize,
        )

    def probabilities(self, users: Tensor | None = None) -> Tensor:
        """S itself, (u, positions, n): as many numbers as that. With `normalize="none"` the bare product."""
        scores = self.queries(users) @ self.item_factors.T
        return scores.softmax(-1) if self.normalize == "softmax" else scores

    def fit(self, learner: Learner, **options: Any) -> list[float]:
        """Train `learner` in place on this summary; `options` and result as `td3_fast.unroll.fit_on_summary`."""
        from td3_fast.unroll import fit_on_summary

        return fit_on_summary(learner, self, **options)

    def extra_repr(self) -> str:
        core = tuple(self.core.shape)
        return f"{self.size}, core={core}, num_items={self.num_items}, normalize={self.normalize!r}"

    def _chosen(self, users: Tensor | None) -> Tensor:
        return self.user_factors if users is None else self.user_factors[users]
