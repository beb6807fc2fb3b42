"""Rank of the target among all items, or among given candidates."""

import torch
from torch import Tensor

from td3_fast.ops.library import Backend, register_fake, use_fused
from td3_fast.ops.precision import autocast_off, widened


def target_rank(
    hidden: Tensor,  # (rows, d)
    item_embeddings: Tensor,  # (n, d)
    target: Tensor,  # (rows,) int64
    *,
    candidates: Tensor | None = None,  # (rows, k) int64
    excluded: tuple[Tensor, Tensor] | None = None,  # (rows + 1,) and (nnz,) int64
    exclude_padding: bool = True,
    backend: Backend = "fused",
) -> Tensor:
    """One plus the number of other candidates that score at least as high as the target.

    The score is ``hidden . item_embedding``. Ties count against the model, and so does a score that is not
    a number. The fused backend never forms a (rows, n) matrix. Not differentiable.

    Args:
        hidden: (rows, d).
        item_embeddings: (n, d), of the dtype of ``hidden``, or float16 or bfloat16 beside float32.
        target: (rows,) item ids.
        candidates: (rows, k) item ids to rank against; the target's own id among them is not counted.
            None ranks against every item.
        excluded: offsets (rows + 1,) and item ids (nnz,) of what each row leaves out of the full ranking,
            ``items[offsets[row]:offsets[row + 1]]``, in any order, repeats allowed. The target always stays.
        exclude_padding: leave item 0 out of the full ranking.
        backend: "fused" kernels, or the dense "reference" in plain PyTorch.

    Returns:
        (rows,) int64, from 1.

    Raises:
        ValueError: shapes, dtypes or devices do not agree, or both ``candidates`` and ``excluded`` are given.
        IndexError: an id is not an item.
    """
    if candidates is not None and excluded is not None:
        raise ValueError("candidates already say what is ranked; excluded applies to the full ranking only")
    hidden = widened(hidden)
    if use_fused(backend, hidden.device):
        if candidates is not None:
            return torch.ops.td3_fast.candidate_rank(hidden, item_embeddings, target, candidates)
        offsets, items = (None, None) if excluded is None else excluded
        return torch.ops.td3_fast.target_rank(
            hidden, item_embeddings, target, offsets, items, exclude_padding
        )
    with autocast_off(hidden):
        return reference(hidden, item_embeddings, target, candidates, excluded, exclude_padding)


@torch.no_grad()
def reference(
    hidden: Tensor,
    item_embeddings: Tensor,
    target: Tensor,
    candidates: Tensor | None,
    excluded: tuple[Tensor, Tensor] | None,
    exclude_padding: bool,
) -> Tensor:
    """`target_rank` with every score formed."""
    rows = hidden.shape[0]
    if target.shape != (rows,) or (candidates is not None and candidates.shape[:1] != (rows,)):
        raise ValueError(f"expected a target, and a row of candidates, for each of {rows} rows")
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    hidden, table = hidden.to(accumulate), item_embeddings.to(accumulate)
    target = target[:, None]
    if candidates is not None:
        # The target is scored as one more candidate: equal embeddings then give equal scores.
        scores = (table[torch.cat([candidates, target], 1)] * hidden[:, None]).sum(-1)
        ahead = ~(scores[:, :-1] < scores[:, -1:]) & (candidates != target)
        return ahead.sum(1) + 1
    scores = hidden @ table.T
    ahead = ~(scores < scores.gather(1, target))
    if exclude_padding:
        ahead[:, 0] = False
    if excluded is not None:
        offsets, items = excluded
        row = torch.arange(rows, device=items.device).repeat_interleave(offsets.diff())
        ahead[row, items] = False
    ahead.scatter_(1, target, False)
    return ahead.sum(1) + 1


@register_fake("td3_fast::target_rank")
def _(
    hidden: Tensor,
    item_embeddings: Tensor,
    target: Tensor,
    excluded_offsets: Tensor | None,
    excluded_items: Tensor | None,
    exclude_padding: bool,
) -> Tensor:
    return torch.empty_like(target)


@register_fake("td3_fast::candidate_rank")
def _(hidden: Tensor, item_embeddings: Tensor, target: Tensor, candidates: Tensor) -> Tensor:
    return torch.empty_like(target)
