from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from td3_fast.data import Split, cut_batch, generate_interactions, leave_one_out
from td3_fast.learners import LEARNERS, FlatParameters, SASRec, SASRecConfig, build_learner
from td3_fast.ops import DropoutStream
from td3_fast.training import FitConfig, FitStep, Ranker, fit_examples, fresh_like, select_rows
from td3_fast.unroll import initial_state


@pytest.fixture(scope="module")
def split() -> Split:
    return leave_one_out(generate_interactions(num_users=60, num_items=150, mean_length=8, seed=2))


def learner(split: Split, seed: int = 0) -> SASRec:
    return SASRec(
        SASRecConfig(num_items=split.interactions.num_items, max_len=6, hidden=8, inner=8), seed=seed
    )


def test_full_ranks_leave_out_padding_and_history(split: Split) -> None:
    model = learner(split)
    ranks = Ranker(split.test, seed=0).ranks(model, "full", batch_size=7)
    log = split.interactions
    for row, (user, end) in enumerate(zip(split.test.users, split.test.ends, strict=True)):
        history = log.items[log.offsets[user] : end].astype(np.int64)
        cut = torch.from_numpy(history[-6:]).unsqueeze(0)
        with torch.no_grad():
            scores = model(cut, torch.tensor([cut.shape[1]])) @ model.item_embeddings.T
        candidates = np.setdiff1d(np.arange(1, log.num_items), history)
        target = int(log.items[end])
        candidates = candidates[candidates != target]
        assert int(ranks[row]) == 1 + int((scores[0, candidates] >= scores[0, target]).sum())


def test_uni100_ranks_lie_among_101_and_repeat(split: Split) -> None:
    model = learner(split)
    first, again, other = (Ranker(split.test, seed=s).ranks(model, "uni100") for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert int(first.min()) >= 1
    assert int(first.max()) <= 101


def test_scores_per_item_rank_like_a_learner_that_ignores_the_history(split: Split) -> None:
    ranker = Ranker(split.test, seed=0, protocols=("full",))
    scores = torch.arange(split.interactions.num_items).float()
    best_last = ranker.score_items(scores)["full"]["HR@10"]
    targets = split.test.targets
    assert best_last == pytest.approx(np.mean(targets >= split.interactions.num_items - 10), abs=0.05)


def test_select_rows_of_a_csr() -> None:
    offsets, items = select_rows(
        (torch.tensor([0, 2, 2, 5]), torch.tensor([7, 8, 1, 2, 3])), torch.tensor([2, 1, 0])
    )
    assert offsets.tolist() == [0, 3, 3, 5]
    assert items.tolist() == [1, 2, 3, 7, 8]


SAMPLED = {
    "full softmax": {},
    "sampled": {"loss": "sampled", "num_sampled": 20},
    "sampled, lazy": {
        "loss": "sampled",
        "num_sampled": 20,
        "optimiser": "lazy-adam",
        "proposal": "log-uniform",
    },
}


@pytest.mark.parametrize("changes", SAMPLED.values(), ids=SAMPLED)
@pytest.mark.parametrize("taken", [1, 5, 7])
def test_interrupted_training_continues_with_the_same_bits(
    split: Split, taken: int, changes: dict[str, Any]
) -> None:
    config = FitConfig(batch_size=64, max_epochs=5, learning_rate=0.01, **changes)
    validation = Ranker(split.validation, seed=0, protocols=("uni100",))
    states = []
    whole = learner(split)
    fit_examples(
        whole,
        split.train,
        validation,
        config,
        seed=0,
        on_step=lambda state: states.append(copy.deepcopy(state)),
    )
    resumed = learner(split)
    state = fit_examples(resumed, split.train, validation, config, seed=0, state=states[taken - 1])
    assert state.history == states[-1].history
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", LEARNERS)
def test_a_step_on_a_loss_that_samples_every_item_is_one_on_the_full_softmax(split: Split, name: str) -> None:
    num_items = split.interactions.num_items
    model = build_learner(name, {"num_items": num_items, "max_len": 6, "hidden": 8}, seed=0).double()
    batch = cut_batch(split.train, np.arange(50), model.max_len)
    start = initial_state((FlatParameters(model).gather(model.state_dict()), model.item_embeddings))
    configs = [
        FitConfig(),
        FitConfig(loss="sampled", num_sampled=num_items),
        FitConfig(loss="sampled", num_sampled=num_items, optimiser="lazy-adam"),
    ]
    full, sampled, lazy = (
        FitStep(model, split.train, config)(start.clone(), batch, dropout=DropoutStream(1), seed=2)
        for config in configs
    )
    for other in (sampled, lazy):
        assert other[1] == pytest.approx(full[1], rel=1e-12)
        for a, b in zip(full[0].first_moments, other[0].first_moments, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_lazy_training_moves_only_rows_that_a_batch_meets(split: Split) -> None:
    model = learner(split)
    config = FitConfig(loss="sampled", num_sampled=5, optimiser="lazy-adam")
    start = initial_state((FlatParameters(model).gather(model.state_dict()), model.item_embeddings))
    batch = cut_batch(split.train, np.arange(4), model.max_len)
    after, _ = FitStep(model, split.train, config)(start.clone(), batch, dropout=DropoutStream(1), seed=2)
    moved = (after.parameters[1] != start.parameters[1]).any(1)
    met = set(batch.histories.unique().tolist()) | set(batch.targets.tolist())
    assert met - {0} <= set(moved.nonzero().flatten().tolist())
    assert int(moved.sum()) <= len(met) + 5


def test_training_on_a_sampled_loss_learns(split: Split) -> None:
    model = learner(split)
    config = FitConfig(
        batch_size=64,
        max_epochs=15,
        learning_rate=0.01,
        loss="sampled",
        num_sampled=30,
        optimiser="lazy-adam",
    )
    ranker = Ranker(split.validation, seed=0, protocols=("uni100",))
    before = ranker.metrics(model)["uni100"]["MRR@10"]
    state = fit_examples(model, split.train, ranker, config, seed=0)
    assert state.best_score > 1.5 * before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "half"}, "FitConfig.loss must be one of 'full', 'sampled', got 'half'"),
        ({"optimiser": "sgd"}, "'adam', 'lazy-adam'"),
        ({"optimiser": "lazy-adam"}, 'needs loss="sampled"'),
        ({"proposal": "uniform"}, "'unigram', 'log-uniform'"),
        ({"selection": "test"}, "'full', 'uni100'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be finite and above 0"),
    ],
)
def test_bad_choices_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FitConfig(**changes)


