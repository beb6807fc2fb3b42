import collections
import itertools

import pytest
import torch
from op_checks import LOSSES, soft_embedding_loss
from torch.func import grad, jacrev, jvp, vjp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from td3_fast.ops.batching import is_table

BATCH = 3
ALL = (0, 1, 2)


def make_inputs(loss, in_dims, device):
    def batched(shape, dim):
        return shape if dim is None else (*shape[:dim], BATCH, *shape[dim:])

    shapes = [batched(shape, dim) for shape, dim in zip(LOSSES[loss], in_dims, strict=True)]
    return [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes]


def assert_same(function, loss):
    actual, expected = (
        function(lambda *inputs, backend=backend: loss(*inputs, backend=backend))
        for backend in ("fused", "reference")
    )
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


class CountCalls(TorchDispatchMode):
    """How often each operator of the library runs."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "td3_fast":
            self.calls[function._opname] += 1
        return function(*args, **(kwargs or {}))


IN_DIMS = [dims for dims in itertools.product((None, 0, 1), repeat=3) if any(dim is not None for dim in dims)]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_a_batch_in_every_subset_of_inputs_matches_the_reference(in_dims, loss, device):
    inputs = make_inputs(loss, in_dims, device)
    assert_same(lambda f: torch.vmap(f, in_dims)(*inputs), loss)
    # Gradients per element, and of the batch as a whole.
    assert_same(lambda f: torch.vmap(grad(lambda *x: f(*x).sum(), ALL), in_dims)(*inputs), loss)
    assert_same(lambda f: grad(lambda *x: torch.vmap(f, in_dims)(*x).square().sum(), ALL)(*inputs), loss)


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 0, None), (0, 0, 0)], ids=str)
def test_second_orders_of_a_batch_match_the_reference(in_dims, loss, device):
    inputs = make_inputs(loss, in_dims, device)
    tangents = [torch.randn_like(x) for x in inputs]

    def reverse(f):
        return lambda x, t: vjp(grad(lambda *y: f(*y).sum(), ALL), *x)[1](t)

    def forward(f):
        return lambda x, t: jvp(grad(lambda *y: f(*y).sum(), ALL), tuple(x), tuple(t))

    for product in (reverse, forward):
        assert_same(
            lambda f, product=product: torch.vmap(product(f), (in_dims, in_dims))(
                tuple(inputs), tuple(tangents)
            ),
            loss,
        )


@pytest.mark.parametrize("outer_dims", [(0, 0, 0), (0, None, None), (None, 0, None)], ids=str)
def test_nested_batches_match_the_reference(outer_dims, loss, device):
    inputs = [
        x if dim is None else torch.stack([x, x.flip(0)])
        for x, dim in zip(make_inputs(loss, (0, None, None), device), outer_dims, strict=True)
    ]

    def gradients(f):
        inner = torch.vmap(grad(lambda *x: f(*x).sum(), ALL), (0, None, None))
        return torch.vmap(inner, outer_dims)(*inputs)

    assert_same(gradients, loss)


def test_a_compiled_batch_of_gradients_matches_eager(loss, device):
    inputs = make_inputs(loss, (0, None, None), device)

    def gradients(*given):
        return torch.vmap(grad(lambda *x: loss(*x).sum()), (0, None, None))(*given)

    compiled = torch.compile(gradients, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), gradients(*inputs))


def test_elements_that_share_their_tables_are_rows_of_one_call(loss, device):
    name = "soft_embedding" if loss is soft_embedding_loss else "item_logsumexp"
    for in_dims, expected in (((0, None, None), 1), ((0, 0, None), BATCH)):
        inputs = make_inputs(loss, in_dims, device)
        with CountCalls() as count:
            torch.vmap(jacrev(lambda *x: loss(*x).sum()), in_dims)(*inputs)
        assert count.calls == {f"{name}_forward": expected, f"{name}_backward": expected}


def test_an_empty_batch_has_empty_results(loss, device):
    for in_dims in ((0, None, None), (0, 0, 0)):
        inputs = [
            x if dim is None else x[:0]
            for x, dim in zip(make_inputs(loss, in_dims, device), in_dims, strict=True)
        ]
        assert torch.vmap(loss, in_dims)(*inputs).shape == (0, 4)


def test_tables_are_told_by_their_names():
    tables = [x for x in ("keys", "grad_values", "grad_grad_items", "queries", "grad_hidden") if is_table(x)]
    assert tables == ["keys", "grad_values", "grad_grad_items"]
