"""The CUDA kernels of soft_embedding, run on the host, against the dense reference."""

import functools

import pytest
import torch
from op_checks import assert_within_budget, derivatives, subsets

from td3_fast import ops

# rows, n, rank, d: one item, below, at and above a tile of rows (64) and of items, several splits over items,
# widths that are no multiple of a copy or of a step of the tile product, and wider than tiles go.
SHAPES = [
    (1, 1, 1, 1),
    (3, 1, 4, 5),
    (15, 63, 7, 33),
    (64, 64, 16, 16),
    (65, 129, 31, 8),
    (17, 700, 64, 12),
    (9, 70, 130, 40),
    (5, 33, 128, 96),
    (0, 12, 4, 4),
]
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16 table": (torch.float32, torch.bfloat16),
    "float16 table": (torch.float32, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
}

fused = functools.partial(ops.soft_embedding, backend="fused")
reference = functools.partial(ops.soft_embedding, backend="reference")


def make_inputs(shape, dtypes, guarded, *, scale=1.0):
    rows, n, rank, d = shape
    queries = (torch.randn(rows, rank) * scale).to(dtypes[0])
    return [
        guarded(x) for x in (queries, torch.randn(n, rank).to(dtypes[1]), torch.randn(n, d).to(dtypes[1]))
    ]


def make_gradients(inputs):
    """Upstream gradients and cotangents for `derivatives`, of the dtypes of the inputs."""
    queries, _, values = inputs
    upstream = [torch.randn(len(queries), values.shape[1]).to(queries.dtype), torch.randn(len(queries))]
    return upstream, [torch.randn(x.shape).to(x.dtype) for x in inputs]


def assert_matches_reference(inputs, *, scale=1.0):
    gradients = make_gradients(inputs)
    results = [
        derivatives(op, given, *gradients)
        for op, given in ((fused, inputs), (reference, inputs), (reference, [x.double() for x in inputs]))
    ]
    for (name, actual), (_, same_dtype), (_, exact) in zip(*results, strict=True):
        assert_within_budget(actual, same_dtype, exact, name=name, scale=scale)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_both_orders_match_the_reference(simt, guarded, shape, dtypes):
    assert_matches_reference(make_inputs(shape, dtypes, guarded))


def test_several_splits_over_rows_match_the_reference(simt, guarded):
    assert_matches_reference(make_inputs((300, 70, 8, 12), DTYPES["float32"], guarded))


@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [("float32", 1e-3), ("bfloat16 table", 1e-2), ("float16 table", 1e-3)],
)
@pytest.mark.parametrize("shape", [(65, 129, 31, 8), (17, 700, 64, 12), (5, 33, 128, 96)], ids=str)
def test_reduced_precision_is_as_near_as_its_type(simt, guarded, high_precision, shape, dtypes, tolerance):
    inputs = make_inputs(shape, DTYPES[dtypes], guarded, scale=shape[2] ** -0.5)
    gradients = make_gradients(inputs)
    truth = derivatives(reference, [x.double() for x in inputs], *gradients)
    for (name, actual), (_, exact) in zip(derivatives(fused, inputs, *gradients), truth, strict=True):
        assert (actual - exact).abs().max() <= tolerance * exact.abs().max(), name


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extreme_logits_match_the_reference(simt, guarded, scale):
    inputs = make_inputs((20, 300, 8, 12), DTYPES["float32"], guarded, scale=scale)
    assert_matches_reference(inputs, scale=scale)


def assert_same_bits_in_any_order_of_threads(simt, inputs):
    gradients = make_gradients(inputs)
    runs = []
    for reverse in (0, 1):
        simt.simt_reverse(reverse)
        runs.append(list(derivatives(fused, inputs, *gradients)))
    for (name, forth), (_, back) in zip(*runs, strict=True):
        assert torch.equal(forth, back), name


@pytest.mark.parametrize("dtypes", ["float32", "float16 table", "float64"])
def test_the_order_of_threads_does_not_matter(simt, guarded, dtypes):
    assert_same_bits_in_any_order_of_threads(simt, make_inputs((70, 300, 20, 12), DTYPES[dtypes], guarded))


@pytest.mark.parametrize("dtypes", ["float32", "float16 table", "bfloat16 table"])
def test_the_order_of_threads_does_not_matter_in_reduced_precision(simt, guarded, high_precision, dtypes):
    assert_same_bits_in_any_order_of_threads(simt, make_inputs((70, 300, 20, 12), DTYPES[dtypes], guarded))


@pytest.mark.parametrize("needed", subsets(3), ids=str)
def test_gradients_of_every_subset_of_inputs_are_those_of_all(simt, guarded, needed):
    inputs = make_inputs((5, 40, 6, 10), DTYPES["float32"], guarded)
    (grad_x, grad_l), cotangents = make_gradients(inputs)

    def gradients(op, chosen):
        given = [x.detach().requires_grad_(need) for x, need in zip(inputs, chosen, strict=True)]
        wanted = [x for x in given if x.requires_grad]
        upstream = grad_x.clone().requires_grad_()
        outputs = op(*given)
        # The logsumexp has no gradient in the values alone.
        outputs, grads = (outputs, [upstream, grad_l]) if any(chosen[:2]) else (outputs[:1], [upstream])
        first = torch.autograd.grad(outputs, wanted, grads, create_graph=True)
        towards = [c for c, need in zip(cotangents, chosen, strict=True) if need]
        return *first, *torch.autograd.grad(first, [*wanted, upstream], towards, materialize_grads=True)

    for a, b in zip(gradients(fused, needed), gradients(reference, needed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("output", [0, 1])
def test_gradients_through_one_output_alone_match_the_reference(simt, guarded, output):
    inputs = make_inputs((5, 40, 6, 10), DTYPES["float64"], guarded)
    upstream, cotangents = make_gradients(inputs)
    used = 3 if output == 0 else 2

    def function(op):
        return lambda *given: (op(*given, *inputs[used:])[output],)

    for (_, a), (_, b) in zip(
        *(
            derivatives(function(op), inputs[:used], [upstream[output]], cotangents[:used])
            for op in (fused, reference)
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_forward_mode_matches_the_reference(simt, guarded):
    inputs = make_inputs((5, 40, 6, 10), DTYPES["float64"], guarded)
    tangents = [torch.randn_like(x) for x in inputs]
    for actual, expected in zip(
        *(torch.func.jvp(op, tuple(inputs), tuple(tangents))[1] for op in (fused, reference)), strict=True
    ):
        torch.testing.assert_close(actual, expected)
