"""What holds for every learner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from td3_fast.checkpoint import load_pretrained, save_pretrained
from td3_fast.data import Split, generate_interactions, leave_one_out
from td3_fast.distill import Distiller, distill
from td3_fast.distill_config import DistillConfig
from td3_fast.evaluate import learner_for, popularity_scores
from td3_fast.learners import (
    LEARNERS,
    FlatParameters,
    Learner,
    SASRec,
    SASRecConfig,
    build_learner,
    register_learner,
)
from td3_fast.ops import DropoutStream
from td3_fast.pretrain import PretrainConfig, pretrain
from td3_fast.summary import TuckerSummary
from td3_fast.training import FitConfig, Pretrained, Ranker

SIZES = {"num_items": 20, "max_len": 10, "hidden": 8, "inner": 12}
EACH = pytest.mark.parametrize("name", LEARNERS)
DEEP = pytest.mark.parametrize("layers", [1, 2])


def learner(name: str, **changes: Any) -> Learner:
    """With weights large enough for every path to count."""
    model = build_learner(name, {**SIZES, **changes}, seed=0).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.4, generator=generator)
    return model


def embeddings(model: Learner, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, model.item_embeddings.shape[1], dtype=torch.float64)


@EACH
@DEEP
def test_an_output_does_not_see_later_inputs_or_padding(name: str, layers: int) -> None:
    model = learner(name, layers=layers)
    alone = model(torch.tensor([[3, 4, 5]]), torch.tensor([3]))
    padded = torch.tensor([[3, 4, 5, 0, 0], [3, 4, 5, 9, 9]])
    torch.testing.assert_close(model(padded, torch.tensor([3, 3])), alone.expand(2, -1))


@EACH
def test_it_compiles_whole(name: str) -> None:
    model = learner(name)
    histories, lengths = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0]]), torch.tensor([4, 3])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    table = model.item_embeddings
    for a, b in zip(compiled(histories, lengths), model(histories, lengths), strict=True):
        torch.testing.assert_close(a, b)
        made, expected = (torch.autograd.grad(x.pow(3).sum(), table, retain_graph=True) for x in (a, b))
        torch.testing.assert_close(made, expected)


@EACH
def test_without_positions_there_are_no_outputs(name: str) -> None:
    model = learner(name)
    nothing = torch.zeros(3, 0, dtype=torch.int64)
    assert model.encode(embeddings(model, 3, 5), nothing).shape == (3, 0, model.item_embeddings.shape[1])


@EACH
def test_an_output_sees_all_inputs_up_to_its_own(name: str) -> None:
    model = learner(name)
    embeds = embeddings(model, 1, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(model.encode(embeds, torch.tensor([[3]])).sum(), embeds)
    assert (gradient[0].abs().sum(-1) > 0).tolist() == [True] * 4 + [False] * 2


@EACH
@DEEP
def test_several_positions_give_what_each_gives_alone(name: str, layers: int) -> None:
    model = learner(name, layers=layers)
    embeds, positions = embeddings(model, 3, 9), torch.tensor([[8, 3], [7, 2], [5, 0]])
    together = model.encode(embeds, positions)
    for row in range(3):
        for column in range(2):
            end = int(positions[row, column])
            alone = model.encode(embeds[row : row + 1, : end + 1], torch.tensor([[end]]))
            torch.testing.assert_close(together[row, column], alone[0, 0])


@EACH
def test_a_batch_gives_what_its_rows_give_alone(name: str) -> None:
    model = learner(name)
    histories, lengths = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]]), torch.tensor([4, 2, 1])
    together = model(histories, lengths)
    for row in range(3):
        torch.testing.assert_close(model(histories[row : row + 1], lengths[row : row + 1])[0], together[row])


@EACH
def test_histories_as_long_as_max_len_are_read(name: str) -> None:
    model = learner(name)
    assert torch.isfinite(model(torch.ones(1, 10, dtype=torch.int64), torch.tensor([10]))).all()


@EACH
def test_dropout_of_one_seed_repeats_itself(name: str) -> None:
    model = learner(name)
    batch = (torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([4, 2]), torch.tensor([7, 8]))
    flat = FlatParameters(model)
    theta = flat.gather(model.state_dict())

    def results(seed: int) -> list[torch.Tensor]:
        loss = flat.loss(theta, model.item_embeddings, *batch, dropout=DropoutStream(seed))
        return [model(*batch[:2], dropout=DropoutStream(seed)), loss]

    for first, again, other, plain in zip(
        results(1), results(1), results(2), [model(*batch[:2]), None], strict=True
    ):
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert plain is None or not torch.equal(first, plain)


@EACH
def test_reset_keeps_the_embeddings_and_follows_the_seed(name: str) -> None:
    model = learner(name, layers=2)
    kept = ("item_embeddings", "position_embeddings")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    drawn = []
    for seed in (1, 2, 1):
        model.reset_encoder(seed=seed)
        drawn.append({k: v.clone() for k, v in model.state_dict().items()})
    for key, value in before.items():
        assert torch.equal(drawn[0][key], drawn[2][key])
        assert torch.equal(value, drawn[0][key]) == (key in kept), key
        assert key in kept or value.ndim < 2 or not torch.equal(drawn[0][key], drawn[1][key])


@EACH
def test_flat_vector_and_learner_agree(name: str) -> None:
    model, other = learner(name), learner(name)
    other.reset_encoder(seed=3)
    flat = FlatParameters(other)
    vector = flat.gather(model.state_dict())
    embeds, positions = embeddings(model, 2, 5), torch.tensor([[4], [2]])
    torch.testing.assert_close(flat.encode(vector, embeds, positions), model.encode(embeds, positions))
    flat.write(other, vector, model.item_embeddings)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


@EACH
def test_hyperparameters_build_the_same_learner(name: str) -> None:
    model = learner(name, layers=2)
    again = build_learner(name, model.hyperparameters(), seed=0)
    assert again.hyperparameters() == model.hyperparameters()
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


@EACH
def test_outputs_are_twice_differentiable(name: str) -> None:
    model = learner(name, num_items=4, max_len=4, hidden=2, inner=3, layers=2)
    flat = FlatParameters(model)
    theta = flat.gather(model.state_dict()).requires_grad_()
    embeds = embeddings(model, 2, 3).requires_grad_()

    def outputs(theta: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        positions = torch.tensor([[2, 1], [1, 0]])
        return flat.encode(theta, embeds, positions, dropout=DropoutStream(1))

    assert torch.autograd.gradcheck(outputs, (theta, embeds), fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, (theta, embeds), fast_mode=True)


@EACH
def test_sizes_that_do_not_fit_are_refused(name: str) -> None:
    config_class = LEARNERS[name][1]
    rate = next(field for field in config_class.__dataclass_fields__ if field.endswith("dropout"))
    with pytest.raises(ValueError, match=r"inner must be at least 1, got 0"):
        config_class(**{**SIZES, "inner": 0})
    with pytest.raises(ValueError, match=rf"{rate} must lie in \[0, 1\), got 1"):
        config_class(**SIZES, **{rate: 1.0})


# a bidirectional learner has to find out from positions alone which item is the last one
EPOCHS = {"BERT4Rec": 16}
RATES = {"BERT4Rec": {"heads": 1, "hidden_dropout": 0.1, "attention_dropout": 0.1}}
# at the rate of the others its loss does not fall within ten steps from every seed
INNER_RATES = {"BERT4Rec": 0.01}
CONFIG = DistillConfig(
    users=12, positions=7, user_rank=4, position_rank=4, batch_size=128, users_per_step=6, summary_lr=0.1,
    learner_lr=0.03, epochs=20, inner_steps=12, window=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def split() -> Split:
    return leave_one_out(generate_interactions(num_users=120, num_items=60, mean_length=12, seed=2))


@pytest.fixture(scope="module", params=LEARNERS)
def pretrained(request: pytest.FixtureRequest, split: Split) -> Pretrained:
    name = request.param
    sizes = {"num_items": split.interactions.num_items, "max_len": 6, "hidden": 16, "inner": 24}
    learner = build_learner(name, {**sizes, **RATES.get(name, {})}, seed=0)
    fit = FitConfig(batch_size=64, max_epochs=EPOCHS.get(name, 6), learning_rate=0.01, patience=20)
    return pretrain(split, learner, PretrainConfig(fit=fit, pool_first=2, pool_last=4), seed=0)


def test_training_on_real_data_beats_popularity(split: Split, pretrained: Pretrained) -> None:
    assert pretrained.history[-1]["loss"] < 0.9 * pretrained.history[0]["loss"]
    ranker = Ranker(split.test, seed=0)
    popular, trained = popularity_scores(split, ranker), ranker.metrics(pretrained.learner())
    for protocol in ("full", "uni100"):
        assert trained[protocol]["NDCG@10"] > 2 * popular[protocol]["NDCG@10"]


@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
def test_it_can_be_the_distilling_learner(split: Split, pretrained: Pretrained, item_embedding: Any) -> None:
    rate = INNER_RATES.get(pretrained.learner_name, CONFIG.learner_lr)
    config = replace(CONFIG, item_embedding=item_embedding, learner_lr=rate)
    distiller = Distiller(split, pretrained, config, seed=1)
    state = distiller.initial_state()
    losses = []
    for _ in range(10):
        losses.append(distiller.outer_step(state)["loss"])
        state.step = 0  # the same draws again
    assert min(losses) < 0.995 * losses[0]  # falls by 2 % or more, less by what rounding makes of a few steps
    summary = distiller.summary(state.factors.parameters)
    assert summary.item_factors.shape == pretrained.best["item_embeddings"].shape


@EACH
@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
def test_it_trains_on_a_summary(name: str, item_embedding: Any) -> None:
    items = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    summary = TuckerSummary.initialise(
        users=6, positions=9, user_rank=3, position_rank=3, item_factors=items, seed=0
    )
    with torch.no_grad():
        summary.core *= 500  # distributions with something to learn
    model = build_learner(name, SIZES, seed=0)
    with torch.no_grad():
        model.item_embeddings[:, :8] = items
    before = model.item_embeddings.clone()
    losses = summary.fit(
        model, steps=60, learning_rate=0.01, batch_size=3, item_embedding=item_embedding, seed=1
    )
    assert sum(losses[-10:]) < sum(losses[:10])
    assert torch.equal(model.item_embeddings, before) == (item_embedding == "frozen")


def test_unknown_learner_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown learner 'LSTM': expected one of SASRec, GRU4Rec"):
        build_learner("LSTM", {}, seed=0)


class Own(SASRec):
    """A class of a user's own, with a configuration of the package's."""


def test_a_class_of_ones_own_is_registered_before_it_is_pretrained(split: Split, tmp_path: Path) -> None:
    sizes = {**SIZES, "num_items": split.interactions.num_items, "max_len": 6}
    model = Own(SASRecConfig(**sizes), seed=0)
    config = PretrainConfig(fit=FitConfig(max_epochs=1, batch_size=64), pool_first=1)
    with pytest.raises(ValueError, match=r"register_learner\(Own"):
        pretrain(split, model, config, seed=0)
    register_learner(Own, SASRecConfig)
    try:
        register_learner(Own, SASRecConfig)  # once more is no fault
        with pytest.raises(ValueError, match="a learner of the name SASRec already"):
            register_learner(type("SASRec", (Own,), {}), SASRecConfig)
        made = pretrain(split, model, config, seed=0)
        save_pretrained(tmp_path / "own.safetensors", made, {})
        assert type(load_pretrained(tmp_path / "own.safetensors")[0].learner()) is Own
        distill_config = DistillConfig(
            users=3, positions=5, user_rank=2, position_rank=2, batch_size=64, users_per_step=2, summary_lr=0.01,
            learner_lr=0.01, epochs=1, inner_steps=4, window=2,
        )  # fmt: skip
        summary, _ = distill(split, made, distill_config, seed=0)
        assert type(learner_for(summary)) is Own
    finally:
        del LEARNERS["Own"]


def test_a_learner_over_other_items_is_refused_before_training(split: Split) -> None:
    model = build_learner("SASRec", {**SIZES, "num_items": split.interactions.num_items + 3}, seed=0)
    with pytest.raises(ValueError, match=f"build it with num_items={split.interactions.num_items}"):
        pretrain(split, model, PretrainConfig(), seed=0)


@EACH
def test_tangents_without_torch_func_are_those_of_finite_differences(name: str) -> None:
    model = learner(name)
    inputs, positions = embeddings(model, 2, 4), torch.tensor([[1, 3], [0, 2]])
    direction = torch.randn_like(inputs)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs, direction)
        tangent = forward_ad.unpack_dual(model.encode(dual, positions)).tangent
    step = 1e-6
    ahead, behind = (model.encode(inputs + sign * step * direction, positions) for sign in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)


@EACH
def test_a_learner_in_16_bits_is_refused_but_for_its_item_table(name: str) -> None:
    model = build_learner(name, SIZES, seed=0)
    histories, lengths = torch.tensor([[3, 4, 5]]), torch.tensor([3])
    model.item_embeddings.data = model.item_embeddings.bfloat16()
    assert model(histories, lengths).isfinite().all()
    with pytest.raises(ValueError, match="an encoder works in float32 or float64"):
        model.bfloat16()(histories, lengths)
