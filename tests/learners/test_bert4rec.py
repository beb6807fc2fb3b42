from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from td3_fast.learners import BERT4Rec, BERT4RecConfig, FlatParameters, as_written
from td3_fast.ops import DropoutStream, has_fused, item_cross_entropy

SIZES = {"num_items": 20, "max_len": 6, "hidden": 8, "inner": 12}


def learner(**changes: Any) -> BERT4Rec:
    model = BERT4Rec(BERT4RecConfig(**{**SIZES, **changes}), seed=0).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.4, generator=generator)
    return model


def without_dropout(**changes: Any) -> BERT4Rec:
    return learner(hidden_dropout=0.0, attention_dropout=0.0, **changes)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("heads", [1, 2])
def test_matches_the_encoder_layers_of_torch(layers: int, heads: int) -> None:
    model = learner(layers=layers, heads=heads)
    histories, lengths = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([4, 2])
    embeds = F.pad(model.item_embeddings[histories][..., :-1], (0, 0, 0, 1))
    rows = torch.arange(2)
    embeds[rows, lengths] = model.mask_embedding
    back = torch.tensor([[4, 3, 2, 1, 0], [2, 1, 0, 0, 0]])
    hidden = model.norm(embeds + model.position_embeddings[back])
    for block in model.blocks:
        reference = torch.nn.TransformerEncoderLayer(
            8, heads, 12, 0.0, F.gelu, 1e-12, batch_first=True, dtype=torch.float64
        )
        with torch.no_grad():
            attention = reference.self_attn
            attention.in_proj_weight.copy_(
                torch.cat([block.query.weight, block.key.weight, block.value.weight])
            )
            attention.in_proj_bias.copy_(torch.cat([block.query.bias, block.key.bias, block.value.bias]))
        attention.out_proj.load_state_dict(block.attention_output.state_dict())
        reference.norm1.load_state_dict(block.attention_norm.state_dict())
        reference.linear1.load_state_dict(block.feed_forward.state_dict())
        reference.linear2.load_state_dict(block.feed_forward_output.state_dict())
        reference.norm2.load_state_dict(block.feed_forward_norm.state_dict())
        hidden = reference(hidden, src_key_padding_mask=torch.arange(5) > lengths.unsqueeze(1))
    expected = model.output_norm(F.gelu(model.output(hidden[rows, lengths])))
    actual = model(histories, lengths)
    torch.testing.assert_close(actual[:, :-1], expected)
    assert (actual[:, -1] == 1).all()


def changed_by(model: BERT4Rec, position: int) -> list[bool]:
    """Whether the outputs behind four items and behind two change with the embedding of a position."""
    batch = (torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([4, 2]))
    before = model(*batch)
    with torch.no_grad():
        model.position_embeddings[position, 0] += 1.0
    return ((model(*batch) - before).abs().amax(-1) > 1e-9).tolist()


def test_positions_are_counted_back_from_the_mask() -> None:
    assert changed_by(without_dropout(), 0) == [True, True]
    assert changed_by(without_dropout(), 3) == [True, False]
    assert changed_by(without_dropout(), 5) == [False, False]


def test_or_from_the_first_item() -> None:
    model = without_dropout(positions_from="first")
    back = without_dropout()
    with torch.no_grad():
        back.position_embeddings[:5].copy_(model.position_embeddings[:5].flip(0))
    batch = (torch.tensor([[1, 2, 3, 4]]), torch.tensor([4]))
    torch.testing.assert_close(model(*batch), back(*batch))
    assert changed_by(model, 3) == [True, False]


def test_files_without_the_field_count_from_the_first_item() -> None:
    sizes = learner().hyperparameters()
    assert as_written("bert4rec", sizes) == sizes
    del sizes["positions_from"]
    assert as_written("BERT4Rec", sizes)["positions_from"] == "first"
    assert as_written("SASRec", sizes) == sizes
    assert as_written("a class of one's own", sizes) == sizes


def test_the_bias_of_an_item_adds_to_its_score_alone() -> None:
    model = learner()
    histories, lengths = torch.tensor([[1, 2, 3]]), torch.tensor([3])
    before = model(histories, lengths) @ model.item_embeddings.T
    with torch.no_grad():
        model.item_embeddings[2, -1] += 5.0
    after = model(histories, lengths) @ model.item_embeddings.T
    torch.testing.assert_close(after - before, 5.0 * F.one_hot(torch.tensor([2]), 20).double())


def test_attention_goes_both_ways() -> None:
    model = without_dropout()
    slots = torch.randn(1, 5, 9, dtype=torch.float64, requires_grad=True)
    masked = torch.tensor([[False, True, False, False, False]])
    output = model._fill_in(slots, masked, torch.tensor([3]), torch.tensor([[1]]), None)
    (gradient,) = torch.autograd.grad(output.sum(), slots)
    assert (gradient[0].abs().sum(-1) > 0).tolist() == [True, False, True, True, False]


def test_loss_without_cloze_is_that_of_the_next_item() -> None:
    model = without_dropout(cloze_share=0.0)
    histories, lengths = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1])
    targets = torch.tensor([5, 6])
    expected = item_cross_entropy(model(histories, lengths), model.item_embeddings, targets).mean()
    loss = model.loss(model.item_embeddings, histories, lengths, targets, dropout=DropoutStream(0))
    torch.testing.assert_close(loss, expected)


