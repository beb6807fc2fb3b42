"""Summaries distilled by several classes of learners, which take turns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_unroll import check_against_higher, small_distiller

from td3_fast.distill_config import DistillConfig, with_semantics
from td3_fast.distill_state import mean_of
from td3_fast.learner_classes import OtherClass, to_width
from td3_fast.learners import LEARNERS, build_learner
from td3_fast.memory import plan_memory
from td3_fast.validation import VALIDATION_LOSS

ALL_OTHERS: dict[str, Any] = {"item_embedding": "frozen", "start": "fresh"}


def others_than(name: str) -> tuple[str, ...]:
    return tuple(other for other in LEARNERS if other != name)


@pytest.mark.parametrize("number", range(len(LEARNERS)))
@pytest.mark.parametrize("name", LEARNERS)
def test_the_meta_gradient_of_each_turn_equals_that_of_higher(name: str, number: int) -> None:
    distiller = check_against_higher(step=number, name=name, other_learners=others_than(name), **ALL_OTHERS)
    assert [follower.learner for follower in distiller.followers] == [
        each.learner for each in distiller.classes
    ]
    assert distiller.classes[number].name == (name, *others_than(name))[number]


def test_trajectories_of_a_step_are_of_one_class_after_another() -> None:
    options = {"other_learners": ("GRU4Rec", "BERT4Rec"), "trajectories": 2, **ALL_OTHERS}
    native, state = small_distiller(**options)
    turns = []
    for step in range(3):
        state.step = step
        turns.append([native.turn(state, trajectory) for trajectory in range(2)])
    assert turns == [[0, 1], [2, 0], [1, 2]]
    check_against_higher(step=2, **options)


def test_an_outer_step_of_the_pretrained_class_is_what_it_is_alone() -> None:
    alone, state = small_distiller(**ALL_OTHERS)
    together, _ = small_distiller(**ALL_OTHERS, other_learners=("NARM",))
    for a, b in zip(*(d.meta_gradient(state, window=(3, 5))[0] for d in (alone, together)), strict=True):
        assert torch.equal(a, b)


def test_validation_is_the_mean_of_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    distiller, state = small_distiller(
        **ALL_OTHERS, other_learners=others_than("SASRec"), validation_runs=5, criterion="cross_entropy"
    )
    runs: list[tuple[str, float]] = []
    validation, summary = distiller.validation, distiller.summary(state.factors.parameters)
    ranker = validation.ranker
    whole = ranker.cross_entropy

    def noted(learner: torch.nn.Module, **options: Any) -> float:
        runs.append((type(learner).__name__, whole(learner, **options)))
        return runs[-1][1]

    monkeypatch.setattr(ranker, "cross_entropy", noted)
    metrics = validation.metrics(summary, state, epoch=1)
    names, (first, *of_others, second) = zip(*runs, strict=True)
    assert names == ("SASRec", *others_than("SASRec"), "SASRec")
    assert first != second
    assert metrics[VALIDATION_LOSS] == pytest.approx(((first + second) / 2 + sum(of_others)) / 4)
    validation.config = replace(validation.config, validation_runs=1)
    runs.clear()
    validation.metrics(summary, state, epoch=1)
    assert [name for name, _ in runs] == ["SASRec", *others_than("SASRec")]


def test_learners_of_another_class_share_the_items_and_nothing_else() -> None:
    pretrained = build_learner("SASRec", {"num_items": 12, "max_len": 7, "hidden": 8, "heads": 2}, seed=1)
    of = OtherClass("bert4rec", pretrained)
    assert of.name == "BERT4Rec"
    assert of.columns == 9
    one, same, another = (of.fresh(seed=seed, share_items=True) for seed in (1, 1, 2))
    assert one.hyperparameters() | {"num_items": 12, "max_len": 7, "hidden": 8} == one.hyperparameters()
    assert one.item_embeddings.data_ptr() == another.item_embeddings.data_ptr()
    assert torch.equal(one.item_embeddings[:, :8], pretrained.item_embeddings)
    assert not one.item_embeddings[:, 8].any()
    for name, parameter in one.state_dict().items():
        assert torch.equal(parameter, same.state_dict()[name])
    assert not torch.equal(one.position_embeddings, another.position_embeddings)
    assert of.fresh_parameters(seed=1).shape == (of.flat.size,)
    assert not torch.equal(of.fresh_parameters(seed=1), of.fresh_parameters(seed=2))
    # nor does what is drawn depend on how many of the items are here
    fewer = build_learner("SASRec", {"num_items": 5, "max_len": 7, "hidden": 8, "heads": 2}, seed=1)
    part = OtherClass("BERT4Rec", fewer).fresh(seed=1, share_items=True)
    assert torch.equal(part.position_embeddings, one.position_embeddings)
    assert torch.equal(part.mask_embedding, one.mask_embedding)
    apart = of.fresh(seed=1, share_items=False)
    assert apart.item_embeddings.data_ptr() != one.item_embeddings.data_ptr()
    narrower = OtherClass("SASRec", one)
    assert narrower.columns == 8
    assert torch.equal(narrower.learner.item_embeddings, pretrained.item_embeddings)


def test_a_width_is_cut_or_filled() -> None:
    three = torch.arange(3.0)
    assert to_width(three, 3) is three
    assert to_width(three, 2).tolist() == [0, 1]
    assert to_width(three, 4).tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"item_embedding": "trained"}, 'item_embedding="frozen" and start="fresh"'),
        ({"start": "pool"}, 'item_embedding="frozen" and start="fresh"'),
        ({"other_learners": ("gru4rec", "GRU4Rec")}, "names a class twice"),
        ({"other_learners": ("GRU4Rek",)}, "unknown learner"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    distiller, _ = small_distiller(**ALL_OTHERS)
    with pytest.raises(ValueError, match=words):
        replace(distiller.config, **{"other_learners": ("GRU4Rec",), **changes})


def test_neither_the_own_class_nor_a_learner_that_goes_on() -> None:
    with pytest.raises(ValueError, match="has its turns in any case"):
        small_distiller(**ALL_OTHERS, other_learners=("SASRec",))
    semantics = replace(
        with_semantics(small_distiller()[0].config, "paper").semantics, reload_learner="epoch"
    )
    with pytest.raises(ValueError, match="cannot go on as one of another class"):
        small_distiller(**ALL_OTHERS, other_learners=("NARM",), semantics=semantics)


def test_settings_of_one_class_are_as_they_were() -> None:
    config: DistillConfig = small_distiller(**ALL_OTHERS)[0].config
    assert "other_learners" not in config.settings()
    assert replace(config, other_learners=("narm",)).settings()["other_learners"] == ("NARM",)


def test_the_plan_of_memory_is_that_of_the_largest_class() -> None:
    distiller, _ = small_distiller(**ALL_OTHERS)
    totals = {}
    for others in [(), *((name,) for name in others_than("SASRec")), others_than("SASRec")]:
        plan = plan_memory(
            distiller.split,
            replace(distiller.config, other_learners=others),
            learner_name="SASRec",
            learner_config={"num_items": 50_000, "max_len": 9, "hidden": 32},
            pool=1,
        )
        totals[others] = plan.total
    assert totals[others_than("SASRec")] >= max(totals.values())
    assert totals["BERT4Rec",] - totals[()] > 50_000 * 33 * 4  # whose table has one more column, for a bias


def test_means() -> None:
    assert mean_of([{"a": 1.0}, {"a": 3.0}]) == {"a": 2.0}
