"""The CUDA kernels of item_cross_entropy (keys = values), run on the host, against the dense reference."""

import functools

import pytest
import torch
from op_checks import assert_within_budget, derivatives, subsets

from td3_fast import ops

# rows, n, d
SHAPES = [(1, 1, 1), (15, 127, 33), (64, 64, 16), (17, 700, 64), (70, 300, 20), (4, 50, 140), (0, 12, 4)]
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16 table": (torch.float32, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
}

fused = functools.partial(ops.item_cross_entropy, backend="fused")
reference = functools.partial(ops.item_cross_entropy, backend="reference")


def make_inputs(shape, dtypes, guarded):
    rows, n, d = shape
    hidden, target = (torch.randn(rows, d).to(dtypes[0]) for _ in range(2))
    return [guarded(hidden), guarded(torch.randn(n, d).to(dtypes[1])), target]


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_both_orders_match_the_reference(simt, guarded, shape, dtypes):
    inputs = make_inputs(shape, dtypes, guarded)
    upstream = [torch.randn(shape[0])]
    cotangents = [torch.randn(x.shape).to(x.dtype) for x in inputs]
    results = [
        derivatives(lambda *given, op=op: (op(*given),), given, upstream, cotangents)
        for op, given in ((fused, inputs), (reference, inputs), (reference, [x.double() for x in inputs]))
    ]
    for (name, actual), (_, same_dtype), (_, exact) in zip(*results, strict=True):
        assert_within_budget(actual, same_dtype, exact, name=name)


@pytest.mark.parametrize(
    ("dtypes", "tolerance"), [("float32", 1e-3), ("bfloat16 table", 1e-2), ("float16", 1e-3)]
)
def test_reduced_precision_is_as_near_as_its_type(simt, guarded, high_precision, dtypes, tolerance):
    inputs = make_inputs((17, 300, 40), DTYPES[dtypes], guarded)
    inputs[0].mul_(inputs[0].shape[1] ** -0.5)
    upstream = [torch.randn(17)]
    cotangents = [torch.randn(x.shape).to(x.dtype) for x in inputs]
    results = [
        derivatives(lambda *given, op=op: (op(*given),), given, upstream, cotangents)
        for op, given in ((fused, inputs), (reference, [x.double() for x in inputs]))
    ]
    for (name, actual), (_, exact) in zip(*results, strict=True):
        assert (actual - exact).abs().max() <= tolerance * exact.abs().max(), name


@pytest.mark.parametrize("needed", subsets(3), ids=str)
def test_gradients_of_every_subset_of_inputs_are_those_of_all(simt, guarded, needed):
    inputs = make_inputs((6, 70, 5), DTYPES["float32"], guarded)
    upstream = torch.randn(6)
    cotangents = [torch.randn_like(x) for x, need in zip(inputs, needed, strict=True) if need]

    def gradients(op):
        given = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
        wanted = [x for x in given if x.requires_grad]
        grad = upstream.clone().requires_grad_()
        first = torch.autograd.grad(op(*given), wanted, grad, create_graph=True)
        return *first, *torch.autograd.grad(first, [*wanted, grad], cotangents, materialize_grads=True)

    for a, b in zip(gradients(fused), gradients(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
