"""What csrc/*_autograd.cpp register, through every door: autograd, torch.func, torch.compile, autograd.Function."""

import functools

import pytest
import torch
from op_checks import LOSSES, item_cross_entropy_loss, soft_embedding_loss, subsets
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.utils._pytree import tree_leaves

from td3_fast import ops


@pytest.fixture
def inputs(loss, device):
    return [torch.randn(shape, dtype=torch.float64, device=device) for shape in LOSSES[loss]]


def total(loss, backend):
    return lambda *inputs: loss(*inputs, backend=backend).sum()


def direction(inputs):
    return tuple(torch.randn_like(x) for x in inputs)


def assert_close(actual, expected):
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


ALL = (0, 1, 2)
# Of a function that gives one value, in the inputs and a direction of theirs.
TRANSFORMS = {
    "grad": lambda f, x, t: grad(f, ALL)(*x),
    "jvp": lambda f, x, t: jvp(f, x, t),
    "vjp": lambda f, x, t: vjp(f, *x)[1](torch.ones_like(f(*x))),
    "reverse over reverse": lambda f, x, t: vjp(grad(f, ALL), *x)[1](t),
    "forward over reverse": lambda f, x, t: jvp(grad(f, ALL), x, t),
    "reverse over forward": lambda f, x, t: grad(lambda *y: jvp(f, y, t)[1], ALL)(*x),
    "hessian": lambda f, x, t: hessian(f, ALL)(*x),
    "jacrev of jacrev": lambda f, x, t: jacrev(jacrev(f, ALL), ALL)(*x),
    "jacrev of jacfwd": lambda f, x, t: jacrev(jacfwd(f, ALL), ALL)(*x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms_of_torch_func_match_the_reference(transform, loss, inputs):
    tangents = direction(inputs)
    assert_close(*(transform(total(loss, b), tuple(inputs), tangents) for b in ("fused", "reference")))


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
def test_jacobians_match_the_reference(jacobian, loss, inputs):
    assert_close(
        *(jacobian(functools.partial(loss, backend=b), ALL)(*inputs) for b in ("fused", "reference"))
    )


@pytest.mark.parametrize("moving", subsets(3), ids=str)
def test_hessians_in_every_subset_of_inputs_match_the_reference(moving, loss, inputs):
    argnums = tuple(index for index, moves in enumerate(moving) if moves)
    assert_close(*(hessian(total(loss, backend), argnums)(*inputs) for backend in ("fused", "reference")))


@pytest.mark.parametrize("items", [600, 20_000])
@pytest.mark.parametrize("needed", subsets(3), ids=str)
def test_both_orders_in_every_subset_of_inputs_match_the_reference(needed, items, loss, device):
    # More rows than a group of panels, more items than a chunk, and odd widths.
    shapes = [(items if rows == 9 else 70, 4 * columns + 1) for rows, columns in LOSSES[loss]]
    inputs = [torch.randn(shape, dtype=torch.float64, device=device) / 4 for shape in shapes]
    chosen = [x.requires_grad_() for x, need in zip(inputs, needed, strict=True) if need]

    def both_orders(backend):
        first = torch.autograd.grad(total(loss, backend)(*inputs), chosen, create_graph=True)
        return first, torch.autograd.grad(sum(x.square().sum() for x in first), chosen)

    assert_close(both_orders("fused"), both_orders("reference"))


# Two or three derivatives in one mode, beyond what is derived.
BEYOND = {
    "reverse three times": lambda f, x, t: grad(lambda a: grad(lambda b: grad(f)(b).sum())(a).sum())(x),
    "forward over reverse over reverse": lambda f, x, t: jvp(grad(lambda a: grad(f)(a).sum()), (x,), (t,)),
    "reverse over forward over reverse": lambda f, x, t: grad(
        lambda a: jvp(grad(f), (a,), (t,))[1].square().sum()
    )(x),
    "forward over forward": lambda f, x, t: jvp(lambda a: jvp(f, (a,), (t,))[1], (x,), (t,)),
}


@pytest.mark.parametrize("transform", BEYOND.values(), ids=BEYOND.keys())
def test_what_is_not_derived_raises(transform, loss, inputs):
    first, *others = inputs
    with pytest.raises(RuntimeError, match=r"no third|no forward-mode derivative"):
        transform(lambda x: loss(x, *others, backend="fused").sum(), first, torch.randn_like(first))


@pytest.mark.parametrize("position", [0, 1])
def test_third_order_raises_for_rows_and_tables(position, loss, inputs):
    inputs[position].requires_grad_()
    value = loss(*inputs, backend="fused").sum()
    for _ in range(2):
        (value,) = torch.autograd.grad(value.square().sum(), inputs[position], create_graph=True)
    with pytest.raises(RuntimeError, match="no third"):
        torch.autograd.grad(value.square().sum(), inputs[position])


def test_a_compiled_function_matches_eager(loss, inputs):
    inputs = [x.requires_grad_() for x in inputs]
    compiled = torch.compile(total(loss, "fused"), backend="aot_eager", fullgraph=True)
    assert_close(*(torch.autograd.grad(f(*inputs), inputs) for f in (compiled, total(loss, "fused"))))


def test_a_second_order_of_a_compiled_function_raises(loss, inputs):
    first = inputs[0].requires_grad_()
    compiled = torch.compile(total(loss, "fused"), backend="aot_eager", fullgraph=True)
    # PyTorch's own error: at the second order, or where an earlier version sees it coming.
    with pytest.raises(RuntimeError, match=r"double backward|create_graph"):  # noqa: PT012
        (gradient,) = torch.autograd.grad(compiled(*inputs), first, create_graph=True)
        torch.autograd.grad(gradient.sum(), first)


def test_a_compiled_transform_matches_eager(loss, inputs):
    def hessian_product(x, tangent):
        return jvp(grad(lambda rows: loss(rows, *inputs[1:], backend="fused").sum()), (x,), (tangent,))[1]

    compiled = torch.compile(hessian_product, backend="aot_eager", fullgraph=True)
    tangent = torch.randn_like(inputs[0])
    assert_close(compiled(inputs[0], tangent), hessian_product(inputs[0], tangent))


FUNCTIONS = {soft_embedding_loss: ops.SoftEmbedding, item_cross_entropy_loss: ops.ItemLogsumexp}


@pytest.mark.parametrize("needed", subsets(3), ids=str)
def test_the_autograd_function_matches_finite_differences(needed, loss, inputs):
    count = len(inputs) if loss is soft_embedding_loss else 2
    if not any(needed[:count]) or any(needed[count:]):
        pytest.skip("the logsumexp has two inputs")
    inputs = [x.requires_grad_(need) for x, need in zip(inputs[:count], needed[:count], strict=True)]

    def function(*given):
        return [x for x in FUNCTIONS[loss].apply(*given) if x.requires_grad]

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_the_autograd_function_works_under_transforms(loss, inputs):
    def value(*given):
        if loss is soft_embedding_loss:
            embedding, logsumexp, _ = ops.SoftEmbedding.apply(*given)
            return (embedding.square().sum(-1) + logsumexp).sum()
        return (ops.ItemLogsumexp.apply(*given[:2])[0] - (given[0] * given[2]).sum(-1)).square().sum()

    tangents = direction(inputs)
    for name in ("grad", "reverse over reverse"):
        transform = TRANSFORMS[name]
        assert_close(*(transform(f, tuple(inputs), tangents) for f in (value, total(loss, "reference"))))
    batch = inputs[0].expand(3, *inputs[0].shape)
    per_element = torch.vmap(grad(value), in_dims=(0, None, None))(batch, *inputs[1:])
    assert_close(per_element, grad(value)(*inputs).expand_as(batch))


def test_the_autograd_function_raises_at_third_order(loss, inputs):
    first = inputs[0].requires_grad_()
    value = FUNCTIONS[loss].apply(first, *inputs[1 : 3 if loss is soft_embedding_loss else 2])[0]
    for _ in range(2):
        (value,) = torch.autograd.grad(value.square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match="no third"):
        torch.autograd.grad(value.square().sum(), first)


def test_the_autograd_function_needs_its_kernels(monkeypatch, loss, inputs):
    monkeypatch.setattr(ops.library, "_kernels", None)
    with pytest.raises(RuntimeError, match="without fused kernels"):
        FUNCTIONS[loss].apply(*inputs[: 3 if loss is soft_embedding_loss else 2])
