"""The gradient of the loss on real examples in one call, against autograd through the separate ops."""

import pytest
import torch
from torch.autograd import grad
from torch.nn import functional as F

from td3_fast import ops
from td3_fast.learners import FlatParameters, SASRec, SASRecConfig
from td3_fast.ops import DropoutStream, item_cross_entropy, look_up, next_item_gradient
from td3_fast.ops.transformer_encoder import packed_sizes

pytestmark = pytest.mark.skipif(not ops.has_fused("cpu"), reason="needs the compiled kernels")


def setting(*, batch=13, length=9, layers=1, heads=1, hidden=8, inner=10, items=30, dtype=torch.float64):
    """(learner, its vector, the tensors of `next_item_gradient`)."""
    config = SASRecConfig(num_items=items, max_len=11, hidden=hidden, inner=inner, heads=heads, layers=layers)
    learner = SASRec(config, seed=1).to(dtype)
    flat = FlatParameters(learner)
    generator = torch.Generator().manual_seed(2)
    theta = flat.gather(learner.state_dict())
    theta = theta + 0.3 * torch.randn(theta.shape, generator=generator, dtype=torch.float64).to(dtype)
    table = torch.randn(items, hidden, generator=generator, dtype=torch.float64).to(dtype)
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    histories = torch.randint(1, items, (batch, length), generator=generator)
    histories = torch.where(torch.arange(length) < lengths.unsqueeze(1), histories, 0)
    targets = torch.randint(1, items, (batch,), generator=generator)
    return learner, flat, (theta, table, histories, lengths, targets)


def features_like(table, batch):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, table.shape[1], generator=generator, dtype=torch.float64).to(table.dtype)


def by_autograd(flat, theta, table, histories, lengths, targets, dropout, features, alignment, *, trained):
    theta, table = theta.detach().requires_grad_(), table.detach().requires_grad_(trained)
    embeds = look_up(table, histories)
    hidden = flat._filled(theta).encode(embeds, (lengths - 1).unsqueeze(1), dropout=dropout).squeeze(1)
    loss = item_cross_entropy(hidden, table, targets, backend="reference").mean()
    aligned = torch.zeros(()) if features is None else alignment * F.mse_loss(hidden, features)
    return [loss, aligned, *grad(loss + aligned, [theta, table] if trained else [theta])]


def in_one_call(learner, tensors, dropout, features, alignment, *, trained):
    made = next_item_gradient(
        *tensors,
        learner.encoder_shape(),
        dropout=dropout,
        features=features,
        alignment=alignment,
        trained=trained,
    )
    return [x for x in made if x is not None]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("aligned", [False, True], ids=["", "aligned"])
@pytest.mark.parametrize("dropout", [None, 7], ids=["no dropout", "dropout"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"layers": 2, "heads": 2}, {"batch": 1}, {"length": 1}, {"batch": 300}, {"batch": 300, "layers": 3}],
    ids=str,
)
def test_equals_autograd_through_the_modules(changes, dropout, aligned, trained):
    learner, flat, tensors = setting(**changes)
    features = features_like(tensors[1], len(tensors[4])) if aligned else None

    def stream():
        return None if dropout is None else DropoutStream(dropout)

    expected = by_autograd(flat, *tensors, stream(), features, 0.7, trained=trained)
    actual = in_one_call(learner, tensors, stream(), features, 0.7, trained=trained)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b.detach().to(a.dtype), rtol=1e-9, atol=1e-11)


def test_float32_is_as_near_to_float64_as_autograd_is():
    results = []
    for dtype in (torch.float64, torch.float32):
        learner, flat, tensors = setting(batch=300, dtype=dtype)
        features = features_like(tensors[1], 300)
        results.append(by_autograd(flat, *tensors, DropoutStream(7), features, 0.7, trained=True))
    fused = in_one_call(learner, tensors, DropoutStream(7), features, 0.7, trained=True)
    for exact, near, own in zip(*results, fused, strict=True):
        budget = 3 * (near - exact).abs().max() + 1e-5 * exact.abs().max()
        assert (own - exact).abs().max() <= budget


