"""How the ops whose derivatives are nodes in Python are differentiated, against their references."""

import pytest
import torch
from torch.autograd import grad

from td3_fast import ops

pytestmark = pytest.mark.skipif(not ops.has_fused("cpu"), reason="needs the compiled kernels")

OPS = {
    "gru": (ops.gru, ops.gru_reference),
    "additive_attention": (ops.additive_attention, ops.additive_attention_reference),
}


def setting(name):
    """Tensors with derivatives, and lengths."""
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "gru": [(4, 7, 6), (15, 6), (15, 5)],
        "additive_attention": [(4, 2, 5), (4, 7, 5), (5, 5), (5,)],
    }[name]
    tensors = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tensors, torch.randint(1, 8, (4,) if name == "gru" else (4, 2), generator=generator)


def summed(function, lengths):
    return lambda *x: function(*x, lengths).square().sum()


def vjp_of_vjp(function, x, lengths):
    """A Jacobian's product with a vector as the gradient, in the upstream one, of its product from the left."""
    x = [t.detach().requires_grad_() for t in x]
    made = function(*x, lengths)
    upstream = torch.ones_like(made).requires_grad_()
    first = grad(made, x, upstream, create_graph=True)
    (moved,) = grad(first, upstream, [t.sin() for t in x], create_graph=True)
    return (moved, *grad(moved.square().sum(), x))


FUNC = torch.func
TRANSFORMS = {
    "grad": lambda f, x, n: FUNC.grad(summed(f, n), tuple(range(len(x))))(*x),
    "jvp": lambda f, x, n: FUNC.jvp(lambda *y: f(*y, n), x, tuple(t.sin() for t in x)),
    "jvp of one input": lambda f, x, n: FUNC.jvp(lambda y: f(x[0], y, *x[2:], n), x[1:2], (x[1].sin(),)),
    "forward over reverse": lambda f, x, n: FUNC.jvp(
        FUNC.grad(summed(f, n), tuple(range(len(x)))), x, tuple(t.sin() for t in x)
    ),
    "reverse over reverse": lambda f, x, n: FUNC.grad(
        lambda y: FUNC.grad(summed(f, n), 1)(x[0], y, *x[2:]).square().sum()
    )(x[1]),
    "reverse over forward": lambda f, x, n: FUNC.grad(
        lambda *y: FUNC.jvp(lambda *z: f(*z, n), y, tuple(t.sin() for t in x))[1].square().sum(),
        tuple(range(len(x))),
    )(*x),
    "reverse over forward, in the direction": lambda f, x, n: FUNC.grad(
        lambda t: FUNC.jvp(lambda y: f(x[0], y, *x[2:], n), x[1:2], (t,))[1].square().sum()
    )(x[1].sin()),
    "vjp of vjp": vjp_of_vjp,
    "hessian": lambda f, x, n: FUNC.hessian(lambda y: f(*x[:-1], y, n).sum())(x[-1]),
    "vmap over a weight": lambda f, x, n: torch.vmap(f, in_dims=(None, 0, *[None] * (len(x) - 1)))(
        x[0], torch.stack([x[1], 2 * x[1]]), *x[2:], n
    ),
    "vmap of grad": lambda f, x, n: torch.vmap(
        lambda y, m: FUNC.grad(summed(f, m), (0, len(x) - 1))(y, *x[1:]), in_dims=(-1, 0)
    )(torch.stack([x[0], x[0].cos()], dim=-1), torch.stack([n, n.flip(0)])),
    "vmap over nothing": lambda f, x, n: torch.vmap(lambda y: f(y, *x[1:], n))(
        x[0].new_zeros(0, *x[0].shape)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OPS)
def test_under_transforms(name, transform):
    tensors, lengths = setting(name)
    actual, expected = (TRANSFORMS[transform](function, tensors, lengths) for function in OPS[name])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", OPS)
def test_checked_by_differences(name):
    tensors, lengths = setting(name)
    tensors = [x.requires_grad_() for x in tensors]

    def function(*inputs):
        return OPS[name][0](*inputs, lengths)

    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("name", OPS)
def test_a_third_order_raises(name):
    tensors, lengths = setting(name)
    tensors[1].requires_grad_()
    (first,) = grad(OPS[name][0](*tensors, lengths).square().sum(), tensors[1], create_graph=True)
    (second,) = grad(first.square().sum(), tensors[1], create_graph=True)
    with pytest.raises(NotImplementedError, match="twice"):
        grad(second.sum(), tensors[1])


@pytest.mark.parametrize("name", OPS)
def test_forward_over_forward_raises(name):
    tensors, lengths = setting(name)

    def along(y):
        return FUNC.jvp(lambda z: OPS[name][0](z, *tensors[1:], lengths), (y,), (y,))[1]

    with pytest.raises(NotImplementedError, match="forward mode over forward mode"):
        FUNC.jvp(along, tensors[:1], tensors[:1])


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", OPS)
def test_what_was_overwritten_is_noticed(name, order):
    for changed in range(len(setting(name)[0]) + 1):
        tensors, lengths = setting(name)
        given = [x.clone().requires_grad_() for x in tensors]
        inside = [x * 1 for x in given]  # leaves cannot be overwritten
        made = OPS[name][0](*inside, lengths).sum()
        if order == 2:
            made = sum(g.square().sum() for g in grad(made, given, create_graph=True))
        with torch.no_grad():
            (*inside, lengths)[changed].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            grad(made, given)


@pytest.mark.parametrize("name", OPS)
def test_compiles_whole(name):
    tensors, lengths = setting(name)
    given = [x.requires_grad_() for x in tensors]
    compiled = torch.compile(OPS[name][0], fullgraph=True, backend="aot_eager")
    expected = grad(OPS[name][1](*given, lengths).square().sum(), given)
    torch.testing.assert_close(grad(compiled(*given, lengths).square().sum(), given), expected)


@pytest.mark.parametrize("name", OPS)
def test_half_precision_takes_the_reference(name):
    tensors, lengths = setting(name)
    rounded = [x.bfloat16() for x in tensors]
    assert torch.equal(OPS[name][0](*rounded, lengths), OPS[name][1](*rounded, lengths))


@pytest.mark.parametrize("name", OPS)
def test_devices_and_dtypes_that_differ_are_refused(name):
    tensors, lengths = setting(name)
    with pytest.raises(ValueError, match="one device"):
        OPS[name][0](*tensors[:-1], tensors[-1].to("meta"), lengths)
    with pytest.raises(ValueError, match="float32 or all float64"):
        OPS[name][0](*tensors[:-1], tensors[-1].float(), lengths)


@pytest.mark.parametrize("name", OPS)
def test_directions_that_do_not_fit_are_refused(name):
    tensors, lengths = setting(name)
    upstream = torch.ones_like(OPS[name][0](*tensors, lengths))
    operator = getattr(torch.ops.td3_fast, f"{name}_double_backward")
    more = (True,) if name == "gru" else ()
    for index in range(len(tensors)):
        directions = [None] * len(tensors)
        directions[index] = tensors[index].flatten()[:1]
        with pytest.raises(ValueError, match="direction"):
            operator(*directions, upstream, *tensors, lengths, *more)
