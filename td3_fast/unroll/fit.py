"""Step 3 of the method: an ordinary training run of a learner, on a summary instead of the log."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from td3_fast.learners import FlatParameters, Learner, check_encoder_dtype
from td3_fast.ops import full_precision
from td3_fast.parallel import WHOLE, ItemTables
from td3_fast.progress import Progress, silent
from td3_fast.summary import Summary
from td3_fast.unroll.adam import AdamConfig, initial_state
from td3_fast.unroll.fused import FusedLoop, may_be_fused
from td3_fast.unroll.inner import InnerLoop, ItemEmbedding
from td3_fast.unroll.mixture import (
    CachedMixture,
    FixedEmbeddings,
    ItemMixture,
    LinearMixture,
    StreamedMixture,
)
from td3_fast.unroll.recorded import CudaGraphs, RecordedLoop, Recorder, may_be_recorded

CACHED_PROBABILITIES_LIMIT = 2**30  # bytes


def make_mixture(
    queries: Tensor,  # (μ, ζ, r)
    keys: Tensor,  # (n, r)
    *,
    normalize: str,
    learned_keys: bool = False,
    cached_limit: int = CACHED_PROBABILITIES_LIMIT,
    tables: ItemTables = WHOLE,
) -> ItemMixture:
    """Soft embeddings for a table that is trained: probabilities are kept where they and their gradient fit in
    `cached_limit` bytes, else recomputed. With `learned_keys` the gradient is that of `flat_pair(queries, keys)`."""
    if normalize == "none":
        return LinearMixture(queries, keys, tables, learned_keys=learned_keys)
    size = 2 * queries[..., 0].numel() * tables.most_rows(keys) * queries.element_size()
    kept = CachedMixture if size <= cached_limit else StreamedMixture
    return kept(queries, keys, tables, learned_keys=learned_keys)


def _check(learner: Learner, steps: int, batch_size: int, item_embedding: str) -> None:
    if item_embedding not in get_args(ItemEmbedding):
        known = ", ".join(map(repr, get_args(ItemEmbedding)))
        raise ValueError(f"item_embedding must be one of {known}, got {item_embedding!r}")
    if steps < 0 or batch_size < 1:
        raise ValueError(
            f"training takes at least 0 steps of at least 1 user, got {steps} steps of {batch_size} users"
        )
    if item_embedding == "trained" and not learner.item_embeddings.requires_grad:
        raise ValueError(
            'the item table has requires_grad=False and would be trained: give item_embedding="frozen"'
        )
    check_encoder_dtype(learner)
    for name, parameter in learner.named_parameters():
        if name != "item_embeddings" and not parameter.requires_grad:
            raise ValueError(
                f"{name} has requires_grad=False and would be trained: all of an encoder is, set requires_grad=True"
            )


def _memory_of(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


@torch.no_grad()
@full_precision()
def fit_on_summary(
    learner: Learner,
    summary: Summary,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    weight_decay: float = 5e-5,
    item_embedding: ItemEmbedding = "trained",
    augmentation: bool = True,
    middle_positions: int = 1,
    dropout: bool = True,
    separate_passes: bool = False,
    seed: int = 0,
    tables: ItemTables = WHOLE,
    cached_limit: int = CACHED_PROBABILITIES_LIMIT,
    record: Recorder | None = None,
    progress: Progress = silent,
) -> list[float]:
    """Train `learner` in place on a summary with the inner loss; returns the loss of each step.

    `item_embedding="frozen"` keeps the learner's item table as it is. The loss leaves out the entropy of the summary,
    which no learner can change; `cached_limit` is that of `make_mixture`. Same seed, same result, on any number of
    threads (BERT4Rec's differs in rounding from one number to another). Where the table that is trained is the very one
    that the summary has, the learner gets a copy of its own. tables: where the item tables of both, if they are split
    over processes, have their other rows. record: how the step is recorded to be replayed, as `RecordedLoop` takes it;
    None: as a CUDA graph on a GPU, on the CPU not at all.

    Raises:
        FloatingPointError: the loss of a step is not finite; the learner is left as training left it.
        ValueError: an option is none of those that there are, or a parameter that would be trained has
            `requires_grad=False`: only the item table can be left as it is, by `item_embedding`.
    """
    _check(learner, steps, batch_size, item_embedding)
    items = learner.item_embeddings.detach()
    flat = FlatParameters(learner)
    loop = InnerLoop(
        learner=learner,
        num_users=summary.num_users,
        num_positions=summary.num_positions,
        batch_size=batch_size,
        adam=AdamConfig(learning_rate=learning_rate, weight_decay=weight_decay),
        seed=seed,
        augmentation=augmentation,
        middle_positions=middle_positions,
        dropout=dropout,
        separate_passes=separate_passes,
        tables=tables,
        flat=flat,
    )
    theta = flat.gather(learner.state_dict())
    start: tuple[Tensor, ...]
    mixture: ItemMixture
    queries, keys = summary.queries_and_keys()
    queries = queries.to(torch.promote_types(items.dtype, torch.float32))
    keys = keys.detach().to(items.dtype)
    if item_embedding == "trained":
        start = (theta, items)
        mixture = make_mixture(
            queries, keys, normalize=summary.normalize, cached_limit=cached_limit, tables=tables
        )
    else:
        start = (theta,)
        mixture = FixedEmbeddings(
            tables.normalized_embedding(queries, keys, items, normalize=summary.normalize)
        )
    if record is None and items.device.type == "cuda":
        record = CudaGraphs(items.device, use="fit")
    run = loop.run
    if record is not None and tables is WHOLE and may_be_recorded(start):
        run = RecordedLoop(loop, start, items, mixture, steps=steps, window=1, record=record).run
    elif may_be_fused(loop, start, items, mixture):
        run = FusedLoop(loop).run
    with torch.enable_grad():
        state, losses = run(initial_state(start), items, mixture, until=steps, progress=progress)
    if item_embedding == "trained" and _memory_of(items) == _memory_of(summary.item_factors):
        learner.item_embeddings.data = items.clone()
    flat.write(learner, *state.parameters)
    each: list[float] = losses.tolist()
    wrong = next((step for step, loss in enumerate(each, start=1) if not math.isfinite(loss)), None)
    if wrong is not None:
        raise FloatingPointError(
            f"the loss of step {wrong} of {steps} on the summary is not finite: lower the learning rate "
            f"({learning_rate:g})"
        )
    return each
