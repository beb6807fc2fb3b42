"""The choice of how a class of learners trains on a summary."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from td3_fast.cli import app
from td3_fast.data import Split, generate_interactions, leave_one_out, write_interactions
from td3_fast.evaluate import EvaluateConfig, Scores, evaluate, learner_for
from td3_fast.evaluate_run import EvaluateRun
from td3_fast.ops import derive_seed
from td3_fast.report import read_json_lines
from td3_fast.run_folder import Stopped, Watcher
from td3_fast.summary import TuckerSummary
from td3_fast.training import FitConfig, Ranker, fresh_like
from td3_fast.tune import TuneConfig, tune

FEW = TuneConfig(
    rates=(1.0, 3.0), lengths=(1.0, 2.0), dropouts=(True,), middle_positions=(1,), finalists=2, seeds=2
)
Trials = dict[tuple[int, int], Scores]


def test_every_combination_once_and_all_else_as_the_summary_has_it(summary: TuckerSummary) -> None:
    assert summary.metadata is not None
    own = summary.metadata.training.fit_options()
    settings = TuneConfig().settings(own)
    assert len(settings) == 3 * 2 * 2 * 2
    assert own in settings
    assert {entry["learning_rate"] for entry in settings} == {0.01, 0.02, 0.04}
    assert {entry["steps"] for entry in settings} == {4, 8}
    fixed = own.keys() - {"learning_rate", "steps", "dropout", "middle_positions"}
    assert all(entry[name] == own[name] for entry in settings for name in fixed)
    # without augmentation there is no middle position, and what is the same is tried once
    assert len(TuneConfig().settings({**own, "augmentation": False})) == 3 * 2 * 2
    assert len(replace(FEW, rates=(1.0, 1.0)).settings(own)) == 2


def test_finalists_are_compared_by_the_mean_of_their_learners(summary: TuckerSummary, split: Split) -> None:
    assert summary.metadata is not None
    own = summary.metadata.training.fit_options()
    settings, trials = FEW.settings(own), Trials()
    found = tune(summary, split, learner="GRU4Rec", config=FEW, on_trial=trials.__setitem__)
    # one learner of each, then one more of two, and of the summary's own options where they are not among these
    assert [key for key in trials if key[1] == 0] == [(i, 0) for i in range(4)]
    best = sorted(range(4), key=lambda i: -trials[i, 0]["uni100"]["NDCG@10"])[:2]
    finalists = set(best) | {settings.index(own)}
    assert {i for i, run in trials if run == 1} == finalists
    means = {i: sum(trials[i, run]["uni100"]["NDCG@10"] for run in (0, 1)) / 2 for i in finalists}
    assert [settings.index(entry.options) for entry in found] == sorted(means, key=lambda i: -means[i])
    assert found[0].metrics["NDCG@10"]["mean"] == pytest.approx(max(means.values()))
    assert {entry.learners for entry in found} == {2}
    # what is known is not made again
    again = tune(summary, split, learner="GRU4Rec", config=FEW, known=trials, on_trial=never)
    assert again == found


def never(*arguments: object) -> None:
    raise AssertionError("a learner was trained")


def test_a_trial_is_a_training_by_its_options_scored_on_validation(
    summary: TuckerSummary, split: Split
) -> None:
    assert summary.metadata is not None
    trials = Trials()
    tune(summary, split, learner="NARM", config=FEW, seed=3, on_trial=trials.__setitem__)
    options = FEW.settings(summary.metadata.training.fit_options())[2]
    seed = derive_seed(3, "tune", 0)
    learner = fresh_like(learner_for(summary, name="NARM"), seed=seed)
    summary.fit(learner, seed=seed, **options)
    ranker = Ranker(split.validation, seed=derive_seed(3, "ranker"), protocols=("uni100",))
    assert trials[2, 0] == ranker.metrics(learner)


def test_a_frozen_table_is_not_touched(summary: TuckerSummary, split: Split) -> None:
    metadata = summary.metadata
    assert metadata is not None
    before = summary.item_factors.clone()
    summary.metadata = replace(metadata, training=replace(metadata.training, item_embedding="frozen"))
    try:
        tune(summary, split, config=FEW)
    finally:
        summary.metadata = metadata
    assert torch.equal(summary.item_factors, before)


def test_options_that_diverge_come_last(summary: TuckerSummary, split: Split) -> None:
    found = tune(summary, split, config=replace(FEW, rates=(1.0, 1e30), lengths=(5.0,), finalists=2))
    assert found[0].options["learning_rate"] == 0.01
    assert found[1].metrics["NDCG@10"]["mean"] < found[0].metrics["NDCG@10"]["mean"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": ()}, "rates is empty"),
        ({"rates": (1.0, -1.0)}, "must be above 0"),
        ({"metric": "NDCG@7"}, "metric must be one of"),
        ({"finalists": 0}, "at least 1 finalist"),
    ],
)
def test_nothing_to_try_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TuneConfig(**changes)


def test_other_data_and_a_summary_without_metadata_are_refused(summary: TuckerSummary, split: Split) -> None:
    other = leave_one_out(generate_interactions(num_users=40, num_items=131, mean_length=8, seed=5))
    with pytest.raises(ValueError, match="items"):
        tune(summary, other)
    metadata, summary.metadata = summary.metadata, None
    try:
        with pytest.raises(ValueError, match="metadata"):
            tune(summary, split)
    finally:
        summary.metadata = metadata


def evaluation(folder: Path, summary: TuckerSummary, split: Split, **options: Any) -> EvaluateRun:
    given: dict[str, Any] = {"rows": ("summary", "zero-step"), "seeds": 2, "learner": "GRU4Rec", "tune": FEW}
    return EvaluateRun(folder=folder, summary=summary, split=split, source="toy", **{**given, **options})


@pytest.mark.usefixtures("undrawn")
def test_an_evaluation_trains_on_the_summary_as_tuned(
    summary: TuckerSummary, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = evaluation(tmp_path, summary, split)
    rows = run.evaluate()
    options = run.tried()[0].options
    teacher, config = learner_for(summary, name="GRU4Rec"), EvaluateConfig(rows=run.rows, seeds=2)
    assert rows == evaluate(summary, split, teacher, fit_options=options, config=config)
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert settings["fit_options"] == options
    assert settings["tune"]["tried"][0]["options"] == options
    # neither trials nor runs are made twice, and rows that have nothing to do with it are those of before
    monkeypatch.setattr(sys.modules["td3_fast.unroll"], "fit_on_summary", never)
    monkeypatch.setattr(sys.modules["td3_fast.evaluate"], "fit_on_summary", never)
    assert evaluation(tmp_path, summary, split).evaluate() == rows
    monkeypatch.undo()
    plain = evaluation(tmp_path, summary, split, tune=None).evaluate()
    assert plain == evaluate(summary, split, teacher, config=config)
    assert sum(entry["row"] == "zero-step" for entry in read_json_lines(tmp_path / "evaluation.jsonl")) == 2


@pytest.mark.usefixtures("undrawn")
def test_a_stopped_choice_goes_on(summary: TuckerSummary, split: Split, tmp_path: Path) -> None:
    unbroken = evaluation(tmp_path / "unbroken", summary, split).tried()
    calls = iter(range(10))
    stopping = Watcher(stop=lambda: next(calls, 10) >= 9)
    with pytest.raises(Stopped):
        evaluation(tmp_path / "broken", summary, split, watcher=stopping).tried()
    kept = read_json_lines(tmp_path / "broken" / "tuning.jsonl")
    assert 0 < len(kept) < 6
    assert evaluation(tmp_path / "broken", summary, split).tried() == unbroken
    assert read_json_lines(tmp_path / "broken" / "tuning.jsonl")[: len(kept)] == kept


@pytest.mark.usefixtures("undrawn")
def test_commands(
    summary: TuckerSummary, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["td3_fast.tune"], "TuneConfig", lambda: FEW)
    data, file, out = (
        tmp_path / "toy.inter",
        tmp_path / "summary.safetensors",
        tmp_path / "learner.safetensors",
    )
    write_interactions(split.interactions, data)
    summary.save(file)

    def run(*words: str | Path) -> Any:
        return CliRunner().invoke(app, [str(word) for word in words])

    evaluated = run(
        "evaluate", file, data, "--learner", "NARM", "--tune", "--seeds", "1", "--rows", "summary"
    )
    assert evaluated.exit_code == 0, evaluated.output
    assert "tuned: learner rate" in evaluated.stdout
    assert "the summary's own" in evaluated.stdout
    refused = run("evaluate", file, data, "--tune", "--rows", "zero-step", "--out", tmp_path / "other")
    assert refused.exit_code == 2
    assert "only the row summary is tuned" in refused.stderr
    fitted = run("fit", file, "--learner", "NARM", "--tune", data, "--out", out)
    assert fitted.exit_code == 0, fitted.output
    assert "tuned: learner rate" in fitted.stdout
    assert out.exists()
    refused = run("fit", file, "--tune", data, "--steps", "5")
    assert refused.exit_code == 2
    assert "--steps" in refused.stderr
    for table in ("5", "faults", "all"):
        refused = run("reproduce", table, data, "--dataset", "ml-100k", "--tune")
        assert refused.exit_code == 2
        assert "--tune is of tables 2, 3, 4 and 6" in refused.stderr


def test_full_data_is_not_trained_for_a_choice(
    summary: TuckerSummary, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["td3_fast.evaluate"], "fit_examples", never)
    assert evaluation(tmp_path, summary, split, fit=FitConfig(max_epochs=1)).tried()
