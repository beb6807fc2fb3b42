import pytest
import torch
from op_checks import assert_within_budget, derivatives
from torch.autograd import gradcheck, gradgradcheck

from td3_fast import ops


def make_inputs(device, *, users=3, positions=4, ranks=(2, 3, 4), n=9, d=5):
    d1, d2, d3 = ranks
    shapes = [(d1, d2, d3), (users, d1), (positions, d2), (n, d3), (n, d)]
    return [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes]


def test_queries_are_the_two_mode_products(device):
    core, users, positions, *_ = make_inputs(device)
    expected = torch.einsum("abc,ua,pb->upc", core, users, positions)
    torch.testing.assert_close(ops.tucker_queries(core, users, positions), expected)


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("normalize", ["softmax", "none"])
def test_embedding_is_the_reconstruction_times_the_table(normalize, backend, device):
    inputs = make_inputs(device)
    core, users, positions, item_factors, items = inputs
    summary = torch.einsum("abc,ua,pb,nc->upn", core, users, positions, item_factors)
    if normalize == "softmax":
        summary = summary.softmax(-1)
    actual = ops.tucker_soft_embedding(*inputs, normalize=normalize, backend=backend)
    torch.testing.assert_close(actual, summary @ items)


@pytest.mark.parametrize("normalize", ["softmax", "none"])
def test_no_users_have_an_embedding_of_none(normalize, device):
    inputs = make_inputs(device, users=0)
    assert ops.tucker_soft_embedding(*inputs, normalize=normalize).shape == (0, 4, 5)


@pytest.mark.parametrize("normalize", ["softmax", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_both_orders_are_within_the_error_budget(dtype, normalize, device):
    inputs = [x.to(dtype) for x in make_inputs(device, users=30, positions=20, ranks=(8, 8, 32), n=894, d=32)]
    upstream = [torch.randn(30, 20, 32, device=device)]
    cotangents = [torch.randn_like(x) for x in inputs]

    def function(backend):
        return lambda *given: (ops.tucker_soft_embedding(*given, normalize=normalize, backend=backend),)

    for (name, actual), (_, same_dtype), (_, exact) in zip(
        derivatives(function("fused"), inputs, upstream, cotangents),
        derivatives(function("reference"), inputs, upstream, cotangents),
        derivatives(function("reference"), [x.double() for x in inputs], upstream, cotangents),
        strict=True,
    ):
        # Of sums of 64 terms per query.
        assert_within_budget(actual, same_dtype, exact, name=name, scale=8)


@pytest.mark.parametrize("moving", range(5))
def test_both_orders_in_one_input_match_finite_differences(moving, device):
    inputs = make_inputs(device, users=2, positions=2, ranks=(2, 2, 2), n=4, d=2)
    inputs[moving].requires_grad_()
    assert gradcheck(ops.tucker_soft_embedding, inputs)
    assert gradgradcheck(ops.tucker_soft_embedding, inputs)


def test_third_order_raises(device):
    core, *others = make_inputs(device)
    core.requires_grad_()
    value = ops.tucker_soft_embedding(core, *others)
    for _ in range(2):
        (value,) = torch.autograd.grad(value.square().sum(), core, create_graph=True)
    with pytest.raises(RuntimeError, match="no third"):
        torch.autograd.grad(value.square().sum(), core)


@pytest.mark.parametrize("normalize", ["softmax", "none"])
def test_both_orders_match_finite_differences(normalize, device):
    inputs = make_inputs(device, users=2, positions=2, ranks=(2, 2, 2), n=4, d=2)
    inputs = [x.requires_grad_() for x in inputs]

    def function(*given):
        return ops.tucker_soft_embedding(*given, normalize=normalize)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_an_unknown_normalisation_is_refused(device):
    with pytest.raises(ValueError, match="normalize"):
        ops.tucker_soft_embedding(*make_inputs(device), normalize="sigmoid")
