from __future__ import annotations

import pytest
import torch

from td3_fast.learners import FlatParameters, SASRec, SASRecConfig, build_learner
from td3_fast.ops import DropoutStream

SIZES = {"num_items": 20, "max_len": 10, "hidden": 16, "inner": 8}


def learner(**changes: int) -> SASRec:
    model = SASRec(SASRecConfig(**{**SIZES, **changes}), seed=0).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3, generator=generator)
    return model


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("layers", [1, 2])
def test_outputs_at_a_few_positions_equal_those_of_the_full_pass(heads: int, layers: int) -> None:
    model = learner(heads=heads, layers=layers)
    embeds = torch.randn(3, 9, 16, dtype=torch.float64)
    positions = torch.tensor([[8, 3], [7, 2], [5, 0]])
    everywhere = model.encode(embeds, torch.arange(9).expand(3, 9))
    expected = everywhere.gather(1, positions.unsqueeze(-1).expand(-1, -1, 16))
    torch.testing.assert_close(model.encode(embeds, positions), expected)


def test_an_output_does_not_see_later_inputs_or_padding() -> None:
    model = learner(layers=2)
    short = torch.tensor([[3, 4, 5]])
    padded = torch.tensor([[3, 4, 5, 0, 0], [3, 4, 5, 9, 9]])
    alone = model(short, torch.tensor([3]))
    torch.testing.assert_close(model(padded, torch.tensor([3, 3])), alone.expand(2, -1))


def test_matches_the_blocks_written_with_torch_modules() -> None:
    model = learner(heads=2)
    block = model.blocks[0]
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([block.query.weight, block.key.weight, block.value.weight]))
        attention.in_proj_bias.copy_(torch.cat([block.query.bias, block.key.bias, block.value.bias]))
        attention.out_proj.load_state_dict(block.attention_output.state_dict())
    histories, lengths = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), torch.tensor([4, 4])
    hidden = model.norm(model.item_embeddings[histories] + model.position_embeddings[:4])
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    attended = block.attention_norm(hidden + attention(hidden, hidden, hidden, attn_mask=mask)[0])
    inner = torch.nn.functional.gelu(block.feed_forward(attended))
    expected = block.feed_forward_norm(attended + block.feed_forward_output(inner))[:, -1]
    torch.testing.assert_close(model(histories, lengths), expected)


def test_dropout_of_one_seed_repeats_itself() -> None:
    model = learner()
    embeds, positions = torch.randn(3, 9, 16, dtype=torch.float64), torch.tensor([[8], [8], [8]])
    first, again, other = (model.encode(embeds, positions, dropout=DropoutStream(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_reset_keeps_the_embeddings_and_follows_the_seed() -> None:
    model = learner()
    items, positions = model.item_embeddings.clone(), model.position_embeddings.clone()
    model.reset_encoder(seed=1)
    first = model.blocks[0].query.weight.clone()
    model.reset_encoder(seed=2)
    assert not torch.equal(first, model.blocks[0].query.weight)
    model.reset_encoder(seed=1)
    assert torch.equal(first, model.blocks[0].query.weight)
    assert torch.equal(items, model.item_embeddings)
    assert torch.equal(positions, model.position_embeddings)


def test_flat_vector_and_learner_agree() -> None:
    model, other = learner(), learner(layers=1)
    other.reset_encoder(seed=3)
    flat = FlatParameters(other)
    vector = flat.gather(model.state_dict())
    embeds, positions = torch.randn(2, 5, 16, dtype=torch.float64), torch.tensor([[4], [2]])
    torch.testing.assert_close(flat.encode(vector, embeds, positions), model.encode(embeds, positions))
    flat.write(other, vector, model.item_embeddings)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert flat.size + model.item_embeddings.numel() == sum(p.numel() for p in model.parameters())


def test_hyperparameters_build_the_same_learner() -> None:
    model = learner(heads=2)
    assert (
        build_learner("SASRec", model.hyperparameters(), seed=0).hyperparameters() == model.hyperparameters()
    )
    with pytest.raises(ValueError, match="unknown learner 'LSTM': expected one of SASRec"):
        build_learner("LSTM", {}, seed=0)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of heads"):
        SASRecConfig(num_items=5, max_len=3, hidden=10, heads=3)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        SASRecConfig(num_items=5, max_len=3, hidden_dropout=1.0)
    with pytest.raises(ValueError, match="has 10 positions"):
        learner().encode(torch.zeros(1, 11, 16, dtype=torch.float64), torch.tensor([[10]]))
