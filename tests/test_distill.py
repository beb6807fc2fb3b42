"""Distillation as a whole: resuming, selecting, switching."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_unroll import small_distiller

from td3_fast.checkpoint import Checkpoint, save_checkpoint
from td3_fast.data import Split, generate_interactions, leave_one_out
from td3_fast.distill import Distiller, distill
from td3_fast.distill_config import SEMANTICS, DistillConfig, Semantics, with_semantics
from td3_fast.distill_state import DistillState
from td3_fast.evaluate import learner_for
from td3_fast.learners import SASRec, SASRecConfig
from td3_fast.pretrain import PretrainConfig, pretrain
from td3_fast.summary import FarziSummary, load_summary
from td3_fast.training import FitConfig, Pretrained
from td3_fast.unroll.inner import _cyclic, _targets

CONFIG = DistillConfig(
    users=6, positions=8, user_rank=3, position_rank=3, batch_size=128, users_per_step=4, summary_lr=0.03,
    learner_lr=0.01, epochs=2, inner_steps=10, window=4, micro_batch=100,
)  # fmt: skip


@pytest.fixture(scope="module")
def split() -> Split:
    return leave_one_out(generate_interactions(num_users=40, num_items=30, mean_length=9, seed=1))


@pytest.fixture(scope="module")
def pretrained(split: Split) -> Pretrained:
    learner = SASRec(
        SASRecConfig(num_items=split.interactions.num_items, max_len=8, hidden=8, inner=8), seed=0
    )
    config = PretrainConfig(
        fit=FitConfig(batch_size=128, max_epochs=4, learning_rate=0.01), pool_first=2, pool_last=3
    )
    return pretrain(split, learner, config, seed=0)


def test_pool_holds_the_epochs_asked_for(pretrained: Pretrained) -> None:
    assert len(pretrained.pool) == 2
    assert [entry["epoch"] for entry in pretrained.history] == [1, 2, 3, 4]
    assert pretrained.history[-1]["loss"] < pretrained.history[0]["loss"]


def test_fresh_starts_have_the_pretrained_tables_and_new_encoders(
    split: Split, pretrained: Pretrained
) -> None:
    distiller = Distiller(split, pretrained, replace(CONFIG, start="fresh"), seed=5)
    state = distiller.initial_state()
    generator = torch.Generator().manual_seed(0)
    starts = []
    for step in (0, 1):
        state.step = step
        theta, items = distiller._start(state, generator)
        assert torch.equal(items, distiller.items)
        starts.append(distiller.flat.scatter(theta))
    pretrained_positions = distiller.teacher.position_embeddings
    for start in starts:
        assert torch.equal(start["position_embeddings"], pretrained_positions)
    weight = "blocks.0.query.weight"
    assert not torch.equal(starts[0][weight], starts[1][weight])
    again, _ = distiller._start(state, generator)
    assert torch.equal(distiller.flat.scatter(again)[weight], starts[1][weight])


def test_a_summary_of_sequences_starts_at_items_of_the_training_part(
    split: Split, pretrained: Pretrained
) -> None:
    full = {"user_rank": CONFIG.users, "position_rank": CONFIG.positions}
    distiller = Distiller(split, pretrained, replace(CONFIG, initial="sequences", **full), seed=5)
    queries = distiller.summary(distiller.initial_state().factors.parameters).queries()
    likeness = torch.cosine_similarity(queries.unsqueeze(2), distiller.items[1:], dim=-1)
    torch.testing.assert_close(likeness.amax(-1), torch.ones(CONFIG.users, CONFIG.positions))


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("stop", [1, 3])
def test_resumed_run_equals_an_unbroken_one(
    split: Split, pretrained: Pretrained, semantics: Any, stop: int
) -> None:
    config = with_semantics(CONFIG, semantics)
    summary, whole = distill(split, pretrained, config, seed=5)
    assert whole.step == 2 * -(-len(split.train) // 128)
    states = []
    distill(split, pretrained, config, seed=5, on_step=lambda state: states.append(copy.deepcopy(state)))
    again, resumed = distill(split, pretrained, config, seed=5, state=states[stop - 1])
    assert whole.history == resumed.history
    for name, value in summary.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    for a, b in zip(whole.factors.parameters, resumed.factors.parameters, strict=True):
        assert torch.equal(a, b)


def test_another_seed_gives_another_summary(split: Split, pretrained: Pretrained) -> None:
    config = replace(CONFIG, epochs=1)
    first, other = (distill(split, pretrained, config, seed=seed)[0] for seed in (1, 2))
    assert not torch.equal(first.core, other.core)


@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
def test_a_farzi_summary_is_learned_whole(
    split: Split, pretrained: Pretrained, item_embedding: Any, tmp_path: Path
) -> None:
    config = replace(CONFIG, summary="farzi", latent_rank=5, item_embedding=item_embedding, epochs=6)
    start = Distiller(split, pretrained, config, seed=0).form
    summary, state = distill(split, pretrained, config, seed=0)
    assert isinstance(summary, FarziSummary)
    assert summary.latents.shape == (6, 8, 5)
    assert state.history[-1]["loss"] < state.history[0]["loss"]
    for before, after in zip(start.factors, summary.factors, strict=True):
        assert not torch.equal(before, after)
    assert torch.equal(summary.item_factors, start.item_factors)
    assert summary.position_embeddings is not None
    summary.save(tmp_path / "summary.safetensors")
    loaded = load_summary(tmp_path / "summary.safetensors")
    assert isinstance(loaded, FarziSummary)
    learner = learner_for(loaded, seed=3)
    assert len(loaded.fit(learner, seed=3)) == config.inner_steps


def test_outer_loss_falls(split: Split, pretrained: Pretrained) -> None:
    _, state = distill(split, pretrained, replace(CONFIG, epochs=12, item_embedding="frozen"), seed=0)
    assert state.history[-1]["loss"] < state.history[0]["loss"]
    best = max(range(12), key=lambda e: state.history[e]["MRR@10"])
    assert state.best_epoch == best + 1
    assert state.best_score == state.history[best]["MRR@10"]


@pytest.mark.parametrize(
    ("start", "best"),
    [(0.0, [1, 1, 1, 1, 1, 1]), (0.5, [1, 1, 1, 4, 5, 5]), (0.8, [1, 1, 1, 1, 5, 5])],
)
def test_the_best_epoch_is_looked_for_among_the_later_ones(
    split: Split, pretrained: Pretrained, start: float, best: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    distiller = Distiller(split, pretrained, replace(CONFIG, epochs=6, selection_start=start), seed=0)
    state = distiller.initial_state()
    found = iter([0.9, 0.2, 0.8, 0.3, 0.5, 0.4])

    def metrics(*given: Any, **options: Any) -> dict[str, float]:
        return {"MRR@10": next(found)}

    monkeypatch.setattr(distiller.validation, "metrics", metrics)
    best_so_far = []
    for epoch in range(1, 7):
        state.losses.append({"loss": 1.0})
        distiller.validation.end_epoch(distiller.form, state, epoch=epoch)
        best_so_far.append(state.best_epoch)
    assert best_so_far == best


def test_cross_entropy_may_choose_the_best_epoch(split: Split, pretrained: Pretrained) -> None:
    config = replace(CONFIG, epochs=6, item_embedding="frozen", criterion="cross_entropy", validation_runs=2)
    _, state = distill(split, pretrained, config, seed=0)
    losses = [entry["validation_cross_entropy"] for entry in state.history]
    assert state.best_epoch == 1 + losses.index(min(losses))
    assert state.best_score == -min(losses)


@pytest.mark.parametrize(
    "switch",
    [
        {"reload_learner": "epoch"},
        {"alignment_dropout": True},
        {"outer_dropout": True},
        {"validation_dropout": True},
        {"redraw_negatives": True},
        {"shuffle": False},
        {"restart_batches": True},
        {"separate_passes": True},
        {"carry_embeddings": True},
    ],
    ids=lambda switch: next(iter(switch)),
)
def test_each_switch_of_semantics_changes_the_run(
    split: Split, pretrained: Pretrained, switch: dict[str, Any]
) -> None:
    _, plain = distill(split, pretrained, CONFIG, seed=0)
    _, switched = distill(split, pretrained, replace(CONFIG, semantics=Semantics(**switch)), seed=0)
    assert plain.history != switched.history


def test_divergence_is_an_error(split: Split, pretrained: Pretrained) -> None:
    distiller = Distiller(split, pretrained, replace(CONFIG, learner_lr=1e30), seed=0)
    with pytest.raises(FloatingPointError, match="lower learner_lr"):
        distiller.outer_step(distiller.initial_state())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 11}, "cannot be longer than the inner loop"),
        ({"positions": 1}, "at least 2 positions"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"item_embedding": "frozen", "semantics": SEMANTICS["authors"]}, "carry_embeddings"),
        ({"selection_start": 1.0}, r"selection_start must lie in \[0, 1\), got 1.0"),
        ({"growth_limit": 1.0}, "growth_limit must be above 1, got 1.0"),
        ({"growth_limit": 3.0, "engine": "higher"}, 'engine="native"'),
        ({"item_embedding": "train"}, "item_embedding must be one of 'frozen', 'trained', got 'train'"),
        ({"window_kind": "last"}, "window_kind must be one of"),
        ({"start": "pools"}, "start must be one of"),
        ({"selection": "test"}, "selection must be one of"),
        ({"semantics": Semantics(reload_learner="never")}, "Semantics.reload_learner must be one of"),
        ({"summary_lr": -0.1}, "summary_lr must be finite and above 0, got -0.1"),
        ({"learner_lr": float("nan")}, "learner_lr must be finite"),
        ({"max_norm": 0.0}, "max_norm must be finite and above 0"),
        ({"learner_weight_decay": -1.0}, "learner_weight_decay must be finite and at least 0"),
        (
            {"semantics": SEMANTICS["authors"], "engine": "higher", "item_embedding": "trained"},
            "reloads the learner",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_outer_steps_are_those_of_pytorchs_adam_with_clipping_and_a_cosine() -> None:
    # gradients are clipped to the size of what the decay adds, so that either shows
    distiller, state = small_distiller(epochs=2, max_norm=0.05, summary_weight_decay=0.01)
    config = distiller.config
    factors = [torch.nn.Parameter(factor.clone()) for factor in state.factors.parameters]
    adam = torch.optim.Adam(factors, lr=config.summary_lr, weight_decay=config.summary_weight_decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, distiller.total_steps)
    assert distiller.total_steps >= 6
    for _ in range(6):
        gradients, _ = distiller.meta_gradient(state)
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.grad = gradient.clone()
        assert torch.nn.utils.clip_grad_norm_(factors, config.max_norm) > config.max_norm
        adam.step()
        cosine.step()
        distiller.outer_step(state)
        for ours, theirs in zip(state.factors.parameters, factors, strict=True):
            # Adam's eps stands beside the moment before its bias is taken out, as in `higher`
            torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=2e-4)


def test_starts_are_drawn_from_the_whole_pool(split: Split, pretrained: Pretrained) -> None:
    distiller = Distiller(split, pretrained, CONFIG, seed=0)
    state, generator = distiller.initial_state(), torch.Generator().manual_seed(0)
    drawn = {tuple(distiller._start(state, generator)[0][:4].tolist()) for _ in range(30)}
    assert len(drawn) == len(pretrained.pool) == 2


def test_the_weight_decay_of_learners_has_an_effect(split: Split, pretrained: Pretrained) -> None:
    gradients = []
    for decay in (0.0, 0.5):
        distiller = Distiller(split, pretrained, replace(CONFIG, learner_weight_decay=decay), seed=0)
        assert distiller.config.fit_options()["weight_decay"] == decay
        gradients.append(distiller.meta_gradient(distiller.initial_state())[0])
    assert all(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(*gradients, strict=True))


@pytest.fixture
def diverging_at_first(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Any]]:
    """Lets so many validations leave a learner without numbers; returns the list that learners are put in."""
    calls: list[Any] = []
    fit = sys.modules["td3_fast.validation"].fit_on_summary

    def of(count: int) -> list[Any]:
        def diverging(learner: Any, *arguments: Any, **options: Any) -> Any:
            calls.append(learner)
            if len(calls) > count:
                return fit(learner, *arguments, **options)
            with torch.no_grad():
                for parameter in learner.parameters():
                    parameter.fill_(torch.nan)
            raise FloatingPointError

        monkeypatch.setattr(sys.modules["td3_fast.validation"], "fit_on_summary", diverging)
        return calls

    return of


@pytest.mark.parametrize("criterion", ["MRR@10", "cross_entropy"])
def test_an_epoch_whose_learner_diverges_is_not_the_best(
    split: Split, pretrained: Pretrained, diverging_at_first: Any, criterion: Any, tmp_path: Path
) -> None:
    calls = diverging_at_first(1)

    def keep(state: DistillState) -> None:
        save_checkpoint(tmp_path / "checkpoint", Checkpoint(state=state, settings={}))

    _, state = distill(split, pretrained, replace(CONFIG, criterion=criterion), seed=0, on_step=keep)
    assert len(calls) == CONFIG.epochs
    assert state.history[0]["diverged"] == 1
    assert "diverged" not in state.history[1]
    assert state.best_epoch == 2


def test_where_every_epochs_learner_diverges_there_is_no_summary(
    split: Split, pretrained: Pretrained, diverging_at_first: Any
) -> None:
    diverging_at_first(CONFIG.epochs)
    with pytest.raises(FloatingPointError, match="lower learner_lr"):
        distill(split, pretrained, CONFIG, seed=0)


def test_a_meta_gradient_leaves_the_state_alone(split: Split, pretrained: Pretrained) -> None:
    distiller = Distiller(split, pretrained, with_semantics(CONFIG, "authors"), seed=0)
    state = distiller.initial_state()
    distiller.outer_step(state)
    first, second = (distiller.meta_gradient(state)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_are_recorded_wherever_they_can_be(split: Split, pretrained: Pretrained) -> None:
    config = replace(CONFIG, epochs=1)
    expected, _ = distill(split, pretrained, config, seed=0)
    with torch.no_grad():
        summary, _ = distill(split, pretrained, config, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(summary.factors, expected.factors, strict=True))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="outside of it"):
        distill(split, pretrained, config, seed=0)


def test_a_pool_is_needed_by_those_that_start_from_it(split: Split, pretrained: Pretrained) -> None:
    empty, config = replace(pretrained, pool=[]), replace(CONFIG, epochs=1, item_embedding="frozen")
    with pytest.raises(ValueError, match="this pool is empty"):
        distill(split, empty, replace(config, start="pool"), seed=0)
    distill(split, empty, replace(config, start="fresh"), seed=0)


def test_defaults_of_pytorch_change_nothing_that_is_drawn(split: Split, pretrained: Pretrained) -> None:
    config = replace(CONFIG, middle_positions=3, epochs=1, start="pool")
    expected = Distiller(split, pretrained, config, seed=0)
    gradients, _ = expected.meta_gradient(expected.initial_state())
    _targets.cache_clear()
    distiller = Distiller(split, pretrained, config, seed=0)
    try:
        torch.set_default_dtype(torch.float64)
        again, _ = distiller.meta_gradient(distiller.initial_state())
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    _targets.cache_clear()
    _cyclic.cache_clear()
    with torch.device("meta"):
        again, _ = distiller.meta_gradient(distiller.initial_state())
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
