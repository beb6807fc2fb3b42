"""The gradient of an inner step in one call against autograd through SASRec's modules, and its derivative."""

import pytest
import torch
from torch.autograd import grad

from td3_fast import ops
from td3_fast.learners import FlatParameters, SASRec, SASRecConfig
from td3_fast.ops import DropoutStream, inner_gradient, item_cross_entropy

pytestmark = pytest.mark.skipif(not ops.has_fused("cpu"), reason="needs the compiled kernels")


def setting(
    *,
    batch=13,
    positions=9,
    asked=2,
    layers=1,
    heads=1,
    hidden=8,
    inner=10,
    items=30,
    dtype=torch.float64,
):
    """(learner, its vector, tensors of `inner_gradient`: parameters, items, embeds, targets)."""
    config = SASRecConfig(num_items=items, max_len=11, hidden=hidden, inner=inner, heads=heads, layers=layers)
    learner = SASRec(config, seed=1).to(dtype)
    flat = FlatParameters(learner)
    generator = torch.Generator().manual_seed(2)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    theta = flat.gather(learner.state_dict())
    theta = theta + 0.3 * drawn(*theta.shape)
    targets = torch.randint(1, positions, (batch, asked), generator=generator)
    return learner, flat, (theta, drawn(items, hidden), drawn(batch, positions, hidden), targets)


def reference(flat, theta, items, embeds, targets, dropout):
    """The loss by the modules, differentiable."""
    hidden = flat._filled(theta).encode(embeds[:, :-1], targets - 1, dropout=dropout)
    rows = embeds.gather(1, targets.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))
    return item_cross_entropy(hidden.flatten(0, 1), items, rows.flatten(0, 1), backend="reference").mean()


def directions(tensors):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in tensors]


def by_autograd(flat, theta, items, embeds, targets, dropout, *, trained):
    """Loss, gradients, and the gradients of what these and a direction have as inner product."""
    theta, items, embeds = (x.detach().requires_grad_() for x in (theta, items, embeds))
    loss = reference(flat, theta, items, embeds, targets, dropout)
    moved = [theta, items, embeds] if trained else [theta]
    first = grad(loss, moved, create_graph=True)
    second = grad(first, [theta, items, embeds] if trained else [theta, embeds], directions(moved))
    return [loss, *first, *second]


def in_one_call(shape, theta, items, embeds, targets, dropout, *, trained):
    made = inner_gradient(theta, items, embeds, targets, shape, dropout=dropout, trained=trained)
    first = [made.parameters, made.items, made.embeds] if trained else [made.parameters]
    second = made.tangent(*directions([theta, items, embeds] if trained else [theta]))
    return [made.loss, *first, *(x for x in second if x is not None)]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dropout", [None, 7], ids=["no dropout", "dropout"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": 2, "heads": 2},
        {"batch": 1, "asked": 1},
        {"positions": 2},
        {"positions": 2, "layers": 2},
        {"hidden": 20, "inner": 37},
        {"hidden": 36, "inner": 50, "heads": 2},
        {"batch": 70, "asked": 3, "items": 400},
        {"batch": 3200, "layers": 2, "heads": 2},  # too much to keep it between the halves of a pass
    ],
    ids=str,
)
def test_equals_autograd_through_the_modules(changes, dropout, trained):
    learner, flat, tensors = setting(**changes)

    def stream():
        return None if dropout is None else DropoutStream(dropout)

    expected = by_autograd(flat, *tensors, stream(), trained=trained)
    actual = in_one_call(learner.encoder_shape(), *tensors, stream(), trained=trained)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    "changes", [{"batch": 40, "items": 400}, {"batch": 40, "hidden": 36, "inner": 50}], ids=str
)
def test_float32_is_as_near_to_float64_as_autograd_is(trained, changes):
    learner, flat, tensors = setting(**changes)
    truth = by_autograd(flat, *tensors, DropoutStream(7), trained=trained)
    learner, flat, tensors = setting(**changes, dtype=torch.float32)
    modules = by_autograd(flat, *tensors, DropoutStream(7), trained=trained)
    fused = in_one_call(learner.encoder_shape(), *tensors, DropoutStream(7), trained=trained)
    for exact, near, own in zip(truth, modules, fused, strict=True):
        budget = 3 * (near - exact).abs().max() + 1e-5 * exact.abs().max()
        assert (own - exact).abs().max() <= budget