def test_equal_bits_on_any_number_of_threads():
    learner, _, tensors = setting(batch=600, items=400, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(in_one_call(learner, tensors, DropoutStream(7), None, 0.0, trained=True))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_learner_takes_it_and_gives_what_autograd_gives():
    _, flat, (theta, table, histories, lengths, targets) = setting()
    loss, gradients = flat.loss_gradient(theta, table, histories, lengths, targets, dropout=DropoutStream(7))
    leaves = [theta.requires_grad_(), table.requires_grad_()]
    expected = flat.loss(*leaves, histories, lengths, targets, dropout=DropoutStream(7))
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradients, grad(expected, leaves))


def test_a_derivative_by_autograd_raises():
    learner, _, (theta, *rest) = setting()
    made = next_item_gradient(theta.requires_grad_(), *rest, learner.encoder_shape())
    with pytest.raises(RuntimeError, match="not implemented"):
        made.parameters.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t, i, h, n, k: (t, i, h[:0], n[:0], k[:0]), ValueError, "at least one example"),
        (lambda t, i, h, n, k: (t, i, h, n[1:], k), ValueError, "lengths"),
        (lambda t, i, h, n, k: (t, i.float(), h, n, k), ValueError, "dtype"),
        (lambda t, i, h, n, k: (t, i, h, n + 9, k), IndexError, "not one of the"),
        (lambda t, i, h, n, k: (t, i, h + 30, n, k), IndexError, "range"),
    ],
    ids=["nothing", "lengths", "dtype", "long", "items"],
)
def test_what_does_not_fit_is_refused(change, error, words):
    learner, _, tensors = setting()
    with pytest.raises(error, match=words):
        next_item_gradient(*change(*tensors), learner.encoder_shape())


def test_schemas():
    learner, _, tensors = setting()
    sizes = packed_sizes(learner.encoder_shape())
    for features in (None, features_like(tensors[1], 13)):
        for trained in (False, True):
            torch.library.opcheck(
                torch.ops.td3_fast.next_item_gradient.default,
                (*tensors, features, 0.5, [], sizes, trained),
                test_utils=("test_schema", "test_faketensor"),
            )


@pytest.mark.parametrize("width", [1, 8, 33])
def test_the_gradient_of_looked_up_rows(width):
    table = torch.randn(9, width, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(9, (5, 6), generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(look_up, (table, ids[0, 0]))
    assert torch.autograd.gradcheck(look_up, (table, ids))
    assert torch.autograd.gradgradcheck(look_up, (table, ids))
    cotangent = torch.randn(5, 6, width, dtype=torch.float64)
    (own,) = grad(look_up(table, ids), table, cotangent)
    (theirs,) = grad(F.embedding(ids, table), table, cotangent)
    torch.testing.assert_close(own, theirs)
    torch.library.opcheck(
        torch.ops.td3_fast.sum_rows_by_id.default, (cotangent.flatten(0, 1), ids.flatten(), 9)
    )
    with pytest.raises(IndexError, match="not one of 3"):
        torch.ops.td3_fast.sum_rows_by_id(cotangent.flatten(0, 1), ids.flatten(), 3)


def test_looking_up_under_the_transforms_of_torch_func():
    table = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(9, (5, 6), generator=torch.Generator().manual_seed(2))
    weights = torch.randn(5, 6, 4, dtype=torch.float64)

    def total(look_up):
        return lambda table, ids: (look_up(table, ids) ** 3 * weights).sum()

    own, theirs = total(look_up), total(lambda table, ids: F.embedding(ids, table))
    for transform in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(transform(own)(table, ids), transform(theirs)(table, ids))
    tangent = torch.randn_like(table)
    for a, b in zip(
        torch.func.jvp(lambda t: own(t, ids), (table,), (tangent,)),
        torch.func.jvp(lambda t: theirs(t, ids), (table,), (tangent,)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    many = torch.stack([ids, ids.flip(0)])
    torch.testing.assert_close(
        torch.vmap(lambda i: look_up(table, i))(many), torch.stack([F.embedding(i, table) for i in many])
    )
    by_element = torch.vmap(torch.func.grad(own), in_dims=(None, 0))(table, many)
    torch.testing.assert_close(by_element, torch.stack([torch.func.grad(theirs)(table, i) for i in many]))
