from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from td3_fast.data import Split, generate_interactions, leave_one_out, load_interactions
from td3_fast.evaluate import (
    CROSS_ROWS,
    ROWS,
    EvaluateConfig,
    chosen_users,
    evaluate,
    has_own_positions,
    learner_for,
    popularity_scores,
)
from td3_fast.learners import LEARNERS, Learner, SASRec, SASRecConfig, build_learner
from td3_fast.summary import Preprocessing, SummaryMetadata, TrainingRecipe, TuckerSummary
from td3_fast.training import FitConfig, Ranker, fresh_like

FIT_OPTIONS = {"steps": 5, "learning_rate": 0.01, "batch_size": 4}


@pytest.fixture(scope="module")
def split() -> Split:
    return leave_one_out(generate_interactions(num_users=40, num_items=130, mean_length=8, seed=4))


@pytest.fixture(scope="module")
def teacher(split: Split) -> SASRec:
    return SASRec(SASRecConfig(num_items=split.interactions.num_items, max_len=6, hidden=8, inner=8), seed=0)


@pytest.fixture(scope="module")
def summary(teacher: SASRec) -> TuckerSummary:
    return TuckerSummary.initialise(
        users=5,
        positions=6,
        user_rank=2,
        position_rank=2,
        item_factors=teacher.item_embeddings.detach(),
        seed=0,
    )


def test_every_row_comes_with_both_protocols_and_recovery(
    split: Split, teacher: SASRec, summary: TuckerSummary
) -> None:
    config = EvaluateConfig(seeds=2, fit=FitConfig(max_epochs=2, batch_size=64))
    runs = []
    rows = evaluate(
        summary, split, teacher, fit_options=FIT_OPTIONS, config=config, on_run=lambda *run: runs.append(run)
    )
    assert [(row.name, row.protocol) for row in rows] == [(n, p) for n in ROWS for p in ("full", "uni100")]
    assert len(runs) == 2 * (len(ROWS) - 1) + 1
    by_name = {(row.name, row.protocol): row for row in rows}
    assert by_name["full", "full"].recovery["HR@10"] in (1.0, None)
    assert by_name["zero-step", "uni100"].recovery["NDCG@20"] in (0.0, None)
    assert by_name["popularity", "full"].metrics["HR@10"]["sd"] == 0.0
    again = evaluate(summary, split, teacher, fit_options=FIT_OPTIONS, config=config)
    assert rows == again


def test_the_teacher_is_left_as_it_was(split: Split, teacher: SASRec, summary: TuckerSummary) -> None:
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    config = EvaluateConfig(seeds=1, rows=("summary", "zero-step"))
    evaluate(summary, split, teacher, fit_options=FIT_OPTIONS, config=config)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("how", ["random", "longest"])
@pytest.mark.parametrize("count", [7, 30, 100])
def test_chosen_users_hold_as_many_interactions_as_asked(split: Split, how: str, count: int) -> None:
    chosen = chosen_users(split.train, how, count, seed=0)
    interactions = len(chosen) + len(np.unique(chosen.users))
    assert count - 1 <= interactions <= count


def test_longest_users_are_the_longest(split: Split) -> None:
    chosen = np.unique(chosen_users(split.train, "longest", 40, seed=0).users)
    lengths = split.interactions.lengths
    others = np.setdiff1d(np.unique(split.train.users), chosen)
    assert lengths[chosen].min() >= lengths[others].max()


def test_popularity_counts_training_interactions_alone(split: Split) -> None:
    log = split.interactions
    counts = np.zeros(log.num_items)
    for user in range(log.num_users):
        items = log.items[log.offsets[user] : log.offsets[user + 1]]
        np.add.at(counts, items[:-2] if len(items) >= 3 else items, 1)
    ranker = Ranker(split.test, seed=0)
    assert popularity_scores(split, ranker) == ranker.score_items(torch.from_numpy(counts).float())


def test_popularity_counts_users_who_are_too_short_for_an_example() -> None:
    lengths = [1, 1, 2, 3, 5]
    users = [f"u{user}" for user, length in enumerate(lengths) for _ in range(length)] + ["other"]
    items = [f"i{place}" for length in lengths for place in range(length)] + ["i5"]
    split = leave_one_out(load_interactions(pd.DataFrame({"user": users, "item": items})))
    ranker = Ranker(split.test, seed=0)
    counts = dict.fromkeys(split.interactions.item_ids.tolist(), 0.0)
    counts |= {"i0": 5.0, "i1": 2.0, "i2": 1.0, "i5": 1.0}  # all but the last two of those who have three
    scores = torch.tensor([counts[item] for item in split.interactions.item_ids.tolist()])
    assert popularity_scores(split, ranker) == ranker.score_items(scores)


