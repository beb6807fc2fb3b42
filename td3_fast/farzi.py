"""Farzi: synthetic sequences in a latent space, and a decoder of items that is learned with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from td3_fast.ops import seeded_generator
from td3_fast.ops.tucker import Normalize
from td3_fast.summary_base import Summary, check_floating, check_normalize, check_positions
from td3_fast.summary_file import SummaryMetadata

LATENT_SD = 0.02


class FarziSummary(Summary):
    """S = normalized(latents decoder), (users, positions, n), with both factors learned.

    `latents` (users, positions, r) are the synthetic sequences, `decoder` (n, r) gives each item a row to compare
    them with: it grows with the catalogue, where a Tucker summary takes the pretrained item table for it.
    `item_factors`, that table, is carried for learners to start from and has no part in S.
    Source: Farzi (Sachdeva et al., 2023), as the paper of TD3 compares with it.

    Args:
        latents: (users, positions, r).
        decoder: (n, r).
        item_factors: (n, d3), row 0 the padding item.
        position_embeddings: (positions, at most d3), the pretrained learner's.
        normalize: "softmax" over items, or "none", the bare product.
        metadata: what the summary stands for; needed for `save`.

    Raises:
        ValueError: shapes or dtypes do not agree, or `normalize` is unknown.
    """

    kind = "td3_fast.FarziSummary"
    factor_names = ("latents", "decoder")

    def __init__(
        self,
        latents: Tensor,
        decoder: Tensor,
        item_factors: Tensor,
        *,
        position_embeddings: Tensor | None = None,
        normalize: Normalize = "softmax",
        metadata: SummaryMetadata | None = None,
    ) -> None:
        super().__init__()
        check_normalize(normalize)
        _check_factors(latents, decoder, item_factors, position_embeddings)
        self.latents = nn.Parameter(latents)
        self.decoder = nn.Parameter(decoder)
        self._carry(item_factors, position_embeddings, normalize, metadata)

    @classmethod
    def initialise(
        cls,
        *,
        users: int,
        positions: int,
        rank: int,
        item_factors: Tensor,  # (n, d3)
        seed: int,
        normalize: Normalize = "softmax",
    ) -> FarziSummary:
        """A summary to start from: latents ~ N(0, 0.02²), the decoder Kaiming-normal, N(0, 2 / rank).

        So S starts near the uniform distribution, and neither factor without a gradient from the other. Drawn on
        the CPU in float64, then cast and moved to where `item_factors` are.
        """
        for name, size in {"users": users, "positions": positions, "rank": rank}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        generator = seeded_generator(seed, "summary")

        def normal(*shape: int, sd: float) -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * sd
            # an item table may be kept in 16 bits, what is learned is not
            return drawn.to(item_factors.device, torch.promote_types(item_factors.dtype, torch.float32))

        return cls(
            normal(users, positions, rank, sd=LATENT_SD),
            normal(len(item_factors), rank, sd=(2 / rank) ** 0.5),
            item_factors,
            normalize=normalize,
        )

    @property
    def num_users(self) -> int:
        return self.latents.shape[0]

    @property
    def num_positions(self) -> int:
        return self.latents.shape[1]

    def queries_and_keys(
        self, factors: tuple[Tensor, ...] | None = None, users: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The latents (u, positions, r) and the decoder (n, r)."""
        latents, decoder = self.factors if factors is None else factors
        return (latents if users is None else latents[users]), decoder

    def extra_repr(self) -> str:
        rank = self.latents.shape[2]
        return f"{self.size}, rank={rank}, num_items={self.num_items}, normalize={self.normalize!r}"


def _check_factors(
    latents: Tensor, decoder: Tensor, item_factors: Tensor, position_embeddings: Tensor | None
) -> None:
    if latents.ndim != 3:
        raise ValueError(f"latents must have the shape (users, positions, r), got {tuple(latents.shape)}")
    if item_factors.ndim != 2:
        raise ValueError(f"item_factors must have the shape (n, d3), got {tuple(item_factors.shape)}")
    expected = (len(item_factors), latents.shape[2])
    if tuple(decoder.shape) != expected:
        raise ValueError(f"decoder must have the shape {expected}, got {tuple(decoder.shape)}")
    check_positions(
        position_embeddings, item_factors.shape[1], f"item factors of {tuple(item_factors.shape)}"
    )
    floating = {"latents": latents, "decoder": decoder, "item_factors": item_factors}
    if position_embeddings is not None:
        floating["position_embeddings"] = position_embeddings
    check_floating(floating)
    if latents.dtype != decoder.dtype:
        raise ValueError(f"latents and decoder must have one dtype, got {latents.dtype} and {decoder.dtype}")
