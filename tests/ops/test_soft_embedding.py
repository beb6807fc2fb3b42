import functools

import pytest
import torch
from op_checks import RESET_PEAK, assert_within_budget, derivatives, peak_bytes, subsets
from torch.autograd import gradcheck, gradgradcheck

from td3_fast import ops

OPS = torch.ops.td3_fast

# rows, n, rank, d: one item, one row, around a panel of rows (16), a tile (128) and a chunk (256) of items,
# odd widths, more rows than one group of panels, the sizes of the paper.
SHAPES = [
    (1, 1, 1, 1),
    (3, 1, 4, 5),
    (15, 127, 7, 33),
    (16, 128, 16, 16),
    (17, 129, 31, 8),
    (70, 255, 64, 12),
    (300, 257, 5, 20),
    (50, 1683, 32, 32),
    (9, 700, 130, 40),
    (0, 12, 4, 4),
]
DTYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "bfloat16 table": (torch.float32, torch.bfloat16),
    "float16 table": (torch.float32, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
}

fused = functools.partial(ops.soft_embedding, backend="fused")
reference = functools.partial(ops.soft_embedding, backend="reference")


def make_inputs(shape, dtypes, device, *, scale=1.0):
    rows, n, rank, d = shape
    query_dtype, table_dtype = dtypes
    queries = (torch.randn(rows, rank) * scale).to(device, query_dtype)
    return [queries, torch.randn(n, rank).to(device, table_dtype), torch.randn(n, d).to(device, table_dtype)]


def assert_matches_reference(inputs, *, scale=1.0):
    rows, d = inputs[0].shape[0], inputs[2].shape[1]
    upstream = [torch.randn(rows, d, device=inputs[0].device), torch.randn(rows, device=inputs[0].device)]
    cotangents = [torch.randn_like(x) for x in inputs]
    rounded = [
        [x.to(y.dtype) for x, y in zip(cotangents, inputs, strict=True)],
        [x.to(inputs[0].dtype) for x in upstream],
    ]
    truth = derivatives(reference, [x.double() for x in inputs], rounded[1], rounded[0])
    for (name, actual), (_, same_dtype), (_, exact) in zip(
        derivatives(fused, inputs, rounded[1], rounded[0]),
        derivatives(reference, inputs, rounded[1], rounded[0]),
        truth,
        strict=True,
    ):
        assert_within_budget(actual, same_dtype, exact, name=name, scale=scale)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_both_orders_match_the_reference(shape, dtypes, device):
    assert_matches_reference(make_inputs(shape, dtypes, device))


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extreme_logits_match_the_reference(scale, device):
    # The second order subtracts row means of terms that grow with the queries.
    assert_matches_reference(
        make_inputs((20, 300, 8, 12), DTYPES["float32"], device, scale=scale), scale=scale
    )


def test_non_contiguous_inputs_match_the_reference(device):
    queries, keys, values = make_inputs((20, 300, 8, 12), DTYPES["float64"], device)
    inputs = [queries.T.contiguous().T, keys.T.contiguous().T, values.repeat(1, 2)[:, ::2]]
    assert not any(x.is_contiguous() for x in inputs)
    assert_matches_reference(inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_in_half_precision_keep_small_gradients_of_distant_tables(dtype, device):
    # The gradient is a small difference of large terms, in which a rounded embedding would be seen.
    queries, keys, values = make_inputs((50, 1683, 32, 32), (dtype, dtype), device)
    assert_matches_reference([queries, keys + 3, values + 3])


@pytest.mark.parametrize("needed", subsets(3), ids=str)
def test_gradients_of_every_subset_of_inputs_match_finite_differences(needed, device):
    inputs = make_inputs((3, 6, 2, 3), DTYPES["float64"], device)
    inputs = [x.requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
    assert gradcheck(fused, inputs, check_forward_ad=True)
    assert gradgradcheck(fused, inputs)


@pytest.mark.parametrize("output", [0, 1])
def test_gradients_through_one_output_alone_match_finite_differences(output, device):
    inputs = [x.requires_grad_() for x in make_inputs((3, 6, 2, 3), DTYPES["float64"], device)]
    used = inputs if output == 0 else inputs[:2]

    def function(*given):
        return fused(*given, *inputs[len(given) :])[output]

    assert gradcheck(function, used)
    assert gradgradcheck(function, used)


def test_operators_satisfy_opcheck(device):
    inputs = [x.requires_grad_() for x in make_inputs((5, 7, 3, 4), DTYPES["float64"], device)]
    outputs = [x.detach() for x in OPS.soft_embedding_forward(*inputs)]
    upstream = [torch.randn_like(x).requires_grad_() for x in outputs[:2]]
    torch.library.opcheck(OPS.soft_embedding.default, inputs)
    torch.library.opcheck(OPS.soft_embedding_forward.default, inputs)
    torch.library.opcheck(OPS.soft_embedding_backward.default, (*upstream, *inputs, *outputs, [True] * 3))
    constants = [x.detach() for x in (*inputs, *upstream, *inputs, *outputs)]
    torch.library.opcheck(OPS.soft_embedding_double_backward.default, (*constants, [True] * 5))


def test_same_bits_from_run_to_run_and_for_any_number_of_threads(device):
    inputs = make_inputs((70, 1000, 16, 16), DTYPES["float32"], device)
    upstream = [torch.randn(70, 16, device=device), torch.randn(70, device=device)]
    cotangents = [torch.randn_like(x) for x in inputs]
    threads = torch.get_num_threads()
    runs = []
    for count in (1, 1, 2):
        torch.set_num_threads(count)
        runs.append([x for _, x in derivatives(fused, inputs, upstream, cotangents)])
    torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.skipif(not RESET_PEAK.exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("order", ["forward", "backward", "double backward"])
def test_peak_memory_stays_below_one_tensor_of_rows_by_items(order, device):
    rows, n, width = 1024, 65536, 8
    inputs = [
        x.requires_grad_(order != "forward")
        for x in make_inputs((rows, n, width, width), DTYPES["float32"], device)
    ]

    def run():
        outputs = fused(*inputs)
        if order == "forward":
            return
        create_graph = order == "double backward"
        first = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), inputs, create_graph=create_graph)
        if create_graph:
            torch.autograd.grad(sum(x.square().sum() for x in first), inputs)

    assert peak_bytes(device, run) < rows * n * 4 // 4


def test_ill_fitting_inputs_are_refused(device):
    queries, keys, values = make_inputs((4, 9, 3, 5), DTYPES["float32"], device)
    for backend in ("fused", "reference"):
        for bad in (
            (queries[:, :2], keys, values),
            (queries, keys[:8], values),
            (queries, keys[:0], values[:0]),
            (queries.double(), keys, values),
            (queries, keys, values.half()),
            (queries[0], keys, values),
        ):
            with pytest.raises(ValueError, match=r"expected|matrices|go with|share|fit together"):
                ops.soft_embedding(*bad, backend=backend)
