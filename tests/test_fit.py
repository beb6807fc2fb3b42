"""Training on a summary: what it refuses, and what it says of a loss that is no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from td3_fast.learners import SASRec, SASRecConfig
from td3_fast.summary import TuckerSummary


@pytest.mark.parametrize(
    ("still", "options", "message"),
    [
        (None, {"item_embedding": "learned"}, "item_embedding must be one of"),
        (None, {"steps": -1}, "at least 0 steps"),
        (None, {"learning_rate": float("nan")}, "learning_rate must be finite"),
        ("item_embeddings", {"item_embedding": "trained"}, 'give item_embedding="frozen"'),
        ("position_embeddings", {}, "position_embeddings has requires_grad=False"),
    ],
)
def test_what_would_not_train_as_asked_is_refused(
    still: str | None, options: dict[str, Any], message: str
) -> None:
    learner = SASRec(SASRecConfig(num_items=7, max_len=4, hidden=3, inner=4), seed=0)
    summary = TuckerSummary.initialise(
        users=2, positions=4, user_rank=2, position_rank=2, item_factors=learner.item_embeddings.detach(), seed=0
    )  # fmt: skip
    if still is not None:
        dict(learner.named_parameters())[still].requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        summary.fit(learner, **{"steps": 1, "learning_rate": 0.1, "batch_size": 2, **options})
    if still == "item_embeddings":
        before = learner.item_embeddings.detach().clone()
        summary.fit(learner, steps=1, learning_rate=0.1, batch_size=2, item_embedding="frozen")
        assert torch.equal(learner.item_embeddings, before)


def test_training_that_leaves_the_numbers_is_an_error() -> None:
    learner = SASRec(SASRecConfig(num_items=7, max_len=4, hidden=3, inner=4), seed=0)
    summary = TuckerSummary.initialise(
        users=2, positions=4, user_rank=2, position_rank=2, item_factors=learner.item_embeddings.detach(), seed=0
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        summary.fit(learner, steps=20, learning_rate=1e30, batch_size=2, item_embedding="trained")


def test_the_summary_keeps_its_item_table() -> None:
    learner = SASRec(SASRecConfig(num_items=7, max_len=4, hidden=3, inner=4), seed=0)
    summary = TuckerSummary.initialise(
        users=2, positions=4, user_rank=2, position_rank=2, item_factors=learner.item_embeddings, seed=0
    )  # fmt: skip
    assert not summary.item_factors.requires_grad
    before = summary.item_factors.clone()
    summary.fit(learner, steps=3, learning_rate=0.1, batch_size=2, item_embedding="trained")
    assert torch.equal(summary.item_factors, before)
    assert not torch.equal(learner.item_embeddings, before)


@pytest.mark.parametrize("item_embedding", ["trained", "frozen"])
def test_a_learner_of_another_dtype_is_trained_in_its_own(item_embedding: Any) -> None:
    learner = SASRec(SASRecConfig(num_items=7, max_len=4, hidden=3, inner=4), seed=0)
    summary = TuckerSummary.initialise(
        users=2, positions=4, user_rank=2, position_rank=2, item_factors=learner.item_embeddings.detach(), seed=0
    )  # fmt: skip
    options = {"steps": 3, "learning_rate": 0.01, "batch_size": 2, "item_embedding": item_embedding}
    wide = SASRec(learner.config, seed=0).double()
    losses, expected = summary.fit(wide, **options), summary.fit(learner, **options)
    assert wide.position_embeddings.dtype == torch.float64
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected))


def test_an_encoder_in_16_bits_is_refused() -> None:
    learner = SASRec(SASRecConfig(num_items=7, max_len=4, hidden=3, inner=4), seed=0)
    summary = TuckerSummary.initialise(
        users=2, positions=4, user_rank=2, position_rank=2, item_factors=learner.item_embeddings.detach(), seed=0
    )  # fmt: skip
    learner.bfloat16()
    with pytest.raises(ValueError, match="an encoder works in float32 or float64"):
        summary.fit(learner, steps=1, learning_rate=0.1, batch_size=2)
