"""Factors to start a distillation from that stand for sequences of the log instead of noise."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from td3_fast.data import Examples
from td3_fast.summary import TuckerSummary


def training_sequences(train: Examples, *, users: int, positions: int, seed: int) -> NDArray[np.int64]:
    """Item sequences of randomly drawn users, (users, positions), in the order of time.

    Each is the last `positions` training items of a user; one who has fewer is preceded by the next drawn, until the
    positions are filled. Users are drawn again once all have been.

    Raises:
        ValueError: there is no training example.
    """
    if len(train) == 0:
        raise ValueError(
            "no training example to take sequences from: fewer filters would leave more of the log"
        )
    log = train.interactions
    known, last = np.unique(train.users[::-1], return_index=True)  # the last training target of each user
    first, end = log.offsets[known], train.ends[::-1][last] + 1
    generator = np.random.Generator(np.random.Philox(seed))
    order = np.empty(0, dtype=np.int64)
    sequences = np.empty((users, positions), dtype=np.int64)
    for sequence in sequences:
        filled = positions
        while filled:
            if not len(order):
                order = generator.permutation(len(known))
            user, order = order[0], order[1:]
            taken = min(int(end[user] - first[user]), filled)
            sequence[filled - taken : filled] = log.items[end[user] - taken : end[user]]
            filled -= taken
    return sequences


def summary_of_sequences(
    embedded: Tensor,  # (users, positions, d3)
    item_factors: Tensor,  # (n, d3)
    *,
    user_rank: int,
    position_rank: int,
    sharpness: float,
    seed: int,
) -> TuckerSummary:
    """A Tucker summary whose distributions lie around given items.

    The query of a position is its item's factors, `embedded`, scaled so that an item scores `sharpness` nats on its own
    query on average; the tensor of queries is truncated to the ranks by a higher-order SVD. Ranks beyond what the
    tensor has are filled with the noise of `TuckerSummary.initialise`, to no effect until they are learned. Computed in
    float64.

    Raises:
        ValueError: a rank or size is below 1.
    """
    users, positions, _ = embedded.shape
    noise = TuckerSummary.initialise(
        users=users,
        positions=positions,
        user_rank=user_rank,
        position_rank=position_rank,
        item_factors=item_factors,
        seed=seed,
    )
    embedded = embedded.double()
    own_score = embedded.square().sum(-1).mean()
    queries = embedded * (sharpness / own_score)
    user_factors, position_factors = noise.user_factors.double(), noise.position_factors.double()
    user_basis = _left_singular(queries.flatten(1), user_rank)
    position_basis = _left_singular(queries.transpose(0, 1).flatten(1), position_rank)
    core = torch.zeros_like(noise.core, dtype=torch.float64)
    kept = torch.einsum("utd,ua,tb->abd", queries, user_basis, position_basis)
    core[: kept.shape[0], : kept.shape[1]] = kept
    with torch.no_grad():
        user_factors[:, : user_basis.shape[1]] = user_basis
        position_factors[:, : position_basis.shape[1]] = position_basis
        for parameter, value in zip(
            (noise.core, noise.user_factors, noise.position_factors),
            (core, user_factors, position_factors),
            strict=True,
        ):
            parameter.copy_(value)
    return noise


def _left_singular(matrix: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors, (rows, rank or fewer), each with its largest entry positive."""
    vectors = torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]
    largest = vectors.abs().argmax(0, keepdim=True)
    return vectors * vectors.gather(0, largest).sign()
