"""The fused encoder against SASRec's modules, at every order; both ways with what they see exchanged."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import grad

from td3_fast import ops
from td3_fast.learners import FlatParameters, SASRec, SASRecConfig
from td3_fast.learners.base import causal_bias
from td3_fast.ops import (
    DropoutStream,
    encode_histories,
    inner_gradient,
    next_item_gradient,
    transformer_encoder,
)
from td3_fast.ops.transformer_encoder import packed_sizes

pytestmark = pytest.mark.skipif(not ops.has_fused("cpu"), reason="needs the compiled kernels")


def setting(
    *,
    batch=13,
    length=9,
    asked=2,
    layers=1,
    heads=1,
    hidden=8,
    inner=10,
    rates=(0.2, 0.5),
    dtype=torch.float64,
    both_ways=False,
):
    config = SASRecConfig(
        num_items=5,
        max_len=11,
        hidden=hidden,
        inner=inner,
        heads=heads,
        layers=layers,
        hidden_dropout=rates[0],
        attention_dropout=rates[1],
    )
    learner = SASRec(config, seed=1).to(dtype)
    flat = (BothWays if both_ways else FlatParameters)(learner)
    generator = torch.Generator().manual_seed(2)
    theta = flat.gather(learner.state_dict())
    theta = theta + 0.3 * torch.randn(theta.shape, generator=generator, dtype=dtype)
    inputs = torch.randn(batch, length, config.hidden, generator=generator, dtype=dtype)
    positions = torch.randint(length, (batch, asked), generator=generator)
    if both_ways:  # some ask for nothing, and some for what lies behind the last input seen
        nothing = torch.rand(batch, asked, generator=generator) < 0.3
        last = torch.randint(length, (batch, 1), generator=generator)
        positions = torch.cat([positions.masked_fill(nothing, -1), last], dim=1)
    return learner, flat, theta.requires_grad_(), inputs.requires_grad_(), positions


class BothWays(FlatParameters):
    """The modules of a SASRec, every row of which sees the inputs up to the last one seen."""

    def encode(self, flat, inputs, positions, *, dropout=None):
        shape = replace(self._shell.encoder_shape(), bidirectional=True)
        return transformer_encoder(flat, inputs, positions, shape, dropout=dropout)

    def reference(self, flat, inputs, positions, dropout):
        learner = self._filled(flat)
        length, d = inputs.shape[1:]
        asked, last = positions[:, :-1], positions[:, -1:]
        hidden = learner.norm(inputs + learner.position_embeddings[:length])
        if dropout is not None:
            hidden = dropout(hidden, learner.config.hidden_dropout)
        seen = causal_bias(last, length, hidden.dtype)
        *first, final = learner.blocks
        for block in first:
            hidden = block(hidden, hidden, seen.expand(-1, length, -1), dropout)
        rows = hidden.gather(1, asked.clamp(min=0).unsqueeze(-1).expand(-1, -1, d))
        outputs = final(hidden, rows, seen.expand(-1, asked.shape[1], -1), dropout)
        return outputs * (asked >= 0).unsqueeze(-1)


def reference(flat, theta, inputs, positions, dropout):
    if isinstance(flat, BothWays):
        return flat.reference(theta, inputs, positions, dropout)
    return flat._filled(theta).encode(inputs, positions, dropout=dropout)


def orders(encode, theta, inputs, *, create_graph=True):
    """Outputs, first-order gradients, and the gradient of a function of those."""
    generator = torch.Generator().manual_seed(3)

    def like(x):
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    outputs = encode()
    upstream = like(outputs).requires_grad_()
    first = grad(outputs, (theta, inputs), upstream, create_graph=create_graph)
    second = grad(first, (theta, inputs, upstream), [like(x) for x in first])
    return [outputs, *first, *second]


@pytest.mark.parametrize("dropout", [None, 7], ids=["no dropout", "dropout"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": 2, "heads": 2},
        {"batch": 1, "asked": 1},
        {"length": 1},
        {"rates": (0.0, 0.3)},
        {"rates": (0.3, 0.0), "layers": 2},
        {"batch": 150},
        # vectors of lanes full and not, several heads, more rows asked than there are
        {"hidden": 6, "inner": 5, "heads": 3},
        {"hidden": 20, "inner": 37},
        {"hidden": 36, "inner": 50, "heads": 2},
        {"length": 1, "layers": 2},
        {"length": 2, "asked": 40, "layers": 2},
        {"layers": 3, "heads": 4},
        {"both_ways": True},
        {"both_ways": True, "layers": 2, "heads": 2},
        {"both_ways": True, "layers": 3, "heads": 4, "asked": 7},
        {"both_ways": True, "batch": 150, "layers": 2, "heads": 2},
        {"both_ways": True, "hidden": 6, "inner": 5, "heads": 3, "layers": 2},
        {"both_ways": True, "hidden": 36, "inner": 50, "heads": 2, "layers": 2, "asked": 11},
        {"both_ways": True, "rates": (0.3, 0.0), "layers": 2},
        {"both_ways": True, "length": 1, "layers": 2},
        {"both_ways": True, "length": 2, "asked": 40, "layers": 2},
    ],
    ids=str,
)
def test_equals_the_modules_at_every_order(changes, dropout):
    _, flat, theta, inputs, positions = setting(**changes)

    def stream():
        return None if dropout is None else DropoutStream(dropout)

    expected = orders(lambda: reference(flat, theta, inputs, positions, stream()), theta, inputs)
    actual = orders(lambda: flat.encode(theta, inputs, positions, dropout=stream()), theta, inputs)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 40},
        {"batch": 40, "hidden": 20, "inner": 37},
        {"batch": 40, "hidden": 36, "inner": 50},
        {"batch": 40, "hidden": 32, "inner": 64, "heads": 2, "layers": 2, "both_ways": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("largest_bias", [0.0, 8.0], ids=["", "large biases"])
def test_float32_is_as_near_to_float64_as_the_modules_are(changes, largest_bias):
    learner, flat, theta, inputs, positions = setting(**changes, dtype=torch.float64)
    if largest_bias > 0:  # arguments of the feed-forward's erf on both sides, where it is 1 to rounding too
        inner = learner.config.inner
        for part in flat.scatter(theta.detach()).values():  # views
            if part.shape == (inner,):
                part.copy_(torch.linspace(-largest_bias, largest_bias, inner))
    truth = orders(lambda: reference(flat, theta, inputs, positions, DropoutStream(7)), theta, inputs)
    theta32, inputs32 = (x.detach().float().requires_grad_() for x in (theta, inputs))
    modules = orders(
        lambda: reference(flat, theta32, inputs32, positions, DropoutStream(7)), theta32, inputs32
    )
    fused = orders(
        lambda: flat.encode(theta32, inputs32, positions, dropout=DropoutStream(7)), theta32, inputs32
    )
    for exact, near, own in zip(truth, modules, fused, strict=True):
        budget = 3 * (near - exact).abs().max() + 1e-5 * exact.abs().max()
        assert (own - exact).abs().max() <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gelu_of_the_feed_forward_on_a_grid(dtype):
    """Where its first weights are zero, the gradient of its second ones is gelu of the bias times a vector."""
    inner, hidden = 4001, 8
    _, flat, theta, inputs, positions = setting(
        batch=1, length=1, asked=1, hidden=hidden, inner=inner, dtype=dtype
    )
    parts = {tuple(part.shape): name for name, part in flat.scatter(theta.detach()).items()}
    grid = torch.linspace(-8, 8, inner, dtype=dtype)
    flat.scatter(theta.detach())[parts[inner, hidden]].zero_()
    flat.scatter(theta.detach())[parts[(inner,)]].copy_(grid)
    outputs = flat.encode(theta, inputs, positions)
    (gradient,) = grad(outputs, theta, torch.linspace(-1, 2, hidden, dtype=dtype).view_as(outputs))
    of_down = flat.scatter(gradient)[parts[hidden, inner]].double()
    row = of_down[of_down[:, -1].abs().argmax()]
    made = row / row[-1] * grid[-1]  # gelu(8) is 8 to rounding
    expected = torch.nn.functional.gelu(grid.double())
    assert bool(((made - expected).abs() <= 6 * torch.finfo(dtype).eps * grid.abs()).all())


@pytest.mark.parametrize("both_ways", [False, True], ids=["causal", "both ways"])
@pytest.mark.parametrize(("batch", "asked"), [(0, 2), (3, 0)])
def test_nothing_asked_is_nothing(batch, asked, both_ways):
    _, flat, theta, inputs, positions = setting(batch=batch, asked=asked, both_ways=both_ways)
    outputs, *first, _, _, _ = orders(
        lambda: flat.encode(theta, inputs, positions, dropout=None), theta, inputs
    )
    assert outputs.shape == (batch, asked, 8)
    for gradient, x in zip(first, (theta, inputs), strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("needed", ["theta", "inputs"])
def test_gradients_towards_one_of_the_inputs(needed):
    _, flat, theta, inputs, positions = setting()
    expected = orders(lambda: reference(flat, theta, inputs, positions, None), theta, inputs)
    held = inputs.detach() if needed == "theta" else inputs
    parameters = theta.detach() if needed == "inputs" else theta
    outputs = flat.encode(parameters, held, positions, dropout=None)
    upstream = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(3), dtype=outputs.dtype)
    (only,) = grad(outputs, theta if needed == "theta" else inputs, upstream)
    torch.testing.assert_close(only, expected[1 if needed == "theta" else 2])


@pytest.mark.parametrize("both_ways", [False, True], ids=["causal", "both ways"])
def test_schemas(both_ways):
    learner, _, theta, inputs, positions = setting(rates=(0.0, 0.0), both_ways=both_ways)
    upstream = torch.randn(13, 2, 8, dtype=torch.float64)
    shape = replace(learner.encoder_shape(), bidirectional=both_ways)
    rest = (theta, inputs, positions, [], packed_sizes(shape))
    plain = (theta.detach(), inputs.detach(), *rest[2:])
    opcheck, encoder_ops = torch.library.opcheck, torch.ops.td3_fast
    opcheck(encoder_ops.transformer_encoder_forward.default, rest)
    opcheck(encoder_ops.transformer_encoder_backward.default, (upstream, *plain, True))
    opcheck(encoder_ops.transformer_encoder_double_backward.default, (None, None, upstream, *plain, True))


@pytest.mark.parametrize("order", [1, 2])
def test_positions_that_were_overwritten_are_noticed(order):
    _, flat, theta, inputs, positions = setting()
    made = flat.encode(theta, inputs, positions).sum()
    if order == 2:
        made = grad(made, theta, create_graph=True)[0].sum()
    positions.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(made, theta)


def test_a_third_order_raises():
    _, flat, theta, inputs, positions = setting()
    outputs = flat.encode(theta, inputs, positions, dropout=None)
    (first,) = grad(outputs.square().sum(), theta, create_graph=True)
    (second,) = grad(first.square().sum(), theta, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="twice"):
        grad(second.sum(), theta)


@pytest.mark.parametrize("changes", [{}, {"both_ways": True, "layers": 2, "heads": 2}], ids=str)
def test_equal_bits_on_any_number_of_threads(changes):
    _, flat, theta, inputs, positions = setting(batch=300, dtype=torch.float32, **changes)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(
                orders(lambda: flat.encode(theta, inputs, positions, dropout=DropoutStream(1)), theta, inputs)
            )
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_where_nothing_is_asked_upstream_gradients_are_not_read():
    _, flat, theta, inputs, positions = setting(both_ways=True, layers=2)
    outputs = flat.encode(theta, inputs, positions)
    nothing = (positions[:, :-1] < 0).unsqueeze(-1).expand_as(outputs)
    upstream = torch.ones_like(outputs)
    assert nothing.any()
    expected = grad(outputs, (theta, inputs), upstream.masked_fill(nothing, 0.0), retain_graph=True)
    actual = grad(outputs, (theta, inputs), upstream.masked_fill(nothing, torch.nan))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("heads", [1, 2])
def test_derivatives_of_both_ways_are_those_of_finite_differences(heads):
    sizes = {"batch": 3, "length": 4, "layers": 2, "hidden": 4, "inner": 3, "heads": heads}
    _, flat, theta, inputs, positions = setting(both_ways=True, **sizes)

    def encode(theta, inputs):
        return flat.encode(theta, inputs, positions, dropout=DropoutStream(7))

    assert torch.autograd.gradcheck(encode, (theta, inputs), fast_mode=True)
    assert torch.autograd.gradgradcheck(encode, (theta, inputs), fast_mode=True)


def test_transforms_of_torch_func_are_left_to_the_modules():
    _, flat, theta, inputs, positions = setting(layers=2)
    made = torch.func.grad(lambda t: flat.encode(t, inputs, positions).square().sum())(theta.detach())
    (expected,) = grad(reference(flat, theta, inputs, positions, None).square().sum(), theta)
    torch.testing.assert_close(made, expected)


def test_refuses_what_does_not_fit():
    learner, flat, theta, inputs, positions = setting()
    with pytest.raises(IndexError, match="position"):
        flat.encode(theta, inputs, positions + 9, dropout=None)
    with pytest.raises(IndexError, match="position"):
        flat.encode(theta, inputs, positions - 9, dropout=None)
    with pytest.raises(ValueError, match="parameters"):
        flat.encode(theta[:-1], inputs, positions, dropout=None)
    with pytest.raises(ValueError, match="max_len"):
        flat.encode(theta, torch.zeros(2, 12, 8, dtype=torch.float64), positions[:2], dropout=None)
    _, flat, theta, inputs, positions = setting(both_ways=True)
    for wrong in (torch.full((13, 1), -1), torch.full((13, 1), 9)):
        with pytest.raises(IndexError, match="position"):
            flat.encode(theta, inputs, torch.cat([positions[:, :-1], wrong], dim=1))
    with pytest.raises(ValueError, match="last inputs seen"):
        transformer_encoder(
            theta, inputs, positions[:, :0], replace(learner.encoder_shape(), bidirectional=True)
        )


def test_attention_both_ways_is_that_of_one_operator_alone():
    learner, _, theta, inputs, positions = setting()
    shape = replace(learner.encoder_shape(), bidirectional=True)
    items, histories = inputs[0].detach(), torch.zeros(3, 2, dtype=torch.int64)
    ones = torch.ones(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="later inputs"):
        encode_histories(theta, items, histories, ones, shape)
    with pytest.raises(ValueError, match="later inputs"):
        next_item_gradient(theta, items, histories, ones, ones, shape, dropout=None, trained=False)
    with pytest.raises(ValueError, match="later inputs"):
        inner_gradient(theta, items, inputs, positions, shape)
