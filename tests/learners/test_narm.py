from __future__ import annotations

import torch

from td3_fast.learners import NARM, NARMConfig


def test_matches_the_paper_written_out_for_one_history() -> None:
    model = NARM(NARMConfig(num_items=20, max_len=10, hidden=6, inner=9), seed=0).double()
    reference = torch.nn.GRU(6, 9, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        reference.weight_ih_l0.copy_(model.recurrent[0].input_weight)
        reference.weight_hh_l0.copy_(model.recurrent[0].state_weight)
    history = torch.tensor([[4, 9, 2, 7]])
    (states,), _ = reference(model.item_embeddings[history])
    local = torch.zeros(9, dtype=torch.float64)
    for state in states:
        gate = torch.sigmoid(model.query.weight @ states[-1] + model.key.weight @ state)
        local = local + (model.energy.weight[0] @ gate) * state
    expected = model.decoder.weight @ torch.cat([states[-1], local])
    torch.testing.assert_close(model(history, torch.tensor([4]))[0], expected)
