"""The gated recurrent layer that GRU4Rec and NARM are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GRU(nn.Module):
    """One layer of gated recurrent units (Cho et al., EMNLP 2014) without biases, its state 0 at first.

        r = sigmoid(W_r x + U_r h)    z = sigmoid(W_z x + U_z h)    n = tanh(W_n x + r ∘ U_n h)    h ← n + z ∘ (h − n)

    A loop over time in plain PyTorch, so differentiable to any order on every device. It is the only path: cuDNN's
    recurrence has no second order, and PyTorch's own on the CPU, which has it, rounds otherwise, so that a step inside
    a differentiated window would not have the bits of the same step outside.
    """

    def __init__(self, inputs: int, states: int) -> None:
        super().__init__()
        # the blocks of rows belong to r, z and n, as in torch.nn.GRU
        self.input_weight = nn.Parameter(torch.empty(3 * states, inputs))
        self.state_weight = nn.Parameter(torch.empty(3 * states, states))

    def forward(self, inputs: Tensor) -> Tensor:
        """The state after each input: (batch, length, inputs) -> (batch, length, states)."""
        by_time = inputs.transpose(0, 1)
        # one tensor a gate and nothing cut out inside the loop, whose backward pass would fill in the rest with zeros
        to_reset, to_update, to_new = (
            (by_time @ weight.T).unbind(0) for weight in self.input_weight.chunk(3)
        )
        reset_weight, update_weight, new_weight = (weight.T for weight in self.state_weight.chunk(3))
        state = inputs.new_zeros(len(inputs), len(new_weight))
        states = []
        for x_reset, x_update, x_new in zip(to_reset, to_update, to_new, strict=True):
            reset = torch.sigmoid(torch.addmm(x_reset, state, reset_weight))
            update = torch.sigmoid(torch.addmm(x_update, state, update_weight))
            new = torch.tanh(torch.addcmul(x_new, reset, state @ new_weight))
            state = torch.lerp(new, state, update)
            states.append(state)
        return torch.stack(states, dim=1)
