"""Learners in a training loop of the caller's own under autocast, and this package's loops, which ignore it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from td3_fast.data import Split
from td3_fast.distill import Distiller, distill
from td3_fast.distill_config import DistillConfig
from td3_fast.evaluate import EvaluateConfig, evaluate, learner_for
from td3_fast.learners import LEARNERS, Learner, build_learner
from td3_fast.ops import item_cross_entropy
from td3_fast.pretrain import PretrainConfig, pretrain
from td3_fast.training import FitConfig, Pretrained, Ranker

SIZES = {"max_len": 6, "hidden": 8, "inner": 12}
EACH = pytest.mark.parametrize("name", LEARNERS)
ITEMS = pytest.mark.parametrize("item_embedding", ["frozen", "trained"])


def under_autocast(run: Callable[[], Any], dtype: torch.dtype = torch.bfloat16) -> Any:
    with torch.autocast("cpu", dtype=dtype):
        return run()


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("gru", "additive_attention"):
        monkeypatch.setattr(sys.modules[f"td3_fast.ops.{op}"], "has_twice_differentiable", lambda like: False)


@pytest.fixture
def empty_compiler() -> Iterator[None]:
    """What is compiled here for one precision and shape leaves nothing to tests that compile the same for others."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@EACH
@pytest.mark.usefixtures("empty_compiler")
@pytest.mark.parametrize("form", ["kernels", "no kernels", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_loss_is_that_of_float32_within_half_precision(
    name: str, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "no kernels":
        without_kernels(monkeypatch)
    learner = build_learner(name, {"num_items": 20, **SIZES}, seed=0)
    encode: Callable[..., torch.Tensor] = learner
    if form == "compiled":
        encode = torch.compile(learner, backend="aot_eager", fullgraph=True)
    histories, lengths = torch.randint(1, 20, (5, 6)), torch.tensor([1, 2, 6, 3, 4])

    def loss_of(encode: Callable[..., torch.Tensor]) -> torch.Tensor:
        hidden = encode(histories, lengths)
        return item_cross_entropy(hidden, learner.item_embeddings, torch.arange(5)).mean()

    losses = [loss_of(learner), under_autocast(lambda: loss_of(encode), dtype)]
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)
    gradients = [torch.autograd.grad(loss, learner.item_embeddings)[0] for loss in losses]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.1, atol=2e-2)


@pytest.fixture(scope="module")
def config() -> DistillConfig:
    return DistillConfig(
        users=4, positions=6, user_rank=2, position_rank=2, batch_size=64, users_per_step=2, epochs=1,
        inner_steps=3, window=2, summary_lr=0.01, learner_lr=0.005, initial="sequences",
    )  # fmt: skip


def pretrained_on(split: Split, name: str) -> tuple[Learner, Pretrained]:
    learner = build_learner(name, {"num_items": split.interactions.num_items, **SIZES}, seed=0)
    fit = FitConfig(batch_size=64, max_epochs=1)
    return learner, pretrain(split, learner, PretrainConfig(fit=fit, pool_first=1, pool_last=1), seed=0)


@EACH
@ITEMS
def test_training_distilling_and_ranking_have_the_same_bits(
    name: str, item_embedding: Any, config: DistillConfig, split: Split
) -> None:
    def path() -> tuple[list[torch.Tensor], list[Any]]:
        learner, pretrained = pretrained_on(split, name)
        trained = learner.item_embeddings.clone()
        made = DistillConfig(**{**config.__dict__, "item_embedding": item_embedding})
        summary, _ = distill(split, pretrained, made, seed=0)
        start = learner_for(summary, seed=1)
        summary.fit(learner, steps=3, seed=0, item_embedding=item_embedding)
        ranker = Ranker(split.validation, seed=0)
        figures = [ranker.metrics(learner), ranker.cross_entropy(learner)]
        tables = [trained, start.item_embeddings, learner.item_embeddings, *summary.factors]
        return [*tables, summary.probabilities(), summary.hard_sequences(draws=2)], figures

    (tensors, figures), (others, same) = path(), under_autocast(path)
    for a, b in zip(tensors, others, strict=True):
        assert torch.equal(a, b)
    assert figures == same


def test_an_outer_step_and_a_table_of_figures_have_the_same_bits(config: DistillConfig, split: Split) -> None:
    _, pretrained = pretrained_on(split, "SASRec")

    def path() -> tuple[list[torch.Tensor], Any]:
        distiller = Distiller(split, pretrained, config, seed=0)
        state = distiller.initial_state()
        distiller.outer_step(state)
        state = distiller.run(state)
        rows = evaluate(
            distiller.best(state),
            split,
            config=EvaluateConfig(seeds=1, rows=("summary", "zero-step"), fit=FitConfig(max_epochs=1)),
        )
        return list(state.factors.parameters), rows

    (tensors, rows), (others, same) = path(), under_autocast(path)
    assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))
    assert rows == same
