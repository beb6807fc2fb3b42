"""Products of kept probabilities with a narrow table and with a cotangent, and those of cotangents and tables that they
weigh, beside the general matrix product.

Of a flat summary, and of a sharp one, whose smallest probabilities are no normal numbers of float32.
"""

from __future__ import annotations

import torch

from td3_fast import ops

PARAMETERS = {
    # rows, items, d
    "size": {
        "small": [(1_250, 1_683, 32), (2_500, 3_417, 32)],
        "acceptance": [(2_500, 3_417, 32), (2_500, 20_000, 64)],
        "full": [(2_500, 100_000, 64)],
    },
    "product": ["with a table", "with a cotangent", "weighing pairs"],
    "scores": ["flat", "sharp"],
    "variant": ["fused", "dense eager"],
}
# Of scores: largest beside smallest of a row as in a summary of ml-1m after 150 outer steps, about e^60.
SPREAD = {"flat": 0.1, "sharp": 15.0}
COTANGENT = 1e-6  # of the size that real ones have
PAIRS = 8  # of a cotangent and a table, of those that are weighed
RANK = 16  # of the keys that they are summed by


def make_run(variant, product, scores, size, device):
    rows, n, d = size
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device)

    probabilities = torch.softmax(SPREAD[scores] * draw(rows, n), dim=-1)
    if product == "weighing pairs":
        cotangents = [COTANGENT * draw(rows, d) for _ in range(PAIRS)]
        tables, keys = [draw(n, d) for _ in range(PAIRS)], draw(n, RANK)
        if variant == "fused":
            return lambda: ops.weigh_products(probabilities, cotangents, tables, keys)[:2]

        def weigh():
            weighted = (torch.cat(cotangents, dim=1) @ torch.cat(tables, dim=1).T).mul_(probabilities)
            return weighted @ keys, weighted.sum(-1, keepdim=True)

        return weigh
    other = draw(n, d) if product == "with a table" else COTANGENT * draw(rows, d)
    if variant == "fused":
        function = ops.mix_items if product == "with a table" else ops.mix_items_transposed
        return lambda: (function(probabilities, other),)
    left = probabilities if product == "with a table" else probabilities.T
    return lambda: (left @ other,)


def test_mix_items(size, product, scores, variant, device, measure):
    rows, n, d = size
    measure(
        f"{scores} probabilities {rows} x {n} {product} {d} wide, float32",
        variant,
        make_run(variant, product, scores, size, device),
        make_run("fused", product, scores, size, device),
        make_run("dense eager", product, scores, size, device)(),
        flops=2 * rows * n * d * (PAIRS if product == "weighing pairs" else 1),
    )
