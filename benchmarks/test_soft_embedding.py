"""Soft embedding, dense eager against the fused kernels: value, + backward, + double backward, in float32."""

import pytest
import torch

from td3_fast import ops

# rows, items, width of keys and of values
SIZES = {
    "small": [(50, 3_700, 32), (500, 20_000, 64)],
    "full": [
        (rows, n, d) for rows in (50, 100, 2500) for n in (3_700, 100_000, 1_000_000) for d in (32, 64, 128)
    ],
}
# Dense tensors of rows x items beyond this are left out.
DENSE_BYTES = 2 << 30


def make_run(size, order, backend, device):
    rows, n, d = size
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, d), (n, d), (n, d)]
    inputs = [torch.randn(shape, generator=generator).mul_(d**-0.5).to(device) for shape in shapes]
    inputs = [x.requires_grad_(order > 0) for x in inputs]
    upstream = torch.randn(rows, d, generator=generator).to(device).requires_grad_()
    cotangents = [torch.randn(shape, generator=generator).to(device) for shape in shapes]

    def run():
        embedding, logsumexp = ops.soft_embedding(*inputs, backend=backend)
        if order == 0:
            return embedding, logsumexp
        first = torch.autograd.grad(embedding, inputs, upstream, create_graph=order > 1)
        if order == 1:
            return first
        return torch.autograd.grad(first, [*inputs, upstream], cotangents)

    return run


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("order", [0, 1, 2], ids=["forward", "backward", "double backward"])
def test_soft_embedding(order, backend, size, device, measure, benchmark):
    rows, n, d = size
    dense = rows * n * 4 * (1 + 3 * order) <= DENSE_BYTES
    if backend == "reference" and not dense:
        pytest.skip("dense tensors of rows x items are too large")
    benchmark.group = f"soft_embedding {rows}x{n}x{d}, order {order}"
    run = make_run(size, order, backend, device)
    measure(run, make_run(size, order, "reference", device)() if dense else run())


def test_matrix_product(matrix_product):
    pass
