"""Adam's step and adjoint in one pass, against the same as separate operations on the CPU."""

import pytest
import torch

from td3_fast import ops
from td3_fast.unroll import AdamConfig, AdamState, adam_adjoint_, adam_step_

pytestmark = pytest.mark.skipif(not ops.has_fused("cpu"), reason="needs the compiled kernels")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that has fused kernels here."""
    name: str = request.param
    if not ops.has_fused(name):
        pytest.skip("no fused kernels are built")
    return torch.device(name)


RATES = [0.9, 0.999, 1e-8, 0.0, 0.1]


def drawn(count, dtype, seed=0):
    """Parameters, both moments, a gradient, and cotangents of the first three."""
    generator = torch.Generator().manual_seed(seed)
    p, m, g, *cotangents = (
        torch.randn(count, generator=generator, dtype=torch.float64).to(dtype) for _ in range(6)
    )
    v = torch.rand(count, generator=generator, dtype=torch.float64).to(dtype)
    v[: count // 3] = 0  # no step has been taken there, and the gradient of some is nothing
    g[: count // 4] = 0
    return (p, m, v), g, tuple(cotangents)


def stepped(before, gradient, config, size):
    state = AdamState(*((t.clone(),) for t in before), 0)
    state = adam_step_(state, (gradient,), config, size)
    return [part[0] for part in state[:3]]


def both(before, gradient, cotangents, config, size):
    """What a step and its adjoint give."""
    adjoint = tuple(c.clone() for c in cotangents)
    to_gradient = adam_adjoint_(before, gradient, adjoint, size, config)
    return [*stepped(before, gradient, config, size), *adjoint, to_gradient]


def both_on(device, before, gradient, cotangents, config, size):
    """The same of copies on a device."""
    before, cotangents = (tuple(t.to(device) for t in part) for part in (before, cotangents))
    return [t.cpu() for t in both(before, gradient.to(device), cotangents, config, size)]


@pytest.mark.parametrize("count", [0, 7, 100_003])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_separate_operations(device, count, weight_decay):
    config = AdamConfig(learning_rate=0.1, weight_decay=weight_decay)
    tensors = drawn(count, torch.float64)
    own = both_on(device, *tensors, config, 0.05)
    separate = both(
        *tensors, config, torch.tensor(0.05, dtype=torch.float64)
    )  # for a size that lies in a tensor
    for a, b in zip(own, separate, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_float32_is_as_near_to_float64_as_separate_operations_are(device, weight_decay):
    config = AdamConfig(learning_rate=0.1, weight_decay=weight_decay)
    tensors = drawn(10_007, torch.float32)
    before, gradient, cotangents = tensors
    exact_before, exact_cotangents = (tuple(t.double() for t in part) for part in (before, cotangents))
    truth = both(exact_before, gradient.double(), exact_cotangents, config, 0.05)
    own = both_on(device, *tensors, config, 0.05)
    separate = both(*tensors, config, torch.tensor(0.05))
    for exact, a, b in zip(truth, own, separate, strict=True):
        # by element: where the second moment is small its root is steep, and roundings are seen
        budget = 4 * (b - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (a - exact).abs().max() <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_size_in_a_tensor_gives_the_bits_of_the_number(device, dtype):
    before, gradient, cotangents = drawn(1001, dtype)
    results = []
    for size in (0.05, torch.tensor(0.05, dtype=dtype, device=device)):
        p, m, v, g, *adjoint = (t.to(device, copy=True) for t in (*before, gradient, *cotangents))
        to_gradient = ops.one_pass_adam_adjoint_(p, m, v, g, *adjoint, RATES[:4], size)
        ops.one_pass_adam_step_(p, m, v, g, RATES[:4], size)
        results.append([p, m, v, *adjoint, to_gradient])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_size_in_a_tensor_is_for_the_gpu(device):
    tensor = torch.zeros(3, device=device)
    assert ops.has_one_pass_adam(tensor, size=0.05)
    assert ops.has_one_pass_adam(tensor, size=torch.tensor(0.05, device=device)) == tensor.is_cuda
    assert not ops.has_one_pass_adam(tensor, size=torch.tensor(0.05, device=device, dtype=torch.float64))
    assert not ops.has_one_pass_adam(tensor.half(), size=0.05)


def test_what_is_not_contiguous_is_stepped_too():
    (p, m, v), gradient, _ = drawn(12, torch.float64)
    config = AdamConfig(learning_rate=0.1)
    views = [t.view(3, 4).T for t in (p, m, v)]
    own = stepped(views, gradient.view(3, 4).T, config, 0.05)
    expected = stepped((p, m, v), gradient, config, 0.05)
    for a, b in zip(own, expected, strict=True):
        torch.testing.assert_close(a.T.reshape(-1), b)


@pytest.mark.parametrize(
    "rates", [(RATES,), (RATES[:4], torch.tensor(0.1, dtype=torch.float64))], ids=["number", "tensor"]
)
def test_schemas(rates):
    before, gradient, cotangents = drawn(9, torch.float64)
    adam = torch.ops.td3_fast
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(adam.adam_step_.default, (*before, gradient, *rates), test_utils=checks)
    torch.library.opcheck(
        adam.adam_adjoint_.default, (*before, gradient, *cotangents, *rates), test_utils=checks
    )


def test_tensors_that_are_not_alike_are_refused(device):
    before, gradient, _ = drawn(9, torch.float64)
    *before, gradient = (t.to(device) for t in (*before, gradient))
    with pytest.raises(ValueError, match="alike in shape"):
        torch.ops.td3_fast.adam_step_(*before, gradient[:-1], RATES)
    with pytest.raises(ValueError, match="expected rates"):
        torch.ops.td3_fast.adam_step_(*before, gradient, RATES[:-1])
    with pytest.raises(ValueError, match="expected rates"):
        torch.ops.td3_fast.adam_step_(*before, gradient, RATES, torch.zeros_like(gradient[0]))
    for size in (gradient[:2], torch.tensor(0.1, device=device)):
        with pytest.raises(ValueError, match="size of one element"):
            torch.ops.td3_fast.adam_step_(*before, gradient, RATES[:4], size)


def test_equal_bits_on_any_number_of_threads():
    tensors = drawn(200_003, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(both(*tensors, AdamConfig(learning_rate=0.1), 0.05))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autograd_notices_that_a_parameter_was_overwritten(device):
    before, gradient, cotangents = drawn(9, torch.float64)
    p, m, v, gradient, *cotangents = (t.to(device) for t in (*before, gradient, *cotangents))
    source = torch.ones(9, dtype=torch.float64, device=device, requires_grad=True)
    product = source * p  # keeps p
    adam_step_(AdamState((p,), (m,), (v,), 0), (gradient,), AdamConfig(learning_rate=0.1), 0.05)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    versions = [c._version for c in cotangents]
    adam_adjoint_((p, m, v), gradient, tuple(cotangents), 0.05, AdamConfig(learning_rate=0.1))
    assert all(c._version > version for c, version in zip(cotangents, versions, strict=True))
