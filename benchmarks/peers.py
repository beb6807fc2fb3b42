"""The same values by other means. Each peer says the highest order it can be differentiated to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from td3_fast import ops

# Scores in one chunk of rows of the chunked peers.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


@dataclass(frozen=True, kw_only=True)
class Peer:
    function: Callable[..., Tensor]
    order: int = 2
    dense: bool = False  # forms tensors of rows x items
    compiled: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")


@functools.cache
def compile_once(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)


def compiled(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return compile_once(function)(*inputs)


def by_chunks(function: Callable[..., Tensor], rows: Tensor, items: Tensor, *rest: Tensor) -> Tensor:
    """`function` on as many rows at a time as fit the chunk, recomputed for the derivatives."""
    size = max(1, CHUNK_BYTES[rows.device.type] // (len(items) * rows.element_size()))
    chunks = zip(rows.split(size), *(x.split(size) for x in rest), strict=True)
    return torch.cat(
        [checkpoint(function, chunk, items, *others, use_reentrant=False) for chunk, *others in chunks]
    )


# ---- soft_embedding: (queries, keys, values) -> (rows, d) ----


def dense_embedding(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (queries @ keys.T).softmax(-1) @ values


def chunked_embedding(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return by_chunks(lambda q, k: dense_embedding(q, k, values), queries, keys)


def attention(backend: SDPBackend, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            queries[None, None], keys[None, None], values[None, None], scale=1.0
        )[0, 0]


SOFT_EMBEDDING = {
    "fused": Peer(function=lambda *inputs: ops.soft_embedding(*inputs)[0]),
    "dense eager": Peer(function=dense_embedding, dense=True),
    "dense compiled": Peer(
        function=functools.partial(compiled, dense_embedding), order=1, dense=True, compiled=True
    ),
    "chunked eager": Peer(function=chunked_embedding),
    "sdpa math": Peer(function=functools.partial(attention, SDPBackend.MATH), dense=True),
    "sdpa flash": Peer(function=functools.partial(attention, SDPBackend.FLASH_ATTENTION), order=1),
    "sdpa efficient": Peer(
        function=functools.partial(attention, SDPBackend.EFFICIENT_ATTENTION), order=1, devices=("cuda",)
    ),
    "sdpa cudnn": Peer(
        function=functools.partial(attention, SDPBackend.CUDNN_ATTENTION), order=1, devices=("cuda",)
    ),
}


# ---- item_cross_entropy: (hidden, items, target) -> the sum over rows ----


def dense_cross_entropy(hidden: Tensor, items: Tensor, target: Tensor) -> Tensor:
    scores = hidden @ items.T
    if not target.is_floating_point():
        return F.cross_entropy(scores, target, reduction="sum")
    return (scores.logsumexp(-1) - (hidden * target).sum(-1)).sum()


def chunked_cross_entropy(hidden: Tensor, items: Tensor, target: Tensor) -> Tensor:
    return by_chunks(lambda h, e, t: dense_cross_entropy(h, e, t)[None], hidden, items, target).sum()


def linear_cross_entropy(chunked: bool, hidden: Tensor, items: Tensor, target: Tensor) -> Tensor:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this version of PyTorch has no linear_cross_entropy by chunks")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return F.linear_cross_entropy(hidden, items, target, reduction="sum", options=options)


def cut_cross_entropy(hidden: Tensor, items: Tensor, target: Tensor) -> Tensor:
    library = pytest.importorskip("cut_cross_entropy")
    return library.linear_cross_entropy(hidden, items, target, reduction="sum")


def liger(hidden: Tensor, items: Tensor, target: Tensor) -> Tensor:
    library = pytest.importorskip("liger_kernel.transformers.functional")
    return library.liger_fused_linear_cross_entropy(hidden, items, target, reduction="sum")


ITEM_CROSS_ENTROPY = {
    "fused": Peer(function=lambda *inputs: ops.item_cross_entropy(*inputs).sum()),
    "dense eager": Peer(function=dense_cross_entropy, dense=True),
    "dense compiled": Peer(
        function=functools.partial(compiled, dense_cross_entropy), order=1, dense=True, compiled=True
    ),
    "chunked eager": Peer(function=chunked_cross_entropy),
}
# For integer targets.
LINEAR_CROSS_ENTROPY = {
    "linear_cross_entropy": Peer(function=functools.partial(linear_cross_entropy, False), dense=True),
    "linear_cross_entropy, chunked": Peer(function=functools.partial(linear_cross_entropy, True), order=1),
    "cut cross entropy": Peer(function=cut_cross_entropy, order=1, devices=("cuda",)),
    "liger": Peer(function=liger, order=1, devices=("cuda",)),
}
