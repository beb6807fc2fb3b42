"""The encoder's operators on a GPU against those of the CPU, which other tests hold against the modules."""

import pytest
import test_inner_gradient as step
import test_next_item_gradient as real
import test_transformer_encoder as encoder
import torch

from td3_fast import ops
from td3_fast.ops import DropoutStream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ops.has_fused("cuda"), reason="no fused kernels are built"),
]
# those of the kernels that are compiled for them
USUAL_SIZES = {"hidden": 32, "inner": 64}
DROPOUT = pytest.mark.parametrize("dropout", [None, 7], ids=["no dropout", "dropout"])


def stream(seed):
    return None if seed is None else DropoutStream(seed)


def assert_alike(on_gpu, on_cpu, dtype):
    for own, other in zip(on_gpu, on_cpu, strict=True):
        if other is None:
            assert own is None
            continue
        tolerance = {"rtol": 1e-9, "atol": 1e-11}
        if dtype == torch.float32:
            tolerance = {"rtol": 1e-4, "atol": 1e-5 * float(other.detach().abs().max()) + 1e-6}
        torch.testing.assert_close(own.cpu(), other, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@DROPOUT
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": 2, "heads": 2},
        {"batch": 1, "asked": 1},
        {"length": 1},
        {"rates": (0.0, 0.3)},
        {"batch": 700},
        {"batch": 300, "layers": 3, "heads": 4},
        USUAL_SIZES,
        {"batch": 700, **USUAL_SIZES},
    ],
    ids=str,
)
def test_transformer_encoder(changes, dropout, dtype):
    _, flat, theta, inputs, positions = encoder.setting(**changes, dtype=dtype)

    def on(device):
        moved = [x.detach().to(device).requires_grad_() for x in (theta, inputs)]
        generator = torch.Generator().manual_seed(3)

        def like(x):
            return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(device, dtype)

        outputs = flat.encode(*moved, positions.to(device), dropout=stream(dropout))
        upstream = like(outputs).requires_grad_()
        first = torch.autograd.grad(outputs, moved, upstream, create_graph=True)
        second = torch.autograd.grad(first, (*moved, upstream), [like(x) for x in first])
        return [outputs, *first, *second]

    assert_alike(on("cuda"), on("cpu"), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@DROPOUT
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": 2, "heads": 2},
        {"positions": 2},
        {"batch": 25, "asked": 3, "items": 1700},
        {"batch": 25, "asked": 9},
        {"batch": 25, "items": 9000},
        {"batch": 25, "items": 1700, **USUAL_SIZES},
    ],
    ids=str,
)
def test_inner_gradient(changes, dropout, trained, dtype):
    learner, _, tensors = step.setting(**changes, dtype=dtype)
    shape = learner.encoder_shape()

    def on(device):
        moved = [x.to(device) for x in tensors]
        made = ops.inner_gradient(*moved, shape, dropout=stream(dropout), trained=trained)
        directions = [x.to(device) for x in step.directions(tensors[: 3 if trained else 1])]
        return [made.loss, made.parameters, made.items, made.embeds, *made.tangent(*directions)]

    assert_alike(on("cuda"), on("cpu"), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@DROPOUT
@pytest.mark.parametrize("changes", [{}, {"layers": 2, "heads": 2}, {"batch": 700}, USUAL_SIZES], ids=str)
def test_next_item_gradient_and_histories(changes, dropout, trained, dtype):
    learner, _, tensors = real.setting(**changes, dtype=dtype)
    features = real.features_like(tensors[1], len(tensors[4]))
    shape = learner.encoder_shape()

    def on(device):
        theta, items, histories, lengths, targets = (x.to(device) for x in tensors)
        made = ops.next_item_gradient(
            theta,
            items,
            histories,
            lengths,
            targets,
            shape,
            dropout=stream(dropout),
            features=features.to(device),
            alignment=0.7,
            trained=trained,
        )
        encoded = ops.encode_histories(theta, items, histories, lengths, shape, dropout=stream(dropout))
        return [*made, encoded]

    assert_alike(on("cuda"), on("cpu"), dtype)


def test_the_same_bits_every_time():
    learner, _, tensors = step.setting(batch=25, items=1700, dtype=torch.float32)
    moved = [x.cuda() for x in tensors]
    results = []
    for _ in range(3):
        made = ops.inner_gradient(*moved, learner.encoder_shape(), dropout=DropoutStream(7))
        results.append([made.loss, made.parameters, *made.tangent(step.directions(tensors[:1])[0].cuda())])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is b is None or torch.equal(a, b)
