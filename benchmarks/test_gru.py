"""The recurrent layer beside its loop over time and, where they have the order, the layers of PyTorch."""

from __future__ import annotations

import pytest
import torch

from td3_fast import ops

PARAMETERS = {
    # sequences, their length, width of inputs and of states
    "size": {
        "small": [(25, 50, 32, 64), (512, 50, 32, 64)],
        "acceptance": [(2_048, 50, 32, 64)],
        "full": [(2_048, 200, 64, 128)],
    },
    "order": [0, 1, 2],
    "variant": ["fused", "loop", "torch.nn.GRU"],
}


def make_run(variant, size, order, device):
    batch, length, d, states = size
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device)

    tensors = draw(batch, length, d), 0.1 * draw(3 * states, d), 0.1 * draw(3 * states, states)
    lengths = torch.full((batch,), length, device=device)
    upstream = draw(batch, length, states)
    directions = [draw(*x.shape) for x in tensors]
    layer = {"fused": ops.gru, "loop": ops.gru_reference}.get(variant)
    if layer is None:

        def layer(inputs, input_weight, state_weight, lengths):
            state = inputs.new_zeros(1, len(inputs), states)
            weights = [input_weight, state_weight]
            return torch.gru(inputs, state, weights, False, 1, 0.0, True, False, True)[0]

    def run():
        if order == 0:
            return (layer(*tensors, lengths),)
        leaves = [x.detach().requires_grad_() for x in tensors]
        first = torch.autograd.grad(layer(*leaves, lengths), leaves, upstream, create_graph=order == 2)
        return first if order == 1 else torch.autograd.grad(first, leaves, directions)

    return run


def test_gru(size, order, variant, device, measure):
    if device.type != "cpu" and (variant == "torch.nn.GRU" and order == 2):
        pytest.skip("cuDNN's recurrence has no second order")
    batch, length, d, states = size
    # each step's products once forward, and of each derivative those that it cannot do without
    products = {0: 1, 1: 3, 2: 9}[order]
    measure(
        f"gru {batch} x {length} x {d} -> {states} float32, order {order}",
        variant,
        make_run(variant, size, order, device),
        make_run("fused", size, order, device),
        make_run("loop", size, order, device)(),
        flops=products * 2 * batch * length * 3 * states * (d + states),
    )
