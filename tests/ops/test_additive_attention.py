"""The fused attention of NARM against its dense reference, at every order."""

import pytest
import torch
from op_checks import (
    assert_as_near_to_float64,
    assert_equal_on_any_threads,
    assert_on_instruction_set,
    orders,
)

from td3_fast import ops
from td3_fast.ops import additive_attention, additive_attention_reference

pytestmark = pytest.mark.skipif(not ops.has_fused("cpu"), reason="needs the compiled kernels")


def setting(*, batch=13, length=7, queries=2, width=6, dtype=torch.float64, scale=0.7, whole=False):
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    tensors = draw(batch, queries, width), draw(batch, length, width), draw(width, width), draw(width)
    lengths = torch.randint(length + 1, (batch, queries), generator=generator)
    return [x.requires_grad_() for x in tensors], torch.full_like(lengths, length) if whole else lengths


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch": 1, "queries": 1},
        {"length": 1},
        {"width": 1},
        {"batch": 150, "whole": True},
        {"queries": 9, "length": 3},
        # vectors of lanes full and not
        {"width": 16},
        {"width": 37, "batch": 40},
        {"scale": 30.0, "whole": True},  # sigmoids that are 0 or 1 to rounding
    ],
    ids=str,
)
def test_equals_the_reference_at_every_order(changes):
    tensors, lengths = setting(**changes)
    expected = orders(additive_attention_reference, tensors, lengths)
    for a, b in zip(orders(additive_attention, tensors, lengths), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * float(b.detach().abs().max() + 1))


@pytest.mark.parametrize(
    "needed", [(True, False, False, False), (False, True, True, False), (True, True, False, True)], ids=str
)
def test_gradients_towards_some_of_the_inputs(needed):
    tensors, lengths = setting()
    expected = orders(additive_attention_reference, tensors, lengths, needed=needed)
    for a, b in zip(orders(additive_attention, tensors, lengths, needed=needed), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0])
def test_float32_is_as_near_to_float64_as_the_reference_is(scale):
    tensors, lengths = setting(batch=40, length=20, width=64, scale=scale)
    assert_as_near_to_float64(additive_attention, additive_attention_reference, tensors, lengths)


def test_beyond_all_lengths_nothing_is_read():
    (query, states, *weights), lengths = setting()
    broken = states.detach().clone()
    for row, length in zip(broken, lengths.amax(dim=1), strict=True):
        row[length:] = torch.nan
    expected = orders(additive_attention, [query, states, *weights], lengths)
    made = orders(additive_attention, [query, broken.requires_grad_(), *weights], lengths)
    for a, b in zip(made, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("batch", "length", "queries"), [(0, 3, 2), (3, 0, 2), (3, 4, 0)])
def test_nothing_given_is_nothing(batch, length, queries):
    tensors, lengths = setting(batch=batch, length=length, queries=queries)
    outputs, *gradients = orders(additive_attention, tensors, lengths)
    assert outputs.shape == (batch, queries, 6)
    for gradient in gradients:
        assert not gradient.any()


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(instruction_set):
    tensors, lengths = setting(batch=40, width=23)
    assert_on_instruction_set(
        instruction_set, additive_attention, additive_attention_reference, tensors, lengths
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_bits_on_any_number_of_threads(dtype):
    tensors, lengths = setting(batch=300, length=20, width=64, dtype=dtype)
    assert_equal_on_any_threads(additive_attention, tensors, lengths)


def test_schemas():
    tensors, lengths = setting()
    plain = (*(x.detach() for x in tensors), lengths)
    upstream = torch.randn(13, 2, 6, dtype=torch.float64)
    opcheck, own = torch.library.opcheck, torch.ops.td3_fast
    opcheck(own.additive_attention_forward.default, plain)
    opcheck(own.additive_attention_backward.default, (upstream, *plain))
    opcheck(own.additive_attention_double_backward.default, (None, None, None, None, upstream, *plain))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"lengths": [[8]]}, IndexError, "length 8"),
        ({"lengths": [[-1]]}, IndexError, "length -1"),
        ({"lengths": [3]}, ValueError, "lengths"),
        ({"query": (1, 1, 4)}, ValueError, "query"),
        ({"key_weight": (5, 4)}, ValueError, "key weight"),
        ({"energy": (4,)}, ValueError, "energy"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, error, match):
    given = {
        "query": (1, 1, 5),
        "states": (1, 7, 5),
        "key_weight": (5, 5),
        "energy": (5,),
        "lengths": [[7]],
        **change,
    }
    tensors = [torch.zeros(given[name]) for name in ("query", "states", "key_weight", "energy")]
    with pytest.raises(error, match=match):
        additive_attention(*tensors, torch.tensor(given["lengths"]))
