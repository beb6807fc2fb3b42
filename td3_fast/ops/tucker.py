"""Tucker reconstruction of a summary, fused with the product by an item table."""

from typing import Literal

import torch
from torch import Tensor

from td3_fast.ops.library import Backend
from td3_fast.ops.precision import autocast_off, widened
from td3_fast.ops.soft_embedding import soft_embedding

Normalize = Literal["softmax", "none"]


def tucker_queries(
    core: Tensor,  # (d1, d2, d3)
    user_factors: Tensor,  # (u, d1)
    position_factors: Tensor,  # (p, d2)
) -> Tensor:
    """``core x_1 user_factors x_2 position_factors``: (u, p, d3), a query per user and position."""
    core, user_factors, position_factors = map(widened, (core, user_factors, position_factors))
    users, (d1, d2, d3) = user_factors.shape[0], core.shape
    with autocast_off(core):  # what a softmax is taken of
        by_user = (user_factors @ core.reshape(d1, d2 * d3)).view(users, d2, d3)
        return position_factors @ by_user


def tucker_soft_embedding(
    core: Tensor,  # (d1, d2, d3)
    user_factors: Tensor,  # (u, d1)
    position_factors: Tensor,  # (p, d2)
    item_factors: Tensor,  # (n, d3)
    item_embeddings: Tensor,  # (n, d)
    *,
    normalize: Normalize = "softmax",
    backend: Backend = "fused",
) -> Tensor:
    """``normalized(core x_1 user_factors x_2 position_factors x_3 item_factors) @ item_embeddings``.

    The (u, p, n) tensor of probabilities is never formed on the fused backend. With ``normalize="none"`` the
    bare product is reassociated to ``queries @ (item_factors.T @ item_embeddings)`` on either backend.
    Differentiable as `soft_embedding` is.

    Args:
        core: (d1, d2, d3).
        user_factors: (u, d1).
        position_factors: (p, d2).
        item_factors: (n, d3).
        item_embeddings: (n, d).
        normalize: "softmax" over items, or "none".
        backend: "fused" kernels, or the dense "reference" in plain PyTorch.

    Returns:
        The soft embeddings (u, p, d).

    Raises:
        ValueError: as `soft_embedding`, or an unknown ``normalize``.

    Source: TD3 (WWW '25), its equations of the summary and of the soft embedding; see ops/README.md.
    """
    queries = tucker_queries(core, user_factors, position_factors)
    return normalized_embedding(queries, item_factors, item_embeddings, normalize=normalize, backend=backend)


def normalized_embedding(
    queries: Tensor,  # (u, p, r)
    keys: Tensor,  # (n, r)
    item_embeddings: Tensor,  # (n, d)
    *,
    normalize: Normalize = "softmax",
    backend: Backend = "fused",
) -> Tensor:
    """``normalized(queries @ keys.T) @ item_embeddings``, (u, p, d): what `tucker_soft_embedding` makes of its queries.

    Arguments, derivatives and errors as there.
    """
    if normalize == "softmax":
        embedding, _ = soft_embedding(queries.flatten(0, 1), keys, item_embeddings, backend=backend)
        return embedding.view(*queries.shape[:2], embedding.shape[-1])
    if normalize == "none":
        accumulate = torch.promote_types(queries.dtype, torch.float32)
        queries = widened(queries)
        with autocast_off(queries):
            table = keys.to(accumulate).T @ item_embeddings.to(accumulate)
            return (queries.to(accumulate) @ table).to(queries.dtype)
    raise ValueError(f'normalize must be "softmax" or "none", got {normalize!r}')
