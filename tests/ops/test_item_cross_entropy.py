import functools

import pytest
import torch
from op_checks import RESET_PEAK, assert_within_budget, derivatives, peak_bytes, subsets
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.nn import functional as F

from td3_fast import ops

OPS = torch.ops.td3_fast

# rows, n, d: as for soft_embedding, and some whose probabilities are too many to keep between orders.
SHAPES = [
    (1, 1, 1),
    (15, 127, 33),
    (16, 128, 16),
    (17, 257, 7),
    (50, 1683, 32),
    (100, 2049, 20),
    (130, 33_000, 8),  # probabilities kept of some rows alone
    (300, 30_000, 8),  # and of none
    (2100, 700, 64),  # in two blocks of rows
    (0, 12, 4),
]
DTYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "bfloat16 table": (torch.float32, torch.bfloat16),
    "float16 table": (torch.float32, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
}

# What is not kept is made anew in the type of the sums, from tables of any: of many items three types stand for all.
CASES = [
    pytest.param(shape, dtypes, id=f"{shape}-{name}")
    for shape in SHAPES
    for name, dtypes in DTYPES.items()
    if shape[1] < 10_000 or name in ("float64", "float32", "bfloat16 table")
]

fused = functools.partial(ops.item_cross_entropy, backend="fused")
reference = functools.partial(ops.item_cross_entropy, backend="reference")


def make_inputs(shape, dtypes, device):
    rows, n, d = shape
    hidden_dtype, table_dtype = dtypes
    hidden, target = (torch.randn(rows, d).to(device, hidden_dtype) for _ in range(2))
    return [hidden, torch.randn(n, d).to(device, table_dtype), target]


def assert_matches_reference(inputs, *, scale=1.0):
    upstream = [torch.randn(len(inputs[0]), device=inputs[0].device)]
    cotangents = [torch.randn_like(x) for x in inputs]
    results = [
        derivatives(lambda *given, op=op: (op(*given),), given, upstream, cotangents)
        for op, given in ((fused, inputs), (reference, inputs), (reference, [x.double() for x in inputs]))
    ]
    for (name, actual), (_, same_dtype), (_, exact) in zip(*results, strict=True):
        assert_within_budget(actual, same_dtype, exact, name=name, scale=scale)


@pytest.mark.parametrize(("shape", "dtypes"), CASES)
def test_value_and_both_orders_match_the_reference(shape, dtypes, device):
    assert_matches_reference(make_inputs(shape, dtypes, device))


@pytest.mark.parametrize("n", [300, 300_000], ids=["kept", "kept of some rows"])
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extreme_logits_match_the_reference(scale, n, device):
    hidden, items, target = make_inputs((20, n, 8), DTYPES["float32"], device)
    assert_matches_reference([hidden * scale, items, target], scale=scale)


@pytest.mark.parametrize("n", [30, 3000])
def test_scores_beyond_all_numbers_give_an_infinite_logsumexp(n, device):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 8, generator=generator).to(device) * 1e20
    items = torch.randn(n, 8, generator=generator).to(device) * 1e20
    assert ops.item_logsumexp(hidden, items).tolist() == [torch.inf] * 3


def test_rows_that_one_item_has_beside_others_match_the_reference(device):
    hidden, items, target = make_inputs((70, 300, 8), DTYPES["float32"], device)
    hidden[3] *= 1e3  # one panel of rows with such a row, one without, and one where all are
    hidden[40:] *= 1e3
    assert_matches_reference([hidden, items, target], scale=1e3)


def test_non_contiguous_inputs_match_the_reference(device):
    hidden, items, target = make_inputs((20, 300, 8), DTYPES["float64"], device)
    inputs = [hidden.T.contiguous().T, items.T.contiguous().T, target.repeat(1, 2)[:, ::2]]
    assert not any(x.is_contiguous() for x in inputs)
    assert_matches_reference(inputs)