def test_a_direction_of_some_of_the_inputs():
    learner, _, (theta, items, embeds, targets) = setting()
    made = inner_gradient(theta, items, embeds, targets, learner.encoder_shape(), trained=True)
    directions_of = directions([theta, items, embeds])
    none = [torch.zeros_like(x) for x in directions_of]
    whole = made.tangent(*directions_of)
    parts = [made.tangent(*(d if i == j else z for j, (d, z) in enumerate(zip(directions_of, none, strict=True))))
             for i in range(3)]  # fmt: skip
    for total, *each in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(each), total)  # it is linear
    left_out = made.tangent(none[0], None, directions_of[2])
    assert left_out[1] is None
    for a, b in zip((left_out[0], left_out[2]), (parts[2][0], parts[2][2]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_items_of_16_bits_are_those_numbers(dtype):
    learner, _, (theta, items, embeds, targets) = setting(dtype=torch.float32)
    few_bits = items.to(dtype)
    results = []
    for table in (few_bits, few_bits.float()):
        made = inner_gradient(theta, table, embeds, targets, learner.encoder_shape())
        results.append((made.loss, made.parameters, *made.tangent(*directions([theta]))))
    for a, b in zip(*results, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_embeds_that_are_a_cut_of_longer_sequences():
    learner, _, (theta, items, embeds, targets) = setting()
    shape = learner.encoder_shape()
    longer = torch.cat([embeds, embeds], dim=1)
    expected = in_one_call(shape, theta, items, embeds, targets, None, trained=True)
    actual = in_one_call(shape, theta, items, longer[:, : embeds.shape[1]], targets, None, trained=True)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_embeds_that_lie_otherwise(trained):
    learner, _, (theta, items, embeds, targets) = setting()
    shape = learner.encoder_shape()
    turned = embeds.transpose(1, 2).contiguous().transpose(1, 2)
    expected = in_one_call(shape, theta, items, embeds, targets, None, trained=trained)
    for a, b in zip(
        in_one_call(shape, theta, items, turned, targets, None, trained=trained), expected, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chosen", [[3, 12, 0, 5], [4, 5, 6, 7], [9, 10, 11, 12]], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_users_are_rows_of_all_embeds(trained, chosen):
    learner, _, (theta, items, embeds, targets) = setting()
    shape, users = learner.encoder_shape(), torch.tensor(chosen)
    results = []
    for given, of in ((embeds, users), (embeds[users], None)):
        made = inner_gradient(theta, items, given, targets[:4], shape, trained=trained, users=of)
        moved = [theta, items, embeds[users]] if trained else [theta]
        results.append(
            (made.loss, made.parameters, made.items, made.embeds, *made.tangent(*directions(moved)))
        )
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("users", [[-1, 0], [12, 13], [20]], ids=str)
def test_users_out_of_range_are_refused(users):
    learner, _, (theta, items, embeds, targets) = setting()
    users, targets = torch.tensor(users), targets[: len(users)]
    with pytest.raises(IndexError):
        inner_gradient(theta, items, embeds, targets, learner.encoder_shape(), users=users)


def test_equal_bits_on_any_number_of_threads():
    learner, _, tensors = setting(batch=300, items=400, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            shape = learner.encoder_shape()
            results.append(in_one_call(shape, *tensors, DropoutStream(7), trained=True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_derivative_by_autograd_raises():
    learner, _, (theta, items, embeds, targets) = setting()
    made = inner_gradient(theta.requires_grad_(), items, embeds, targets, learner.encoder_shape())
    with pytest.raises(RuntimeError, match="not implemented"):
        made.parameters.sum().backward()


@pytest.mark.parametrize("target", [0, 9])
def test_a_target_that_is_none_is_refused(target):
    learner, _, (theta, items, embeds, targets) = setting()
    targets[0, 0] = target
    with pytest.raises(IndexError, match="not one of the"):
        inner_gradient(theta, items, embeds, targets, learner.encoder_shape())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, i, e, k: (t[:-1], i, e, k), "parameters"),
        (lambda t, i, e, k: (t, i, e[:, :1], k), "at least 2 positions"),
        (lambda t, i, e, k: (t, i, e[0], k), "at least 2 positions"),
        (lambda t, i, e, k: (t, i, e[:0], k[:0]), "no target"),
        (lambda t, i, e, k: (t, i[:, :-1], e, k), "keys"),
    ],
    ids=["parameters", "positions", "dimensions", "nothing", "width"],
)
def test_sizes_that_do_not_agree_are_refused(change, words):
    learner, _, tensors = setting()
    with pytest.raises(ValueError, match=words):
        inner_gradient(*change(*tensors), learner.encoder_shape())


def test_a_direction_of_another_shape_is_refused():
    learner, _, (theta, items, embeds, targets) = setting()
    made = inner_gradient(theta, items, embeds, targets, learner.encoder_shape())
    with pytest.raises(ValueError, match="shape of what it moves"):
        made.tangent(theta[:-1])


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_schemas(trained):
    learner, _, (theta, items, embeds, targets) = setting()
    made = inner_gradient(theta, items, embeds, targets, learner.encoder_shape(), trained=trained)
    opcheck, step = torch.library.opcheck, torch.ops.td3_fast
    checks = ("test_schema", "test_faketensor")
    inputs = (theta, embeds, targets, items)
    opcheck(step.inner_gradient.default, (*inputs, [], made.sizes, trained), test_utils=checks)
    direction = directions([theta, items, embeds] if trained else [theta])
    direction += [None] * (3 - len(direction))
    opcheck(
        step.inner_gradient_tangent.default,
        (*direction, *inputs, made.saved, [], made.sizes),
        test_utils=checks,
    )
