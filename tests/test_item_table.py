"""A frozen item table is kept once, in either dtype, and the pool can do without tables."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from td3_fast.checkpoint import Checkpoint, load_checkpoint, load_pretrained, save_checkpoint, save_pretrained
from td3_fast.data import Split, generate_interactions, leave_one_out
from td3_fast.distill import Distiller, distill, for_item_embedding
from td3_fast.distill_config import DistillConfig
from td3_fast.evaluate import EvaluateConfig, evaluate, learner_for
from td3_fast.learners import LEARNERS, build_learner
from td3_fast.pretrain import PretrainConfig, PretrainState, pretrain
from td3_fast.summary import TuckerSummary
from td3_fast.training import FitConfig, Pretrained, fresh_like

FROZEN = DistillConfig(
    users=6, positions=8, user_rank=3, position_rank=3, batch_size=128, users_per_step=4, summary_lr=0.03,
    learner_lr=0.01, epochs=2, inner_steps=10, window=4, item_embedding="frozen",
)  # fmt: skip
BFLOAT16 = replace(FROZEN, item_dtype="bfloat16")
PRETRAIN = PretrainConfig(
    fit=FitConfig(batch_size=128, max_epochs=3, learning_rate=0.01),
    pool_first=1,
    pool_last=3,
    pool_items=False,
)


@pytest.fixture(scope="module")
def split() -> Split:
    return leave_one_out(generate_interactions(num_users=40, num_items=30, mean_length=9, seed=1))


def pretrained_as(
    split: Split, config: PretrainConfig, name: str = "SASRec", states: list[PretrainState] | None = None
) -> Pretrained:
    sizes = {"num_items": split.interactions.num_items, "max_len": 8, "hidden": 8}
    on_step = None if states is None else lambda state: states.append(copy.deepcopy(state))
    return pretrain(split, build_learner(name, sizes, seed=0), config, seed=0, on_step=on_step)


@pytest.fixture(scope="module")
def lean(split: Split) -> Pretrained:
    return pretrained_as(split, PRETRAIN)


def test_a_frozen_distillation_needs_no_tables_in_the_pool(split: Split, lean: Pretrained) -> None:
    with_tables = pretrained_as(split, replace(PRETRAIN, pool_items=True))
    assert len(lean.pool) == 3
    too_short = pretrained_as(split, replace(PRETRAIN, pool_first=9, pool_last=9))
    assert all("item_embeddings" not in entry for entry in (*lean.pool, *too_short.pool))
    assert len(too_short.pool) == 1
    ours, theirs = (distill(split, p, FROZEN, seed=1)[1] for p in (lean, with_tables))
    assert ours.history == theirs.history


def test_learners_that_start_from_tables_of_the_pool_are_refused_where_it_has_none(
    split: Split, lean: Pretrained
) -> None:
    trained = replace(FROZEN, item_embedding="trained")
    with pytest.raises(ValueError, match="pool_items=True"):
        Distiller(split, lean, trained, seed=0)
    Distiller(split, lean, replace(trained, start="fresh"), seed=0)


def test_a_pool_without_tables_goes_through_files(split: Split, tmp_path: Path) -> None:
    states: list[PretrainState] = []
    made = pretrained_as(split, PRETRAIN, states=states)
    save_checkpoint(tmp_path / "checkpoint", Checkpoint(state=states[-2], settings={}))
    read = load_checkpoint(tmp_path / "checkpoint").state
    assert isinstance(read, PretrainState)
    for ours, theirs in zip(read.pool, states[-2].pool, strict=True):
        assert len(ours) == len(theirs) == 1
        assert torch.equal(ours[0], theirs[0])
    save_pretrained(tmp_path / "pretrained", made, {})
    again, _ = load_pretrained(tmp_path / "pretrained")
    assert [entry.keys() for entry in again.pool] == [entry.keys() for entry in made.pool]


@pytest.mark.parametrize("config", [FROZEN, BFLOAT16], ids=["float32", "bfloat16"])
def test_one_table_serves_keys_values_learner_and_teacher(
    split: Split, lean: Pretrained, config: DistillConfig
) -> None:
    pretrained = for_item_embedding(lean, config)
    table = pretrained.best["item_embeddings"]
    assert str(table.dtype) == f"torch.{config.item_dtype}"
    distiller = Distiller(split, pretrained, config, seed=0)
    state = distiller.initial_state()
    summary = distiller.summary(state.factors.parameters)
    fresh = fresh_like(distiller.teacher, seed=1, share_items=True)
    for other in (
        distiller.items,
        distiller.teacher.item_embeddings,
        summary.item_factors,
        fresh.item_embeddings,
    ):
        assert other.data_ptr() == table.data_ptr()
    before = table.clone()
    distiller.run(state)
    assert torch.equal(table, before)


def test_a_learner_of_its_own_shares_nothing(lean: Pretrained) -> None:
    learner = lean.learner()
    assert learner.item_embeddings.data_ptr() != lean.best["item_embeddings"].data_ptr()
    for name, value in learner.state_dict().items():
        assert torch.equal(value, lean.best[name])


@pytest.mark.parametrize("name", LEARNERS)
def test_the_meta_gradient_with_a_bfloat16_table_is_that_of_the_rounded_table(
    split: Split, name: str
) -> None:
    pretrained = pretrained_as(split, replace(PRETRAIN, fit=replace(PRETRAIN.fit, max_epochs=1)), name)
    rounded = pretrained.for_frozen_items(torch.bfloat16).for_frozen_items(torch.float32)
    gradients = []
    for given, config in ((pretrained, BFLOAT16), (rounded, FROZEN)):
        distiller = Distiller(split, given, config, seed=0)
        state = distiller.initial_state()
        for factor in state.factors.parameters:
            assert factor.dtype == torch.float32
            factor.mul_(20)
        gradients.append(distiller.meta_gradient(state, window=(3, 4))[0])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
def test_a_summary_with_a_bfloat16_table_is_saved_and_used(
    split: Split, lean: Pretrained, item_embedding: str, tmp_path: Path
) -> None:
    made, _ = distill(split, lean, BFLOAT16, seed=1)
    made.save(tmp_path / "summary")
    summary = TuckerSummary.load(tmp_path / "summary")
    assert summary.item_factors.dtype == torch.bfloat16
    assert torch.equal(summary.item_factors, made.item_factors)
    learner = learner_for(summary)
    assert learner.item_embeddings.dtype == torch.float32
    losses = summary.fit(learner, item_embedding=item_embedding)
    assert losses[-1] < losses[0]
    rows = evaluate(summary, split, config=EvaluateConfig(rows=("summary", "zero-step"), seeds=1))
    assert all(0 <= row.metrics["HR@10"]["mean"] <= 1 for row in rows)


def test_a_table_that_is_trained_is_not_kept_in_bfloat16() -> None:
    with pytest.raises(ValueError, match='asks for item_embedding="frozen"'):
        replace(BFLOAT16, item_embedding="trained")
    with pytest.raises(ValueError, match='engine="native"'):
        replace(BFLOAT16, engine="higher")
