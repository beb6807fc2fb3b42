"""The CUDA kernels of Adam, run on the host, against separate operations."""

import pytest
import torch

from td3_fast import ops
from td3_fast.unroll import AdamConfig, AdamState, adam_adjoint_, adam_step_

SIZE = 0.05


def drawn(count, dtype):
    """Parameters, both moments, a gradient, and cotangents of the first three."""
    p, m, g, *cotangents = (torch.randn(count, dtype=torch.float64).to(dtype) for _ in range(6))
    v = torch.rand(count, dtype=torch.float64).to(dtype)
    v[: count // 3] = 0  # no step has been taken there, and the gradient of some is nothing
    g[: count // 4] = 0
    p[: count // 8] = 0  # nor does their weight decay add to it
    return [p, m, v, g, *cotangents]


def separate(tensors, config):
    """What a step and its adjoint give by separate operations, which a size in a tensor takes on the CPU."""
    p, m, v, g, *adjoint = (t.clone() for t in tensors)
    size = torch.tensor(SIZE, dtype=p.dtype)
    to_gradient = adam_adjoint_((p, m, v), g, tuple(adjoint), size, config)
    adam_step_(AdamState((p,), (m,), (v,), 0), (g,), config, size)
    return [p, m, v, *adjoint, to_gradient]


def by_kernels(tensors, config, size):
    p, m, v, g, *adjoint = tensors
    rates = [config.beta1, config.beta2, config.eps, config.weight_decay]
    to_gradient = ops.one_pass_adam_adjoint_(p, m, v, g, *adjoint, rates, size)
    ops.one_pass_adam_step_(p, m, v, g, rates, size)
    return [p, m, v, *adjoint, to_gradient]


@pytest.mark.parametrize("count", [0, 1, 256, 1001])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_separate_operations(simt, guarded, count, weight_decay, dtype):
    config = AdamConfig(learning_rate=0.1, weight_decay=weight_decay)
    tensors = drawn(count, dtype)
    truth = separate([t.double() for t in tensors], config)
    near = separate(tensors, config)
    size = guarded(torch.tensor(SIZE, dtype=dtype))
    own = by_kernels([guarded(t) for t in tensors], config, size)
    for exact, a, b in zip(truth, own, near, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(a, exact, rtol=1e-10, atol=1e-13)
        elif count > 0:
            budget = 4 * (b - exact).abs().max() + 1e-6 * exact.abs().max()
            assert (a - exact).abs().max() <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_size_in_a_tensor_gives_the_bits_of_the_number(simt, dtype):
    config = AdamConfig(learning_rate=0.1)
    tensors = drawn(1001, dtype)
    number, tensor = (
        by_kernels([t.clone() for t in tensors], config, size)
        for size in (SIZE, torch.tensor(SIZE, dtype=dtype))
    )
    assert all(torch.equal(a, b) for a, b in zip(number, tensor, strict=True))


def test_a_matrix_is_stepped_as_its_elements_are(simt):
    config = AdamConfig(learning_rate=0.1)
    tensors = drawn(12, torch.float64)
    matrix = by_kernels([t.clone().view(3, 4) for t in tensors], config, SIZE)
    flat = by_kernels(tensors, config, SIZE)
    assert all(torch.equal(a.view(-1), b) for a, b in zip(matrix, flat, strict=True))


def test_autograd_notices_what_was_overwritten(simt):
    tensors = drawn(9, torch.float64)
    versions = [t._version for t in tensors]
    by_kernels(tensors, AdamConfig(learning_rate=0.1), SIZE)
    changed = [t._version > version for t, version in zip(tensors, versions, strict=True)]
    assert changed == [True, True, True, False, True, True, True]


def test_tensors_that_are_not_alike_are_refused(simt):
    p, m, v, g, *_ = drawn(9, torch.float64)
    rates = [0.9, 0.999, 1e-8, 0.0]
    with pytest.raises(ValueError, match="alike in shape"):
        ops.one_pass_adam_step_(p, m, v, g[:-1], rates, SIZE)
    with pytest.raises(ValueError, match="size of one element"):
        ops.one_pass_adam_step_(p, m, v, g, rates, torch.tensor(SIZE))
    with pytest.raises(ValueError, match="expected rates"):
        ops.one_pass_adam_step_(p, m, v, g, rates[:-1], SIZE)
