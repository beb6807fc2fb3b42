"""Runs in a folder that holds another run, or what is left of one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from td3_fast.checkpoint import describe_pretrained
from td3_fast.data import Split, generate_interactions, leave_one_out
from td3_fast.distill_config import Semantics
from td3_fast.evaluate_run import EvaluateRun
from td3_fast.recipes import Recipe, recipe_named
from td3_fast.report import read_json_lines
from td3_fast.run import Run
from td3_fast.run_folder import EPOCHS, PRETRAINED, RunError, Stopped, Watcher
from td3_fast.summary import load_summary

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def split() -> Split:
    return leave_one_out(generate_interactions(num_users=30, num_items=25, mean_length=8, seed=3))


def tiny(*, max_epochs: int = 2) -> Recipe:
    recipe = recipe_named("synthetic").sized("6x6")
    config = replace(
        recipe.distill, user_rank=3, position_rank=3, epochs=2, inner_steps=6, window=3, batch_size=60
    )
    return replace(recipe, distill=config).fitted(max_epochs=max_epochs)


def run_in(folder: Path, split: Split, recipe: Recipe | None = None, **changes: Any) -> Run:
    options: dict[str, Any] = {"seed": 0, "source": "toy", "evaluation_seeds": 2, **changes}
    return Run(folder=folder, split=split, recipe=tiny() if recipe is None else recipe, **options)


def stopping_after(calls: int) -> Watcher:
    """Asks to stop when it has been asked so many times."""
    left = iter(range(calls))
    return Watcher(stop=lambda: next(left, None) is None)


@pytest.fixture
def finished(tmp_path: Path, split: Split) -> Path:
    folder = tmp_path / "finished"
    run_in(folder, split).distill()
    return folder


def test_an_overwriting_run_that_is_stopped_goes_on(finished: Path, split: Split, tmp_path: Path) -> None:
    other = tiny(max_epochs=3)
    with pytest.raises(Stopped):
        run_in(finished, split, other, watcher=stopping_after(2)).distill(overwrite=True)
    assert (finished / "checkpoint.safetensors").exists()
    rows = run_in(finished, split, other).distill(resume=True)
    assert rows == run_in(tmp_path / "unbroken", split, other).distill()


def test_results_that_are_gone_are_scored_again_and_nothing_is_distilled(
    finished: Path, split: Split
) -> None:
    before = json.loads((finished / "results.json").read_text())["rows"]
    log = (finished / "log.jsonl").read_bytes()
    (finished / "results.json").unlink()
    stages: list[str] = []
    watcher = Watcher(progress=lambda stage, *rest: stages.append(stage))
    run_in(finished, split, watcher=watcher).distill(resume=True)
    assert json.loads((finished / "results.json").read_text())["rows"] == before
    assert (finished / "log.jsonl").read_bytes() == log
    assert "distill" not in stages


def test_the_log_of_a_distillation_outlives_baselines_in_its_folder(finished: Path, split: Split) -> None:
    log = read_json_lines(finished / "log.jsonl")
    with pytest.raises(RunError, match="results of something else"):
        run_in(finished, split).baselines(rows=("zero-step",), seeds=1)
    assert read_json_lines(finished / "log.jsonl") == log


def test_baselines_are_of_the_learner_that_is_named(finished: Path, split: Split, tmp_path: Path) -> None:
    other = tiny().with_learner("GRU4Rec")
    learner = tmp_path / "other" / "pretrained.safetensors"
    run_in(learner.parent, split, other).pretrained()
    named = tmp_path / "named"
    run_in(named, split, pretrained_from=learner).baselines(rows=("popularity", "random"), seeds=1)
    assert describe_pretrained(named / "pretrained.safetensors").learner_name == "GRU4Rec"
    own = (finished / "pretrained.safetensors").read_bytes()
    with pytest.raises(ValueError, match="other settings"):
        run_in(finished, split, pretrained_from=learner).pretrained()
    assert (finished / "pretrained.safetensors").read_bytes() == own


def test_baselines_with_a_learner_of_other_data_are_refused(finished: Path, tmp_path: Path) -> None:
    alike = leave_one_out(generate_interactions(num_users=30, num_items=25, mean_length=8, seed=4))
    run = run_in(tmp_path / "b", alike, pretrained_from=finished / "pretrained.safetensors")
    with pytest.raises(RunError, match="pretrained on other data"):
        run.baselines(rows=("random",), seeds=1)


def test_an_overwriting_evaluation_that_is_stopped_goes_on(
    finished: Path, split: Split, tmp_path: Path
) -> None:
    folder = tmp_path / "evaluation"
    run_in(folder, split).baselines(rows=("popularity",), seeds=1)

    def evaluation(**options: Any) -> EvaluateRun:
        summary = load_summary(finished / "summary.safetensors")
        given = {"source": "toy", "rows": ("summary", "zero-step"), **options}
        return EvaluateRun(folder=folder, summary=summary, split=split, **given)

    with pytest.raises(Stopped):
        evaluation(watcher=stopping_after(3)).evaluate(overwrite=True)
    assert {row.name for row in evaluation().evaluate()} == {"summary", "zero-step"}


def compared_otherwise(recipe: Recipe) -> Recipe:
    semantics = Semantics(validation_dropout=True, carry_embeddings=True, redraw_negatives=True)
    return replace(recipe, distill=replace(recipe.distill, semantics=semantics))


@pytest.fixture
def kept(tmp_path: Path, split: Split) -> Path:
    """A finished run of three epochs with an item table that is trained, its epochs kept."""
    folder = tmp_path / "kept"
    run_in(folder, split, three_epochs(), keep_epochs=True).distill()
    return folder


def three_epochs() -> Recipe:
    recipe = tiny()
    return replace(recipe, distill=replace(recipe.distill, epochs=3, item_embedding="trained"))


def test_epochs_that_are_compared_anew_are_those_of_a_distillation_of_its_own(
    kept: Path, split: Split, tmp_path: Path
) -> None:
    recipe = compared_otherwise(three_epochs())
    own, anew = tmp_path / "own", tmp_path / "anew"
    rows = run_in(own, split, recipe).distill()
    assert run_in(anew, split, recipe, same_epochs_as=kept).distill() == rows
    summaries = [load_summary(folder / "summary.safetensors") for folder in (own, anew)]
    assert summaries[0].metadata == summaries[1].metadata
    for a, b in zip(*(summary.factors for summary in summaries), strict=True):
        assert torch.equal(a, b)
    histories = [
        json.loads((folder / "results.json").read_text())["distillation"]["history"] for folder in (own, anew)
    ]
    for ours, theirs in zip(*histories, strict=True):
        assert ours == pytest.approx(theirs)
    # and are not those of the run that kept them
    assert histories[0] != json.loads((kept / "results.json").read_text())["distillation"]["history"]


def test_a_choice_that_was_stopped_goes_on(kept: Path, split: Split, tmp_path: Path) -> None:
    recipe, folder = compared_otherwise(three_epochs()), tmp_path / "anew"
    options: dict[str, Any] = {"recipe": recipe, "same_epochs_as": kept, "pretrained_from": kept / PRETRAINED}
    with pytest.raises(Stopped):
        run_in(folder, split, **options, watcher=stopping_after(1)).distill()
    rows = run_in(folder, split, **options).distill(resume=True)
    assert rows == run_in(tmp_path / "unbroken", split, **options).distill()


def test_epochs_of_another_distillation_are_refused(kept: Path, split: Split, tmp_path: Path) -> None:
    recipe = three_epochs()
    other = replace(recipe, distill=replace(recipe.distill, semantics=Semantics(shuffle=False)))
    with pytest.raises(RunError, match=r"more than how epochs are compared: distill\.semantics\.shuffle"):
        run_in(tmp_path / "other", split, other, same_epochs_as=kept).distill()


def test_where_no_epochs_are_kept_they_are_distilled(split: Split, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    run_in(plain, split, three_epochs()).distill()
    said: list[str] = []
    recipe = compared_otherwise(three_epochs())
    run = run_in(tmp_path / "own", split, recipe, same_epochs_as=plain, watcher=Watcher(say=said.append))
    assert run.distill()
    assert any("no epochs are kept" in text for text in said)


def test_epochs_are_kept_across_a_stop(kept: Path, split: Split, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    with pytest.raises(Stopped):
        run_in(folder, split, three_epochs(), keep_epochs=True, watcher=stopping_after(12)).distill()
    run_in(folder, split, three_epochs(), keep_epochs=True).distill(resume=True)
    assert (folder / EPOCHS).read_bytes() == (kept / EPOCHS).read_bytes()
