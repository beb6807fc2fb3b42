"""Cross-entropy over all items, for class targets and for soft-embedding targets."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from td3_fast.ops.batching import register_vmap
from td3_fast.ops.library import Backend, register_fake, require_fused, use_fused
from td3_fast.ops.precision import autocast_off, widened
from td3_fast.ops.soft_embedding import check_tables, gradients_like, only_needed

# As in csrc/cpu (kept.h): rows of a panel fill 64 bytes, and items are cut into chunks.
_PANEL_BYTES = 64
_KEPT_BYTES, _KEPT_BYTES_BESIDE_TABLE = (67 << 20) // 2, 16 << 20
_CHUNKS, _SMALLEST_CHUNK, _LARGEST_CHUNK = 64, 256, 1024


def item_cross_entropy(
    hidden: Tensor,  # (rows, d)
    item_embeddings: Tensor,  # (n, d)
    target: Tensor,  # (rows,) int64, or (rows, d) floating
    *,
    backend: Backend = "fused",
) -> Tensor:
    """``logsumexp(hidden @ item_embeddings.T) - target_score``, one value per row.

    For an integer target the score is that of the item, and the value is the cross-entropy. A floating
    target is a row of ``soft_embedding(c, v, item_embeddings)``; its score is ``hidden . target``, and the
    value is the cross-entropy to the distribution softmax(c v^T) that it stands for.

    The fused backend reads the item table once per pass. Where items are trained it keeps (rows, n) numbers
    between orders on the CPU while they are few (up to 33.5 MiB), and none else. Twice differentiable in hidden,
    item_embeddings and a floating target; a third order raises. Under autocast hidden states of half precision are
    taken in float32, and so is all that is computed.

    Args:
        hidden: (rows, d).
        item_embeddings: (n, d), n >= 1, of the dtype of ``hidden``, or float16 or bfloat16 beside float32.
        target: (rows,) int64 item ids, or (rows, d) of the dtype of ``hidden``.
        backend: "fused" kernels, or the dense "reference" in plain PyTorch.

    Returns:
        (rows,), in the dtype of ``hidden`` or float32, whichever is wider.

    Raises:
        ValueError: shapes, dtypes or devices do not agree, or there is no item.
        IndexError: a target is not an item id.
    """
    expected = hidden.shape if target.is_floating_point() else hidden.shape[:1]
    if target.shape != expected:
        raise ValueError(f"expected a target of shape {tuple(expected)}, got {tuple(target.shape)}")
    hidden = widened(hidden)
    if not target.is_floating_point():
        if use_fused(backend, hidden.device):
            return torch.ops.td3_fast.class_cross_entropy(hidden, item_embeddings, target)
        target = F.embedding(target, item_embeddings)
    logsumexp = item_logsumexp(hidden, item_embeddings, backend=backend)
    return logsumexp - (hidden.to(logsumexp.dtype) * target).sum(-1)


def item_logsumexp(
    hidden: Tensor,  # (rows, d)
    item_embeddings: Tensor,  # (n, d)
    *,
    backend: Backend = "fused",
) -> Tensor:
    """``logsumexp(hidden @ item_embeddings.T)``, (rows,): `item_cross_entropy` without the target's score.

    Differentiable as that is. Where items are split over processes, this is what each has of its own.
    """
    hidden = widened(hidden)
    if use_fused(backend, hidden.device):
        return torch.ops.td3_fast.item_logsumexp(hidden, item_embeddings)
    with autocast_off(hidden):
        return reference_logsumexp(hidden, item_embeddings)


def reference_logsumexp(hidden: Tensor, item_embeddings: Tensor) -> Tensor:
    """``logsumexp(hidden @ item_embeddings.T)`` with the scores formed, differentiable to any order."""
    check_tables(hidden, item_embeddings, item_embeddings)
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.to(accumulate) @ item_embeddings.to(accumulate).T).logsumexp(-1)


def kept_score_bytes(rows: int, n: int, d: int, itemsize: int, table_itemsize: int | None = None) -> int:
    """Bytes of probabilities that the CPU's kernels keep between orders.

    Of `rows` on a table (n, d) of `table_itemsize` bytes a number, that of accumulators (`itemsize`) if left out.
    """
    chunks = max(min(_CHUNKS, math.ceil(n / _SMALLEST_CHUNK)), math.ceil(n / _LARGEST_CHUNK))
    panels = math.ceil(rows * itemsize / _PANEL_BYTES)
    sums = panels * _PANEL_BYTES * chunks * d
    beside_table = _KEPT_BYTES_BESIDE_TABLE + n * d * (table_itemsize or itemsize) * 3 // 2
    room = max(min(_KEPT_BYTES, beside_table) - sums, 0)
    of_panel = _PANEL_BYTES * (n + chunks)
    fitting = min(panels, room // of_panel)
    return fitting * of_panel if 2 * fitting >= panels else 0


@register_fake("td3_fast::item_logsumexp_forward")
def fake_logsumexp(hidden: Tensor, items: Tensor, save: bool, keep: bool) -> tuple[Tensor, ...]:
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    (rows, d), n = hidden.shape, items.shape[0]
    kept = 0
    if save and keep and hidden.device.type == "cpu":
        kept = kept_score_bytes(rows, n, d, accumulate.itemsize, items.dtype.itemsize) // accumulate.itemsize
    logsumexp = hidden.new_empty((rows,), dtype=accumulate)
    mean = logsumexp.new_empty((rows, d) if save else (0,))
    return logsumexp, torch.empty_like(logsumexp), mean, logsumexp.new_empty((kept,))


@register_fake("td3_fast::item_logsumexp_backward")
def _(
    grad_logsumexp: Tensor,
    hidden: Tensor,
    items: Tensor,
    logsumexp: Tensor,
    remainder: Tensor,
    mean: Tensor,
    probabilities: Tensor,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    return gradients_like((hidden, items), needed)


@register_fake("td3_fast::item_logsumexp_double_backward")
def _(
    grad_grad_hidden: Tensor | None,
    grad_grad_items: Tensor | None,
    grad_logsumexp: Tensor,
    hidden: Tensor,
    items: Tensor,
    logsumexp: Tensor,
    remainder: Tensor,
    mean: Tensor,
    probabilities: Tensor,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    return gradients_like((logsumexp, hidden, items), needed)


@register_fake("td3_fast::class_cross_entropy_forward")
def _(hidden: Tensor, items: Tensor, target: Tensor, save: bool, keep: bool) -> tuple[Tensor, ...]:
    logsumexp, *saved = fake_logsumexp(hidden, items, save, keep)
    return torch.empty_like(logsumexp), logsumexp, *saved


@register_fake("td3_fast::class_cross_entropy_backward")
def _(grad_loss: Tensor, hidden: Tensor, items: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return gradients_like((hidden, items), rest[-1])


@register_fake("td3_fast::class_cross_entropy_double_backward")
def _(
    grad_grad_hidden: Tensor | None,
    grad_grad_items: Tensor | None,
    grad_loss: Tensor,
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    logsumexp: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return gradients_like((logsumexp, hidden, items), rest[-1])


# The derivatives are autograd nodes in csrc/cross_entropy_autograd.cpp, as those of soft_embedding are.
for _name in ("item_logsumexp", "class_cross_entropy"):
    for _order in ("forward", "backward", "double_backward"):
        register_vmap(f"{_name}_{_order}")


class ItemLogsumexp(torch.autograd.Function):
    """``logsumexp(hidden @ items.T)``, the item side of the loss, as a `torch.autograd.Function`.

    ``ItemLogsumexp.apply(hidden, items)`` gives the logsumexp and three tensors saved for the derivatives, not
    differentiable themselves: what rounding took from it, the expected item row, and probabilities where few.
    Differentiable as `item_cross_entropy` in reverse mode, and under `torch.vmap`; forward mode is
    `item_cross_entropy`'s alone. Raises RuntimeError where no fused kernels are built.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: Tensor, items: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        require_fused(hidden.device)
        return torch.ops.td3_fast.item_logsumexp_forward(hidden, items, True, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return None, None
        needed = list(ctx.needs_input_grad)
        gradients = torch.ops.td3_fast.item_logsumexp_backward(grads[0], *ctx.saved_tensors, needed)
        return only_needed(gradients, needed)
