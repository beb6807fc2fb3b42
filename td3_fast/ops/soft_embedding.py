"""Soft embedding: the expectation of item values under a softmax over all items."""

from typing import Any

import torch
from torch import Tensor

from td3_fast.ops.batching import register_vmap
from td3_fast.ops.library import Backend, register_fake, require_fused, use_fused
from td3_fast.ops.precision import autocast_off, widened


def soft_embedding(
    queries: Tensor,  # (rows, rank)
    keys: Tensor,  # (n, rank)
    values: Tensor,  # (n, d)
    *,
    backend: Backend = "fused",
) -> tuple[Tensor, Tensor]:
    """``softmax(queries @ keys.T) @ values`` and ``logsumexp(queries @ keys.T)``, both over the items.

    The fused backend reads the two tables once per pass and never forms a (rows, n) tensor.
    Twice differentiable in every input and through both outputs; a third order raises. Under autocast queries of half
    precision are taken in float32, and so is all that is computed.

    Args:
        queries: (rows, rank).
        keys: (n, rank), n >= 1, of the dtype of ``queries``, or float16 or bfloat16 beside float32 queries.
        values: (n, d), of the dtype of ``keys``.
        backend: "fused" kernels, or the dense "reference" in plain PyTorch.

    Returns:
        The embedding (rows, d) in the dtype of ``queries``, and the logsumexp (rows,) in that dtype or
        float32, whichever is wider.

    Raises:
        ValueError: shapes, dtypes or devices do not agree, or there is no item.
    """
    queries = widened(queries)
    if use_fused(backend, queries.device):
        return torch.ops.td3_fast.soft_embedding(queries, keys, values)
    with autocast_off(queries):
        return reference(queries, keys, values)


def check_tables(queries: Tensor, keys: Tensor, values: Tensor) -> None:
    """Raise ValueError where the inputs of a soft embedding do not fit together."""
    if queries.dim() != 2 or keys.dim() != 2 or values.dim() != 2:
        raise ValueError("queries, keys and values must be matrices")
    if queries.shape[1] != keys.shape[1] or keys.shape[0] != values.shape[0] or keys.shape[0] == 0:
        raise ValueError(
            "expected queries (rows, rank), keys (n, rank) and values (n, d) with n >= 1, "
            f"got {tuple(queries.shape)}, {tuple(keys.shape)}, {tuple(values.shape)}"
        )
    half_table = queries.dtype == torch.float32 and keys.dtype in (torch.float16, torch.bfloat16)
    if keys.dtype != values.dtype or (keys.dtype != queries.dtype and not half_table):
        raise ValueError(f"dtypes do not fit together: {queries.dtype}, {keys.dtype}, {values.dtype}")


def reference(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """`soft_embedding` with every intermediate formed, differentiable to any order."""
    check_tables(queries, keys, values)
    accumulate = torch.promote_types(queries.dtype, torch.float32)
    scores = queries.to(accumulate) @ keys.to(accumulate).T  # (rows, n)
    embedding = scores.softmax(-1) @ values.to(accumulate)
    return embedding.to(queries.dtype), scores.logsumexp(-1)


@register_fake("td3_fast::soft_embedding_forward")
def _(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, d = queries.shape[0], values.shape[1]
    logsumexp = queries.new_empty((rows,), dtype=torch.promote_types(queries.dtype, torch.float32))
    return queries.new_empty((rows, d)), logsumexp, torch.empty_like(logsumexp)


@register_fake("td3_fast::soft_embedding_backward")
def _(
    grad_embedding: Tensor | None,
    grad_logsumexp: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    embedding: Tensor,
    logsumexp: Tensor,
    remainder: Tensor,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    return gradients_like((queries, keys, values), needed)


@register_fake("td3_fast::soft_embedding_double_backward")
def _(
    grad_grad_queries: Tensor | None,
    grad_grad_keys: Tensor | None,
    grad_grad_values: Tensor | None,
    grad_embedding: Tensor | None,
    grad_logsumexp: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    embedding: Tensor,
    logsumexp: Tensor,
    remainder: Tensor,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    return gradients_like((queries, keys, values, embedding, logsumexp), needed)


def gradients_like(inputs: tuple[Tensor, ...], needed: list[bool]) -> tuple[Tensor, ...]:
    """Fakes of the gradients of ``inputs``: of their shapes where needed, else empty."""
    return tuple(x.new_empty(x.shape if wanted else 0) for x, wanted in zip(inputs, needed, strict=True))


# The derivatives are autograd nodes in csrc/soft_embedding_autograd.cpp; in Python each would cost the inner loop
# about as much as its kernel. They make soft_embedding_forward and soft_embedding_backward differentiable; what
# would be the third order raises. README.md derives the formulas.
for _name in ("soft_embedding_forward", "soft_embedding_backward", "soft_embedding_double_backward"):
    register_vmap(_name)


class SoftEmbedding(torch.autograd.Function):
    """`soft_embedding` as a `torch.autograd.Function`, for code that is written in terms of them.

    ``SoftEmbedding.apply(queries, keys, values)`` gives the embedding, the logsumexp, and what rounding took
    from the logsumexp, which is saved for the derivatives and not differentiable itself. Differentiable as
    `soft_embedding` in reverse mode, and under `torch.vmap`; forward mode is `soft_embedding`'s alone, and so
    are half-precision queries at full accuracy. Raises RuntimeError where no fused kernels are built.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        require_fused(queries.device)
        return torch.ops.td3_fast.soft_embedding_forward(queries, keys, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[0] is None and grads[1] is None:
            return None, None, None
        needed = list(ctx.needs_input_grad)
        # Differentiable in its turn, by the operator's own autograd node.
        gradients = torch.ops.td3_fast.soft_embedding_backward(*grads[:2], *ctx.saved_tensors, needed)
        return only_needed(gradients, needed)


def only_needed(gradients: tuple[Tensor, ...], needed: list[bool]) -> tuple[Tensor | None, ...]:
    """None in the place of every gradient that was not asked for."""
    return tuple(x if wanted else None for x, wanted in zip(gradients, needed, strict=True))
