"""Learners in a training loop of the caller's own under autocast, and this package's loops, which ignore it."""

from __future__ import annotations

import pytest
import torch

from td3_fast.data import Split
from td3_fast.distill import distill
from td3_fast.distill_config import DistillConfig
from td3_fast.learners import LEARNERS, build_learner
from td3_fast.ops import item_cross_entropy
from td3_fast.pretrain import PretrainConfig, pretrain
from td3_fast.summary import TuckerSummary
from td3_fast.training import FitConfig, Ranker

SIZES = {"max_len": 6, "hidden": 8, "inner": 12}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_loss_under_autocast_is_that_of_float32_within_half_precision(name: str) -> None:
    learner = build_learner(name, {"num_items": 20, **SIZES}, seed=0)
    histories, lengths = torch.randint(1, 20, (5, 6)), torch.tensor([1, 2, 6, 3, 4])
    losses, gradients = [], []
    for under_autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=under_autocast):
            hidden = learner(histories, lengths)
            loss = item_cross_entropy(hidden, learner.item_embeddings, torch.arange(5)).mean()
        assert loss.dtype == torch.float32
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, learner.item_embeddings)[0])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.1, atol=2e-2)


@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
def test_loops_of_this_package_have_the_same_bits(item_embedding: str, split: Split) -> None:
    made = []
    for under_autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=under_autocast):
            learner = build_learner("NARM", {"num_items": split.interactions.num_items, **SIZES}, seed=0)
            fit = FitConfig(batch_size=64, max_epochs=1)
            pretrained = pretrain(split, learner, PretrainConfig(fit=fit, pool_first=1, pool_last=1), seed=0)
            config = DistillConfig(
                users=4, positions=6, user_rank=2, position_rank=2, batch_size=64, users_per_step=2, epochs=1,
                inner_steps=3, window=2, summary_lr=0.01, learner_lr=0.005, item_embedding=item_embedding,
            )  # fmt: skip
            summary, _ = distill(split, pretrained, config, seed=0)
            summary.fit(learner, steps=3, seed=0, item_embedding=item_embedding)
            ranker = Ranker(split.validation, seed=0)
            assert isinstance(summary, TuckerSummary)
            made.append((summary.core.clone(), learner.item_embeddings.clone(), ranker.metrics(learner)))
            assert ranker.cross_entropy(learner) > 0
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])
    assert made[0][2] == made[1][2]
