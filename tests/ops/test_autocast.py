"""Ops over items in a training loop under autocast: in float32, as PyTorch has softmax and losses there."""

import pytest
import torch

from td3_fast import ops

BACKENDS = pytest.mark.parametrize("backend", ["fused", "reference"])


def make_inputs(device, *, rows=5, n=30, d=8):
    hidden = torch.randn(rows, d, device=device, requires_grad=True)
    items = torch.randn(n, d, device=device, requires_grad=True)
    return hidden, items


def halved(hidden, device):
    """What a layer makes of float32 under autocast."""
    made = hidden @ torch.eye(hidden.shape[1], device=device)
    assert made.dtype == torch.bfloat16
    return made


@BACKENDS
@pytest.mark.parametrize(
    "op",
    [
        lambda hidden, items, **given: ops.item_cross_entropy(hidden, items, torch.arange(5).to(items.device), **given),
        lambda hidden, items, **given: ops.item_cross_entropy(hidden, items, items[:5] / 2, **given),
        lambda hidden, items, **given: ops.item_logsumexp(hidden, items, **given),
        lambda hidden, items, **given: ops.soft_embedding(hidden, items, items, **given)[0],
    ],
    ids=["class targets", "soft targets", "logsumexp", "soft embedding"],
)  # fmt: skip
def test_half_rows_are_taken_in_float32(op, backend, device):
    hidden, items = make_inputs(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        made = op(halved(hidden, device), items, backend=backend)
    expected = op(hidden.bfloat16().float(), items, backend="reference")
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, expected)
    for gradient, wanted in zip(
        *(torch.autograd.grad(x.square().sum(), (hidden, items)) for x in (made, expected)), strict=True
    ):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(
            gradient, wanted, rtol=2e-2, atol=1e-2
        )  # that of hidden passed through half


@BACKENDS
def test_ranks_are_those_of_float32(backend, device):
    hidden, items = make_inputs(device, rows=30)
    target = torch.arange(30, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ranks = ops.target_rank(halved(hidden, device), items, target, backend=backend)
    assert ranks.equal(ops.target_rank(hidden.bfloat16().float(), items, target))


@BACKENDS
@pytest.mark.parametrize("normalize", ["softmax", "none"])
def test_a_summary_is_reconstructed_in_float32(normalize, backend, device):
    shapes = [(2, 3, 4), (3, 2), (5, 3), (9, 4), (9, 6)]
    factors = [torch.randn(shape, device=device) for shape in shapes]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        made = ops.tucker_soft_embedding(*factors, normalize=normalize, backend=backend)
    torch.testing.assert_close(made, ops.tucker_soft_embedding(*factors, normalize=normalize))


@pytest.mark.parametrize("half", range(3))
def test_one_factor_may_be_of_half_precision(half, device):
    factors = [torch.randn(shape, device=device) for shape in [(2, 3, 4), (3, 2), (5, 3)]]
    factors[half] = factors[half].bfloat16()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        made = ops.tucker_queries(*factors)
    torch.testing.assert_close(made, ops.tucker_queries(*(factor.float() for factor in factors)))


def test_devices_without_autocast_are_served():
    factors = [torch.empty(shape, device="meta") for shape in [(2, 3, 4), (3, 2), (5, 3)]]
    assert ops.tucker_queries(*factors).shape == (3, 5, 4)


def test_autocast_compiles(device):
    hidden, items = make_inputs(device)

    def loss(hidden, items):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return ops.item_logsumexp(halved(hidden, device), items).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden, items), loss(hidden, items))