def test_an_item_as_target_gives_the_cross_entropy(device):
    hidden, items, _ = make_inputs((20, 300, 8), DTYPES["float64"], device)
    target = torch.randint(300, (20,), device=device)
    inputs = [hidden.requires_grad_(), items.requires_grad_()]
    actual, expected = fused(*inputs, target), F.cross_entropy(hidden @ items.T, target, reduction="none")
    torch.testing.assert_close(actual, expected)
    for a, b in zip(
        torch.autograd.grad(actual.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_soft_embedding_as_target_gives_the_cross_entropy_to_its_distribution(device):
    hidden, items, queries = make_inputs((6, 40, 5), DTYPES["float64"], device)
    keys = torch.randn_like(items)
    target, _ = ops.soft_embedding(queries, keys, items)
    probabilities = (queries @ keys.T).softmax(-1)
    expected = F.cross_entropy(hidden @ items.T, probabilities, reduction="none")
    torch.testing.assert_close(fused(hidden, items, target), expected)


@pytest.mark.parametrize("needed", subsets(3), ids=str)
def test_gradients_of_every_subset_of_inputs_match_finite_differences(needed, device):
    inputs = make_inputs((3, 6, 2), DTYPES["float64"], device)
    inputs = [x.requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
    assert gradcheck(fused, inputs, check_forward_ad=True)
    assert gradgradcheck(fused, inputs)


@pytest.mark.parametrize("n", [9, 500_000], ids=["kept", "recomputed"])
def test_operators_satisfy_opcheck(n, device):
    hidden, items, _ = (x.requires_grad_() for x in make_inputs((6, n, 2), DTYPES["float64"], device))
    saved = [x.detach() for x in OPS.item_logsumexp_forward(hidden, items, True, True)]
    assert (saved[-1].numel() > 0) == (n == 9 and device.type == "cpu")
    grad = torch.randn_like(saved[0]).requires_grad_()
    torch.library.opcheck(OPS.item_logsumexp.default, (hidden, items))
    torch.library.opcheck(OPS.item_logsumexp_forward.default, (hidden, items, True, True))
    torch.library.opcheck(OPS.item_logsumexp_backward.default, (grad, hidden, items, *saved, [True] * 2))
    constants = [x.detach() for x in (hidden, items, grad, hidden, items)]
    torch.library.opcheck(OPS.item_logsumexp_double_backward.default, (*constants, *saved, [True] * 3))


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (17, 257, 7), (100, 100_000, 64), (100, 110_000, 64), (130, 33_000, 8), (900, 3000, 512)],
    ids=str,
)
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_kept_bytes_are_foreseen(shape, table_dtype):
    rows, n, d = shape
    hidden, items = torch.randn(rows, d), torch.randn(n, d).to(table_dtype)
    kept = OPS.item_logsumexp_forward(hidden, items, True, True)[-1]
    assert kept.nbytes == ops.kept_score_bytes(rows, n, d, 4, table_dtype.itemsize)


def test_kept_memory_is_used_again_once_it_is_free():
    def keep():
        return OPS.item_logsumexp_forward(torch.randn(50, 16), torch.randn(20_000, 16), True, True)[-1]

    first, second = keep(), keep()
    address = first.data_ptr()
    assert address != second.data_ptr()
    del first
    assert keep().data_ptr() == address


def assert_matches_reference_on_items(inputs, target, *, scale=1.0):
    # the same number in every dtype
    upstream = [torch.randn(len(target), device=target.device).bfloat16().float()]
    cotangents = [torch.randn_like(x) for x in inputs]
    results = [
        derivatives(lambda *x, op=op: (op(*x, target),), given, upstream, cotangents)
        for op, given in ((fused, inputs), (reference, inputs), (reference, [x.double() for x in inputs]))
    ]
    for (name, actual), (_, same_dtype), (_, exact) in zip(*results, strict=True):
        assert_within_budget(actual, same_dtype, exact, name=name, scale=scale)


# F.embedding has no second order of none
@pytest.mark.parametrize(("shape", "dtypes"), [case for case in CASES if case.values[0][0]])
def test_both_orders_with_items_as_targets_match_the_reference(shape, dtypes, device):
    *inputs, _ = make_inputs(shape, dtypes, device)
    # few items, so that rows share targets
    assert_matches_reference_on_items(inputs, torch.randint(min(shape[1], 5), shape[:1], device=device))


@pytest.mark.parametrize("needed", subsets(2), ids=str)
def test_gradients_with_items_as_targets_match_finite_differences(needed, device):
    *inputs, _ = make_inputs((4, 6, 2), DTYPES["float64"], device)
    target = torch.tensor([2, 0, 2, 5], device=device)
    inputs = [x.requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
    assert gradcheck(lambda *x: fused(*x, target), inputs, check_forward_ad=True)
    assert gradgradcheck(lambda *x: fused(*x, target), inputs)


def test_operators_with_items_as_targets_satisfy_opcheck(device):
    hidden, items, _ = (x.requires_grad_() for x in make_inputs((6, 9, 2), DTYPES["float64"], device))
    target = torch.tensor([2, 0, 2, 5, 8, 8], device=device)
    loss, *saved = (x.detach() for x in OPS.class_cross_entropy_forward(hidden, items, target, True, True))
    grad = torch.randn_like(loss).requires_grad_()
    torch.library.opcheck(OPS.class_cross_entropy.default, (hidden, items, target))
    torch.library.opcheck(OPS.class_cross_entropy_forward.default, (hidden, items, target, True, True))
    given = (grad, hidden, items, target, *saved)
    torch.library.opcheck(OPS.class_cross_entropy_backward.default, (*given, [True] * 2))
    constants = [x.detach() for x in (hidden, items, *given)]
    torch.library.opcheck(OPS.class_cross_entropy_double_backward.default, (*constants, [True] * 3))


def test_no_rows_with_items_as_targets_have_gradients_of_zero(device):
    hidden, items, _ = (x.requires_grad_() for x in make_inputs((0, 12, 4), DTYPES["float32"], device))
    loss = fused(hidden, items, torch.empty(0, dtype=torch.int64, device=device))
    first = torch.autograd.grad(loss.sum(), [hidden, items], create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), [hidden, items])
    assert loss.shape == (0,)
    for gradients in (first, second):
        assert [x.shape for x in gradients] == [(0, 4), (12, 4)]
        assert not gradients[1].any()


@pytest.mark.parametrize("order", [1, 2])
def test_a_target_that_was_overwritten_is_noticed(order, device):
    hidden = torch.randn(4, 3, device=device, requires_grad=True)
    items = torch.randn(6, 3, device=device, requires_grad=True)
    target = torch.tensor([0, 5, 2, 2], device=device)
    made = ops.item_cross_entropy(hidden, items, target).sum()
    if order == 2:
        made = grad(made, items, create_graph=True)[0].sum()
    target.fill_(2**40)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(made, items)


def test_the_gradient_of_the_item_table_is_made_once(device):
    hidden, items, _ = make_inputs((8, 200_000, 16), DTYPES["float32"], device)
    target = torch.randint(200_000, (8,), device=device)
    items.requires_grad_()
    loss = fused(hidden, items, target).sum()
    peak = peak_bytes(device, lambda: torch.autograd.grad(loss, items))
    assert peak < 1.5 * items.nbytes


def test_same_bits_from_run_to_run_and_for_any_number_of_threads(device):
    inputs = make_inputs((70, 8000, 16), DTYPES["float32"], device)  # worth two threads
    cotangents = [torch.randn_like(x) for x in inputs]
    threads = torch.get_num_threads()
    runs = []
    for count in (1, 1, 2):
        torch.set_num_threads(count)
        upstream = [torch.ones(70, device=device)]
        runs.append(
            [x for _, x in derivatives(lambda *given: (fused(*given),), inputs, upstream, cotangents)]
        )
    torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.skipif(not RESET_PEAK.exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("order", ["forward", "backward", "double backward"])
def test_peak_memory_stays_below_one_tensor_of_rows_by_items(order, device):
    rows, n, d = 1024, 65536, 8
    inputs = [
        x.requires_grad_(order != "forward") for x in make_inputs((rows, n, d), DTYPES["float32"], device)
    ]

    def run():
        loss = fused(*inputs).sum()
        if order == "forward":
            return
        create_graph = order == "double backward"
        first = torch.autograd.grad(loss, inputs, create_graph=create_graph)
        if create_graph:
            torch.autograd.grad(sum(x.square().sum() for x in first), inputs)

    assert peak_bytes(device, run) < rows * n * 4 // 4


def test_targets_that_do_not_fit_are_refused(device):
    hidden, items, target = make_inputs((4, 9, 5), DTYPES["float32"], device)
    with pytest.raises(ValueError, match="expected a target of shape"):
        fused(hidden, items, target[:3])
    with pytest.raises(ValueError, match="expected a target of shape"):
        fused(hidden, items, torch.zeros(3, dtype=torch.int64, device=device))
    if device.type == "cpu":
        with pytest.raises(IndexError):
            fused(hidden, items, torch.full((4,), 9))
        target = torch.tensor([0, 8, 3, 3])
        _, *made = OPS.class_cross_entropy_forward(hidden, items, target, True, True)
        for wrong in (-1, 9):
            given = (torch.ones(4), hidden, items, torch.full((4,), wrong), *made)
            with pytest.raises(IndexError, match="not one of the 9 items"):
                OPS.class_cross_entropy_backward(*given, [False, True])
