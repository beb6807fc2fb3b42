"""What the tests of the ops share: an error budget, subsets of inputs, and peak memory."""

import ctypes
import gc
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from td3_fast import ops

STATUS = Path("/proc/self/status")
RESET_PEAK = Path("/proc/self/clear_refs")


def assert_within_budget(
    actual: Tensor, reference: Tensor, truth: Tensor, *, name: str = "", scale: float = 1.0
) -> None:
    """Allow twice the error that the same-dtype reference has against the float64 truth, and a margin.

    ``scale`` is the size of the terms that cancel in the result, in units of the result or of one.
    """
    assert actual.shape == truth.shape, name
    assert actual.dtype == reference.dtype, name
    if truth.numel() == 0:
        return
    error = (actual.double() - truth).abs().max()
    allowed = 2 * (reference.double() - truth).abs().max()
    # In float64 the reference is the truth and says nothing of the error that rounding makes. Results in half
    # precision come of sums in float32.
    ulps = 512 if actual.dtype == torch.float64 else 32
    eps = torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps
    margin = ulps * scale * eps * (truth.abs().max() + 1)
    assert error <= allowed + margin, f"{name}: error {error:.3g}, the reference has {allowed / 2:.3g}"


def subsets(count: int) -> list[tuple[bool, ...]]:
    """Every choice of at least one of ``count`` inputs."""
    return [choice for choice in itertools.product([False, True], repeat=count) if any(choice)]


def derivatives(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: list[Tensor],
    upstream: list[Tensor],
    cotangents: list[Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Outputs, first-order and second-order gradients of ``function``, by name."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    upstream = [x.to(inputs[0].dtype).detach().clone().requires_grad_() for x in upstream]
    outputs = function(*inputs)
    upstream = [x.detach().to(y.dtype).requires_grad_() for x, y in zip(upstream, outputs, strict=True)]
    first = torch.autograd.grad(outputs, inputs, upstream, create_graph=True)
    cotangents = [c.to(x.dtype) for c, x in zip(cotangents, first, strict=True)]
    second = torch.autograd.grad(first, [*inputs, *upstream], cotangents)
    for kind, tensors in (("output", outputs), ("gradient", first), ("second order", second)):
        for index, tensor in enumerate(tensors):
            yield f"{kind} {index}", tensor.detach()


def orders(
    function: Callable[..., Tensor], tensors: list[Tensor], lengths: Tensor, *, needed: tuple[bool, ...] = ()
) -> list[Tensor]:
    """The output of a function of tensors and lengths, first-order gradients, and the gradient of a function of those.

    needed: which tensors have gradients; all, if left out.
    """
    generator = torch.Generator().manual_seed(3)

    def like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)

    held = [not wanted for wanted in needed] or [False] * len(tensors)
    tensors = [x.detach() if fixed else x for x, fixed in zip(tensors, held, strict=True)]
    towards = [x for x in tensors if x.requires_grad]
    output = function(*tensors, lengths)
    upstream = like(output).requires_grad_()
    first = torch.autograd.grad(output, towards, upstream, create_graph=True)
    second = torch.autograd.grad(first, (*towards, upstream), [like(x) for x in first])
    return [output, *first, *second]


def assert_on_instruction_set(
    name: str,
    fused: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    tensors: list[Tensor],
    lengths: Tensor,
) -> None:
    """The orders of a fused function on one of the machine's instruction sets are those of its reference."""
    have = ops.build_facts()["instruction_sets"]
    if name not in have:
        pytest.skip(f"this machine does not run {name}")
    expected = orders(reference, tensors, lengths)
    try:
        ops.library._kernels.select_instruction_set(name)
        made = orders(fused, tensors, lengths)
        rounded = orders(fused, [x.detach().float().requires_grad_() for x in tensors], lengths)
    finally:
        ops.library._kernels.select_instruction_set(have[0])
    for a, b, c in zip(made, rounded, expected, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(b.double(), c, rtol=1e-3, atol=1e-4 * float(c.detach().abs().max()))


def assert_as_near_to_float64(
    fused: Callable[..., Tensor], reference: Callable[..., Tensor], tensors: list[Tensor], lengths: Tensor
) -> None:
    """In float32 the orders of a fused function are as near to float64 as its reference's."""
    truth = orders(reference, tensors, lengths)
    rounded = [x.detach().float().requires_grad_() for x in tensors]
    for exact, near, own in zip(
        truth, orders(reference, rounded, lengths), orders(fused, rounded, lengths), strict=True
    ):
        budget = 3 * (near - exact).abs().max() + 1e-5 * exact.abs().max()
        assert (own - exact).abs().max() <= budget


def assert_equal_on_any_threads(fused: Callable[..., Tensor], tensors: list[Tensor], lengths: Tensor) -> None:
    """The orders of a fused function have the same bits on one thread and on two."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(orders(fused, tensors, lengths))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """Memory that ``run`` adds to what is held before it, at its peak."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def kilobytes(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text()).group(1))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before and not given back would be at hand for free
    RESET_PEAK.write_text("5")
    before = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - before) * 1024


def soft_embedding_loss(
    queries: Tensor, keys: Tensor, values: Tensor, *, backend: ops.library.Backend = "fused"
) -> Tensor:
    """A value per row that depends on both outputs, and on the embedding not linearly."""
    embedding, logsumexp = ops.soft_embedding(queries, keys, values, backend=backend)
    return embedding.square().sum(-1) + logsumexp


def item_cross_entropy_loss(
    hidden: Tensor, items: Tensor, target: Tensor, *, backend: ops.library.Backend = "fused"
) -> Tensor:
    """A value per row that depends on the cross-entropy not linearly."""
    return ops.item_cross_entropy(hidden, items, target, backend=backend).square()


# Small shapes of their inputs: rows, then a table of items.
LOSSES = {
    soft_embedding_loss: [(4, 3), (9, 3), (9, 5)],
    item_cross_entropy_loss: [(4, 5), (9, 5), (4, 5)],
}
