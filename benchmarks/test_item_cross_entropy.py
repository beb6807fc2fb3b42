"""Cross-entropy over items with soft targets, dense eager against the fused kernels, in float32."""

import pytest
import torch

from td3_fast import ops

# rows, items, d; the first is what an inner step of ml-100k asks for
SIZES = {
    "small": [(50, 1_683, 32), (100, 20_000, 64)],
    "full": [
        (rows, n, d) for rows in (50, 100, 2500) for n in (3_700, 100_000, 1_000_000) for d in (32, 64, 128)
    ],
}
DENSE_BYTES = 2 << 30


def make_run(size, order, items_move, backend, device):
    rows, n, d = size
    generator = torch.Generator().manual_seed(0)
    hidden, items, target = (
        torch.randn(shape, generator=generator).mul_(d**-0.5).to(device)
        for shape in ((rows, d), (n, d), (rows, d))
    )
    inputs = [hidden.requires_grad_(), items.requires_grad_()] if items_move else [hidden.requires_grad_()]
    target.requires_grad_()
    cotangents = [torch.randn(x.shape, generator=generator).to(device) for x in inputs]

    def run():
        loss = ops.item_cross_entropy(hidden, items, target, backend=backend)
        first = torch.autograd.grad(loss.sum(), inputs, create_graph=order > 1)
        if order == 1:
            return loss, *first
        return torch.autograd.grad(first, [*inputs, target], cotangents)

    return run


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("items_move", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("order", [1, 2], ids=["gradient", "second order"])
def test_item_cross_entropy(order, items_move, backend, size, device, measure, benchmark):
    rows, n, d = size
    dense = rows * n * 4 * (1 + 3 * order) <= DENSE_BYTES
    if backend == "reference" and not dense:
        pytest.skip("dense tensors of rows x items are too large")
    benchmark.group = (
        f"item_cross_entropy {rows}x{n}x{d}, order {order}, items {'trained' if items_move else 'frozen'}"
    )
    run = make_run(size, order, items_move, backend, device)
    measure(run, make_run(size, order, items_move, "reference", device)() if dense else run())
