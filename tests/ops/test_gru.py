"""The fused recurrent layer against its loop over time, at every order."""

import pytest
import torch
from op_checks import (
    assert_as_near_to_float64,
    assert_equal_on_any_threads,
    assert_on_instruction_set,
    orders,
)

from td3_fast import ops
from td3_fast.ops import gru, gru_reference

pytestmark = pytest.mark.skipif(not ops.has_fused("cpu"), reason="needs the compiled kernels")


def setting(*, batch=13, length=7, inputs=6, states=5, dtype=torch.float64, scale=0.7, whole=False):
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    tensors = draw(batch, length, inputs), draw(3 * states, inputs), draw(3 * states, states)
    lengths = torch.randint(length + 1, (batch,), generator=generator)
    return [x.requires_grad_() for x in tensors], torch.full_like(lengths, length) if whole else lengths


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch": 1},
        {"length": 1},
        {"inputs": 1, "states": 1},
        {"batch": 150, "whole": True},
        # vectors of lanes full and not
        {"inputs": 16, "states": 32},
        {"inputs": 37, "states": 20},
        {"inputs": 9, "states": 41, "batch": 40},
        {"scale": 30.0, "whole": True},  # gates that are shut or open to rounding
    ],
    ids=str,
)
def test_equals_the_loop_at_every_order(changes):
    tensors, lengths = setting(**changes)
    expected = orders(gru_reference, tensors, lengths)
    for a, b in zip(orders(gru, tensors, lengths), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * float(b.detach().abs().max() + 1))


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, True), (True, True, False)], ids=str)
def test_gradients_towards_some_of_the_inputs(needed):
    tensors, lengths = setting()
    expected = orders(gru_reference, tensors, lengths, needed=needed)
    for a, b in zip(orders(gru, tensors, lengths, needed=needed), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scale", [0.01, 0.7, 10.0])
def test_float32_is_as_near_to_float64_as_the_loop_is(scale):
    tensors, lengths = setting(batch=40, length=20, inputs=32, states=64, scale=scale)
    assert_as_near_to_float64(gru, gru_reference, tensors, lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gates_on_a_grid(dtype):
    """Of one input and one state: 0 before, so that it is tanh(a x) (1 − sigmoid(b x)) after."""
    grid = torch.cat(
        [torch.linspace(-120, 120, 4001), torch.logspace(-30, 2, 4001), -torch.logspace(-30, 2, 4001)]
    )
    grid = grid.to(dtype).view(-1, 1, 1)
    lengths, state_weight = torch.ones(len(grid), dtype=torch.int64), torch.zeros(3, 1, dtype=dtype)
    for to_update, to_new in ((0.0, 1.0), (1.0, 0.5)):
        weight = torch.tensor([[0.0], [to_update], [to_new]], dtype=dtype)
        made = gru(grid, weight, state_weight, lengths).double()
        x = grid.double()
        exact = torch.tanh(to_new * x) * torch.sigmoid(-to_update * x)
        error = (made - exact).abs()
        # the second factor is a difference from 1, as in the loop
        assert bool((error <= 8 * torch.finfo(dtype).eps * torch.tanh(to_new * x).abs() + 1e-37).all())


@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1], ids=hex)
def test_what_is_not_a_number_stays_so(payload):
    (inputs, *weights), lengths = setting(whole=True, dtype=torch.float32)
    inputs = inputs.detach().clone()
    inputs.view(torch.int32)[3, 2, 1] = payload
    states = gru(inputs, *(w.detach() for w in weights), lengths)
    assert states[3, 2:].isnan().all()
    assert not states[:3].isnan().any()
    assert not states[3, :2].isnan().any()


def test_beyond_a_length_nothing_is_read():
    (inputs, *weights), lengths = setting()
    broken = inputs.detach().clone()
    for row, length in zip(broken, lengths, strict=True):
        row[length:] = torch.nan
    expected = orders(gru, [inputs, *weights], lengths)
    for a, b in zip(orders(gru, [broken.requires_grad_(), *weights], lengths), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (3, 0)])
def test_nothing_given_is_nothing(batch, length):
    tensors, lengths = setting(batch=batch, length=length)
    states, *gradients = orders(gru, tensors, lengths)
    assert states.shape == (batch, length, 5)
    for gradient in gradients:
        assert not gradient.any()


def test_inputs_of_any_layout():
    (inputs, *weights), lengths = setting()
    turned = inputs.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    expected = orders(gru, [inputs, *weights], lengths)
    for a, b in zip(orders(gru, [turned, *weights], lengths), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(instruction_set):
    tensors, lengths = setting(batch=40, inputs=33, states=23)
    assert_on_instruction_set(instruction_set, gru, gru_reference, tensors, lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_bits_on_any_number_of_threads(dtype):
    tensors, lengths = setting(batch=300, length=20, inputs=32, states=64, dtype=dtype)
    assert_equal_on_any_threads(gru, tensors, lengths)


def test_schemas():
    (inputs, *weights), lengths = setting()
    plain = (inputs.detach(), *(w.detach() for w in weights), lengths)
    upstream = torch.randn(13, 7, 5, dtype=torch.float64)
    opcheck, layer_ops = torch.library.opcheck, torch.ops.td3_fast
    opcheck(layer_ops.gru_forward.default, plain)
    opcheck(layer_ops.gru_backward.default, (upstream, *plain, True))
    opcheck(layer_ops.gru_backward.default, (upstream, *plain, False))
    opcheck(layer_ops.gru_double_backward.default, (None, None, None, upstream, *plain, True))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"lengths": [8]}, IndexError, "length 8"),
        ({"lengths": [-1]}, IndexError, "length -1"),
        ({"lengths": [3, 3]}, ValueError, "lengths"),
        ({"state_weight": (15, 4)}, ValueError, "state weight"),
        ({"input_weight": (15, 7)}, ValueError, "input weight"),
        ({"inputs": (1, 6)}, ValueError, r"\(batch, length, d\)"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, error, match):
    given = {"inputs": (1, 7, 6), "input_weight": (15, 6), "state_weight": (15, 5), "lengths": [7], **change}
    tensors = [torch.zeros(given[name]) for name in ("inputs", "input_weight", "state_weight")]
    with pytest.raises(error, match=match):
        gru(*tensors, torch.tensor(given["lengths"]))


def test_dtypes_that_differ_are_refused():
    (inputs, *weights), lengths = setting()
    with pytest.raises(ValueError, match="float32 or all float64"):
        gru(inputs.float(), *weights, lengths)
