"""Runs in a folder that holds another run, or what is left of one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from td3_fast.checkpoint import describe_pretrained
from td3_fast.data import Split, generate_interactions, leave_one_out
from td3_fast.evaluate_run import EvaluateRun
from td3_fast.recipes import Recipe, recipe_named
from td3_fast.report import read_json_lines
from td3_fast.run import Run
from td3_fast.run_folder import RunError, Stopped, Watcher
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