def test_training_stops_when_validation_does_and_keeps_the_best_epoch(split: Split) -> None:
    model = learner(split)
    ranker = Ranker(split.validation, seed=0, protocols=("uni100",))
    config = FitConfig(batch_size=64, max_epochs=60, learning_rate=0.03, patience=3)
    state = fit_examples(model, split.train, ranker, config, seed=0)
    assert state.epoch == state.best_epoch + 3
    assert ranker.metrics(model)["uni100"]["MRR@10"] == pytest.approx(state.best_score)


@pytest.mark.parametrize("batch_size", [7, 4096])
def test_the_cross_entropy_of_examples(split: Split, batch_size: int) -> None:
    model = learner(split)
    examples = split.validation
    index = np.arange(len(examples))
    histories, lengths, targets = cut_batch(examples, index, model.max_len)
    with torch.no_grad():
        hidden = model.encode(model.item_embeddings[histories], (lengths - 1).unsqueeze(1)).squeeze(1)
        scores = hidden @ model.item_embeddings.T
    expected = torch.nn.functional.cross_entropy(scores, targets)
    actual = Ranker(examples, seed=0, protocols=()).cross_entropy(model, batch_size=batch_size)
    assert actual == pytest.approx(float(expected), rel=1e-5)


def test_fresh_learner_shares_tables_only(split: Split) -> None:
    model = learner(split)
    fresh = fresh_like(model, seed=9)
    assert torch.equal(model.item_embeddings, fresh.item_embeddings)
    assert torch.equal(model.position_embeddings, fresh.position_embeddings)
    assert not torch.equal(model.blocks[0].query.weight, fresh.blocks[0].query.weight)


def test_nothing_to_rank_is_an_error(split: Split) -> None:
    with pytest.raises(ValueError, match="no example to rank"):
        Ranker(split.test.subset(np.array([], dtype=np.int64)), seed=0)


def test_training_that_leaves_the_numbers_is_an_error(split: Split) -> None:
    model = SASRec(SASRecConfig(num_items=split.interactions.num_items, max_len=6, hidden=8, inner=8), seed=0)
    ranker = Ranker(split.validation, seed=0, protocols=("uni100",))
    config = FitConfig(learning_rate=1e30, batch_size=16, max_epochs=3)
    with pytest.raises(FloatingPointError, match="of epoch 1 is not finite: lower the learning rate"):
        fit_examples(model, split.train, ranker, config, seed=0)