def test_summary_of_other_data_is_refused(split: Split, teacher: SASRec) -> None:
    other = TuckerSummary.initialise(
        users=2, positions=6, user_rank=2, position_rank=2, item_factors=torch.randn(7, 8), seed=0
    )
    with pytest.raises(ValueError, match="the summary is over 7 items"):
        evaluate(other, split, teacher, fit_options=FIT_OPTIONS)


def with_metadata(summary: TuckerSummary, learner: Learner, split: Split) -> TuckerSummary:
    log = split.interactions
    summary.metadata = SummaryMetadata(
        item_ids=tuple(log.item_ids.tolist()),
        preprocessing=Preprocessing(data=log.name, filters={}, fingerprint=log.fingerprint),
        training=TrainingRecipe(
            learner=type(learner).__name__,
            learner_config=learner.hyperparameters(),
            learning_rate=0.01,
            steps=5,
            batch_size=4,
            item_embedding="trained",
        ),
    )
    return summary


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("distilled_for", ["SASRec", "BERT4Rec"])
def test_any_learner_trains_on_the_summary_of_another(split: Split, distilled_for: str, name: str) -> None:
    config = {"num_items": split.interactions.num_items, "max_len": 6, "hidden": 8, "inner": 8}
    original = build_learner(distilled_for, config, seed=0)
    with torch.no_grad():
        original.item_embeddings[:, 8:] = 1.0  # the bias, where there is one
    positions = original.position_embeddings
    summary = TuckerSummary.initialise(
        users=5,
        positions=6,
        user_rank=2,
        position_rank=2,
        item_factors=original.item_embeddings.detach(),
        seed=0,
    )
    assert positions is not None
    summary.register_buffer("position_embeddings", positions.detach())
    made = learner_for(with_metadata(summary, original, split), name=name.lower(), seed=1)
    assert type(made).__name__ == name
    assert torch.equal(made.item_embeddings[:, :8], original.item_embeddings[:, :8])
    bias = 1.0 if name == distilled_for else 0.0
    assert (made.item_embeddings[:, 8:] == bias).all()
    rows = evaluate(
        summary,
        split,
        made,
        config=EvaluateConfig(seeds=1, rows=CROSS_ROWS, fit=FitConfig(max_epochs=1, batch_size=128)),
    )
    assert [row.name for row in rows[::2]] == list(CROSS_ROWS)
    assert len({row.metrics["NDCG@20"]["mean"] for row in rows}) > 4


def test_the_learner_of_a_summary_is_made_as_it_was(split: Split, teacher: SASRec) -> None:
    summary = TuckerSummary.initialise(
        users=5,
        positions=6,
        user_rank=2,
        position_rank=2,
        item_factors=teacher.item_embeddings.detach(),
        seed=0,
    )
    summary.register_buffer("position_embeddings", teacher.position_embeddings.detach())
    made = learner_for(with_metadata(summary, teacher, split))
    assert made.hyperparameters() == teacher.hyperparameters()
    assert torch.equal(made.item_embeddings, teacher.item_embeddings)
    assert made.position_embeddings is not None
    assert torch.equal(made.position_embeddings, teacher.position_embeddings)


def test_unknown_row_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown row 'best'"):
        EvaluateConfig(rows=("best",))


@pytest.mark.parametrize(
    ("rows", "message"),
    [((), "no row to make"), (("summary", "summary"), "named twice"), (("all",), "unknown")],
)
def test_rows_that_make_no_table_are_refused(rows: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(rows=rows)


@pytest.mark.parametrize("name", LEARNERS)
def test_learners_of_another_class_have_positions_of_their_own(
    split: Split, teacher: SASRec, name: str
) -> None:
    summary = with_metadata(
        TuckerSummary.initialise(
            users=5, positions=6, user_rank=2, position_rank=2, item_factors=teacher.item_embeddings, seed=0
        ),
        teacher,
        split,
    )
    own = has_own_positions(summary, name)
    assert own == (name != "SASRec")
    made = learner_for(summary, name=name)
    first, second, shared = (
        fresh_like(made, seed=seed, share_items=share, draw_positions=own)
        for seed, share in ((1, False), (2, False), (1, True))
    )
    assert shared.item_embeddings is made.item_embeddings
    assert torch.equal(first.item_embeddings, made.item_embeddings)
    for parameter, again in zip(first.parameters(), shared.parameters(), strict=True):
        assert torch.equal(parameter, again)
    if first.position_embeddings is not None:
        assert torch.equal(first.position_embeddings, second.position_embeddings) != own