def test_a_cloze_that_masks_nothing_masks_the_next_item() -> None:
    plain, cloze = (without_dropout(cloze_share=share, mask_ratio=0.0) for share in (0.0, 1.0))
    batch = (torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1]), torch.tensor([5, 6]))
    losses = [model.loss(model.item_embeddings, *batch, dropout=DropoutStream(0)) for model in (plain, cloze)]
    torch.testing.assert_close(losses[0], losses[1])


def test_cloze_loss_is_the_mean_over_the_masks_of_each_sequence() -> None:
    model = without_dropout(cloze_share=1.0, mask_ratio=0.4)
    histories, lengths = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]]), torch.tensor([5, 2])
    targets, items = torch.tensor([8, 9]), model.item_embeddings
    sequences = [[1, 2, 3, 4, 5, 8], [6, 7, 9]]
    seen = set()
    for seed in range(6):
        drawn = DropoutStream(seed).mask(
            torch.Size([2, 6]), 0.4, dtype=torch.float64, device=torch.device("cpu")
        )
        losses = []
        for row, sequence in enumerate(sequences):
            masked = drawn[row, : len(sequence)] == 0
            if not masked.any():
                masked[-1] = True
            seen.add(int(masked.sum()))
            slots = items[torch.tensor([sequence])]
            where = masked.nonzero().T
            last = torch.tensor([len(sequence) - 1])
            hidden = model._told(model._fill_in(slots, masked.unsqueeze(0), last, where, None)[0])
            losses.append(item_cross_entropy(hidden, items, torch.tensor(sequence)[where[0]]).mean())
        actual = model.loss(items, histories, lengths, targets, dropout=DropoutStream(seed))
        torch.testing.assert_close(actual, torch.stack(losses).mean())
    assert len(seen) > 2


FUSED = pytest.mark.skipif(not has_fused("cpu"), reason="needs the compiled kernels")
Batch = tuple[Tensor, Tensor, Tensor]


def batch_of(count: int) -> Batch:
    generator = torch.Generator().manual_seed(4)
    histories = torch.randint(1, 20, (count, 6), generator=generator)
    lengths = torch.randint(1, 7, (count,), generator=generator)
    return histories, lengths, torch.randint(1, 20, (count,), generator=generator)


def loss_of(flat: FlatParameters, batch: Batch, theta: Tensor, items: Tensor) -> Tensor:
    return flat.loss(theta, items, *batch, dropout=DropoutStream(7))


def outputs(flat: FlatParameters, batch: Batch, theta: Tensor, items: Tensor) -> Tensor:
    positions = torch.tensor([[5, 0], [2, 3]]).repeat(len(batch[0]) // 2, 1)
    return flat.encode(theta, items[batch[0]], positions, dropout=DropoutStream(7)).square().sum()


def after_a_step(flat: FlatParameters, batch: Batch, theta: Tensor, items: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss_of(flat, batch, theta, items), theta, create_graph=True)
    return loss_of(flat, batch, theta - 0.1 * gradient, items)


@FUSED
@pytest.mark.parametrize("value", [loss_of, outputs, after_a_step])
@pytest.mark.parametrize(
    "changes", [{}, {"layers": 1, "heads": 1}, {"cloze_share": 1.0}, {"positions_from": "first"}], ids=str
)
def test_the_fused_blocks_are_the_modules_at_every_order(
    value: Callable[..., Tensor], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = learner(**changes)
    flat, batch = FlatParameters(model), batch_of(40)
    theta = flat.gather(model.state_dict()).requires_grad_()
    items = model.item_embeddings.detach().clone().requires_grad_()

    def orders() -> list[Tensor]:
        made = value(flat, batch, theta, items)
        first = torch.autograd.grad(made, (theta, items), create_graph=value is not after_a_step)
        if value is after_a_step:
            return [made, *first]
        return [made, *first, *torch.autograd.grad(sum(x.square().sum() for x in first), (theta, items))]

    fused = orders()
    monkeypatch.setattr("td3_fast.learners.bert4rec.has_transformer_encoder", lambda *_: False)
    for a, b in zip(fused, orders(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@FUSED
def test_it_is_trained_by_the_fused_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = learner()

    def never(*_: object) -> None:
        raise AssertionError("a module of a block was called")

    monkeypatch.setattr("td3_fast.learners.transformer.Block.forward", never)
    flat = FlatParameters(model)
    theta = flat.gather(model.state_dict())
    flat.loss_gradient(theta, model.item_embeddings.detach(), *batch_of(6), dropout=DropoutStream(0))
    assert flat.fused_shape(theta) is None  # what is made for a causal encoder is not for it


def test_transforms_of_torch_func_take_it() -> None:
    model = learner()
    flat, batch = FlatParameters(model), batch_of(6)
    theta, items = flat.gather(model.state_dict()), model.item_embeddings.detach()
    made = torch.func.grad(lambda theta: loss_of(flat, batch, theta, items))(theta)
    _, (expected, _) = flat.loss_gradient(theta, items, *batch, dropout=DropoutStream(7))
    torch.testing.assert_close(made, expected)


def test_longer_histories_than_it_has_positions_for_are_refused() -> None:
    with pytest.raises(ValueError, match="reads 6"):
        learner().encode(torch.zeros(1, 7, 9, dtype=torch.float64), torch.tensor([[6]]))
    with pytest.raises(ValueError, match=r"cloze_share must lie in \[0, 1\]"):
        BERT4RecConfig(**SIZES, cloze_share=1.5)
    with pytest.raises(ValueError, match='positions_from must be "last" or "first"'):
        learner(positions_from="end")
    with pytest.raises(ValueError, match="multiple of heads"):
        BERT4RecConfig(**SIZES, heads=3)
