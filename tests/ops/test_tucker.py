import pytest
import torch
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
