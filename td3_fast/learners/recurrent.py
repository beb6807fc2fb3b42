"""The gated recurrent layers that GRU4Rec and NARM are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from td3_fast.ops import gru


class GRU(nn.Module):
    """One layer of gated recurrent units without biases: the parameters of `ops.gru`."""

    def __init__(self, inputs: int, states: int) -> None:
        super().__init__()
        # the blocks of rows belong to r, z and n, as in torch.nn.GRU
        self.input_weight = nn.Parameter(torch.empty(3 * states, inputs))
        self.state_weight = nn.Parameter(torch.empty(3 * states, states))

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """The state after each input: (batch, length, inputs), (batch,) int64 -> (batch, length, states).

        Of each sequence the inputs up to its length count; the states beyond are zero.
        """
        return gru(inputs, self.input_weight, self.state_weight, lengths)


def recurrent_states(layers: nn.ModuleList, inputs: Tensor, positions: Tensor) -> Tensor:
    """The states of the last layer after inputs (batch, length, d), zero beyond the last of positions (batch, k)."""
    lengths = positions.amax(dim=1) + 1 if positions.shape[1] else positions.new_zeros(len(positions))
    states = inputs
    for layer in layers:
        states = layer(states, lengths)
    return states
