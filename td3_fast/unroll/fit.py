"""Step 3 of the method: an ordinary training run of a learner, on a summary instead of the log."""

from __future__ import annotations

import torch
from torch import Tensor

from td3_fast.learners import FlatParameters, Learner
from td3_fast.progress import Progress, silent
from td3_fast.summary import TuckerSummary
from td3_fast.unroll.adam import AdamConfig, initial_state
from td3_fast.unroll.inner import InnerLoop, ItemEmbedding
from td3_fast.unroll.mixture import (
    CachedMixture,
    FixedEmbeddings,
    ItemMixture,
    LinearMixture,
    StreamedMixture,
)

CACHED_PROBABILITIES_LIMIT = 512 * 2**20


def make_mixture(
    queries: Tensor,  # (μ, ζ, r)
    item_factors: Tensor,  # (n, r)
    *,
    normalize: str,
    cached_limit: int = CACHED_PROBABILITIES_LIMIT,
) -> ItemMixture:
    """Soft embeddings for a table that is trained: probabilities are kept where they and their gradient fit in
    `cached_limit` bytes, else recomputed."""
    if normalize == "none":
        return LinearMixture(queries, item_factors)
    size = 2 * queries[..., 0].numel() * len(item_factors) * queries.element_size()
    return (
        CachedMixture(queries, item_factors)
        if size <= cached_limit
        else StreamedMixture(queries, item_factors)
    )


@torch.no_grad()
def fit_on_summary(
    learner: Learner,
    summary: TuckerSummary,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    weight_decay: float = 5e-5,
    item_embedding: ItemEmbedding = "trained",
    augmentation: bool = True,
    separate_passes: bool = False,
    seed: int = 0,
    cached_limit: int = CACHED_PROBABILITIES_LIMIT,
    progress: Progress = silent,
) -> list[float]:
    """Train `learner` in place on a summary with the inner loss; returns the loss of each step.

    `item_embedding="frozen"` keeps the learner's item table as it is. The loss leaves out the entropy of the summary,
    which no learner can change; `cached_limit` is that of `make_mixture`. Same seed, same result.
    """
    items = learner.item_embeddings.detach()
    loop = InnerLoop(
        learner=learner,
        num_users=summary.num_users,
        num_positions=summary.num_positions,
        batch_size=batch_size,
        adam=AdamConfig(learning_rate=learning_rate, weight_decay=weight_decay),
        seed=seed,
        augmentation=augmentation,
        separate_passes=separate_passes,
    )
    flat = FlatParameters(learner)
    theta = flat.gather(learner.state_dict())
    start: tuple[Tensor, ...]
    mixture: ItemMixture
    if item_embedding == "trained":
        start = (theta, items)
        mixture = make_mixture(
            summary.queries(), summary.item_factors, normalize=summary.normalize, cached_limit=cached_limit
        )
    else:
        start = (theta,)
        mixture = FixedEmbeddings(summary(item_embeddings=items))
    with torch.enable_grad():
        state, losses = loop.run(initial_state(start), items, mixture, until=steps, progress=progress)
    flat.write(learner, *state.parameters)
    return losses
