from __future__ import annotations

import torch

from td3_fast.learners import GRU4Rec, GRU4RecConfig


def test_matches_the_layers_of_torch() -> None:
    model = GRU4Rec(GRU4RecConfig(num_items=20, max_len=10, hidden=6, inner=9, layers=2), seed=0).double()
    reference = torch.nn.GRU(6, 9, num_layers=2, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for index, layer in enumerate(model.recurrent):
            reference.get_parameter(f"weight_ih_l{index}").copy_(layer.input_weight)
            reference.get_parameter(f"weight_hh_l{index}").copy_(layer.state_weight)
    histories, lengths = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([4, 2])
    states, _ = reference(model.item_embeddings[histories])
    expected = model.output(states[torch.arange(2), lengths - 1])
    torch.testing.assert_close(model(histories, lengths), expected)


def test_weights_start_from_xavier_distributions() -> None:
    model = GRU4Rec(GRU4RecConfig(num_items=2000, max_len=10, hidden=64, inner=128), seed=0)
    weight = model.recurrent[0].state_weight
    assert float(weight.detach().abs().max()) <= (6 / (128 + 384)) ** 0.5
    torch.testing.assert_close(weight.std().item(), (2 / 512) ** 0.5, rtol=0.02, atol=0)
    torch.testing.assert_close(model.item_embeddings.std().item(), (2 / 2064) ** 0.5, rtol=0.02, atol=0)
    assert not model.output.bias.any()
