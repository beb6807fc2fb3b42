"""The commands on tiny data: what they leave, what they refuse, and how they go on after an interruption."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import td3_fast
from td3_fast.cli import app
from td3_fast.data import generate_interactions, write_interactions
from td3_fast.recipes import IMPROVEMENTS, RECIPES
from td3_fast.report import read_json_lines
from td3_fast.summary import TuckerSummary

TINY = [
    "--recipe", "synthetic", "--size", "6x6", "--rank", "3", "--epochs", "2", "--inner-steps", "6", "--window", "3",
    "--batch-size", "60", "--max-epochs", "3",
]  # fmt: skip
LEFT = {
    "summary.safetensors",
    "pretrained.safetensors",
    "results.json",
    "log.jsonl",
    "report.png",
    "evaluation.jsonl",
}


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def refusal(*words: str | Path) -> str:
    """The one line of an error."""
    result = run(*words)
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    return str(result.stderr).strip()


def without_times(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in entries]


def assert_same_run(folder: Path, other: Path) -> None:
    for name in ("summary.safetensors", "pretrained.safetensors"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    for name in ("log.jsonl", "evaluation.jsonl"):
        assert without_times(read_json_lines(folder / name)) == without_times(read_json_lines(other / name))
    ours, theirs = (json.loads((place / "results.json").read_text()) for place in (folder, other))
    assert ours["rows"] == theirs["rows"]
    assert ours["distillation"]["history"] == theirs["distillation"]["history"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tiny.inter"
    write_interactions(generate_interactions(num_users=30, num_items=25, mean_length=8, seed=3), path)
    return path


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("run")
    result = run("distill", data, *TINY, "--out", folder)
    assert result.exit_code == 0, result.output
    assert "td3-fast evaluate" in result.stdout
    assert "6 users by 6 positions" in result.stdout
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("td3_fast.run_folder.draw_report", lambda *args, **options: None)


def test_pretraining_on_a_sampled_loss(data: Path, tmp_path: Path) -> None:
    sampled = [
        "--loss",
        "sampled",
        "--num-sampled",
        "12",
        "--proposal",
        "log-uniform",
        "--optimiser",
        "lazy-adam",
    ]
    result = run("distill", data, *TINY, *sampled, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    metadata = TuckerSummary.load(tmp_path / "summary.safetensors").metadata
    assert metadata is not None
    fit = metadata.settings["pretrained"]["pretrain"]["fit"]
    assert (fit["loss"], fit["num_sampled"], fit["proposal"]) == ("sampled", 12, "log-uniform")
    assert fit["optimiser"] == "lazy-adam"
    alone = refusal("distill", data, *TINY, "--num-sampled", "12", "--out", tmp_path / "other")
    assert "add --loss sampled" in alone
    refused = refusal("distill", data, *TINY, "--optimiser", "lazy-adam", "--out", tmp_path / "other")
    assert 'needs loss="sampled"' in refused


def test_distill_leaves_its_files(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} >= LEFT
    assert not [path.name for path in finished.iterdir() if path.name.endswith(".tmp")]
    assert not (finished / "checkpoint.safetensors").exists()
    log = read_json_lines(finished / "log.jsonl")
    steps = [entry["step"] for entry in log if entry["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    assert [entry["epoch"] for entry in log if entry["event"] == "pretrain"] == [1, 2, 3]
    assert [entry["epoch"] for entry in log if entry["event"] == "epoch"] == [1, 2]


def test_several_learners_per_outer_step(finished: Path, data: Path, tmp_path: Path, undrawn: None) -> None:
    given = ("--pretrained", finished / "pretrained.safetensors")
    result = run("distill", data, *TINY, *given, "--trajectories", "2", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "by each of 2 learners" in result.stdout
    metadata = TuckerSummary.load(tmp_path / "summary.safetensors").metadata
    assert metadata is not None
    assert metadata.settings["distill"]["trajectories"] == 2


def test_the_memory_of_a_distillation_is_told_and_limited(
    finished: Path, data: Path, tmp_path: Path, undrawn: None
) -> None:
    given = ("--pretrained", finished / "pretrained.safetensors")
    result = run("distill", data, *TINY, *given, "--memory-limit", "1GiB", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert re.search(r"memory +\d+ MiB above the data", result.stdout)
    assert "real batch" in result.stdout
    words = refusal("distill", data, *TINY, *given, "--memory-limit", "1MiB", "--out", tmp_path / "other")
    assert "memory limit of 1 MiB is too small" in words
    assert "\n" not in words


def test_other_learners_take_turns(finished: Path, data: Path, tmp_path: Path, undrawn: None) -> None:
    given = ("--pretrained", finished / "pretrained.safetensors")
    words = (*TINY, *given, "--start", "fresh", "--item-embedding", "frozen", "--other-learners")
    result = run("distill", data, *words, "gru4rec,BERT4Rec", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    summary = TuckerSummary.load(tmp_path / "summary.safetensors")
    assert summary.metadata is not None
    assert summary.metadata.training.learner == "SASRec"
    assert summary.metadata.settings["distill"]["other_learners"] == ["GRU4Rec", "BERT4Rec"]
    refused = refusal("distill", data, *words, "SASRec", "--out", tmp_path / "other")
    assert "leave it out" in refused


def test_the_summary_is_self_contained(finished: Path, data: Path) -> None:
    summary = TuckerSummary.load(finished / "summary.safetensors")
    assert summary.size == "6x6"
    assert summary.position_embeddings is not None
    metadata = summary.metadata
    assert metadata is not None
    assert metadata.training.steps == 6
    assert metadata.settings["distill"]["epochs"] == 2
    assert set(metadata.metrics) >= {"HR@10", "NDCG@10", "MRR@10"}


def test_results_of_a_distillation_tell_its_course(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert {(row["name"], row["protocol"]) for row in results["rows"]} >= {
        (name, protocol) for name in ("summary", "zero-step") for protocol in ("full", "uni100")
    }
    distillation = results["distillation"]
    assert [entry["epoch"] for entry in distillation["history"]] == [1, 2]
    assert set(distillation["seconds"]) == {"pretrain", "distill", "first evaluation"}
    assert distillation["peak_memory_mib"] > 10
    assert distillation["settings"]["recipe"] == "synthetic"
    assert results["versions"]["torch"]


class Hook:
    """Does something at one of the calls of the display's progress."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, act: Callable[[], None]) -> None:
        self.calls = 0

        def progress(display: Any, *arguments: Any) -> None:
            self.calls += 1
            if self.calls == at:
                act()

        monkeypatch.setattr("td3_fast.terminal.Display.progress", progress)


# every kind of place: pretraining, an outer step, an epoch's end, the last step, the evaluation
PLACES = (1, 4, 6, 8, 20)


def test_places_reach_into_every_stage(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    stages: list[str] = []

    def progress(display: Any, stage: str, *arguments: Any) -> None:
        stages.append(stage)

    monkeypatch.setattr("td3_fast.terminal.Display.progress", progress)
    assert run("distill", data, *TINY, "--out", tmp_path).exit_code == 0
    assert {stages[place - 1] for place in PLACES} >= {"train", "distill", "fit"}


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("how", ["at once", "after the step"])
def test_an_interrupted_run_ends_with_the_bits_of_an_unbroken_one(
    data: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undrawn: None,
    at: int,
    how: str,
) -> None:
    def stop() -> None:
        if how == "at once":
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patches:
        Hook(patches, at, stop)
        result = run("distill", data, *TINY, "--out", tmp_path)
    assert result.exit_code == 130, result.output
    assert "--resume" in result.stderr
    if how == "after the step":
        assert (tmp_path / "checkpoint.safetensors").exists()
    resumed = run("distill", data, *TINY, "--out", tmp_path, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert not (tmp_path / "checkpoint.safetensors").exists()
    assert_same_run(tmp_path, finished)


def test_a_killed_process_and_an_interrupted_one_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    longer = [*TINY, "--epochs", "4", "--inner-steps", "40"]
    command = [
        sys.executable,
        "-m",
        "td3_fast.cli",
        "distill",
        str(data),
        *longer,
        "--out",
        str(tmp_path / "a"),
    ]
    command.append("--resume")

    def stop_at(step: int, number: int) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                entries = read_json_lines(tmp_path / "a" / "log.jsonl")
                if entries and entries[-1].get("step", 0) >= step:
                    process.send_signal(number)
                    break
                time.sleep(0.002)
            out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    killed = stop_at(3, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    interrupted = stop_at(6, signal.SIGINT)
    assert interrupted.returncode == 130, interrupted.stderr
    assert "Go on with" in interrupted.stderr
    assert "--resume" in interrupted.stderr
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run("distill", data, *longer, "--out", tmp_path / "a", "--resume").exit_code == 0
        assert run("distill", data, *longer, "--out", tmp_path / "b").exit_code == 0
    finally:
        torch.set_num_threads(threads)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_run_in_the_folder_is_neither_mixed_nor_lost(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    before = (finished / "summary.safetensors").read_bytes()
    assert "holds a run already" in refusal("distill", data, *TINY, "--out", finished)
    assert "exclude each other" in refusal(
        "distill", data, *TINY, "--out", finished, "--resume", "--overwrite"
    )
    other = refusal("distill", data, *TINY, "--epochs", "3", "--out", finished, "--resume")
    assert "distill.epochs was 2 and is now 3" in other
    complete = run("distill", data, *TINY, "--out", finished, "--resume")
    assert complete.exit_code == 0
    assert "is complete" in complete.stdout
    assert (finished / "summary.safetensors").read_bytes() == before

    Hook(monkeypatch, 8, lambda: signal.raise_signal(signal.SIGINT))
    assert run("distill", data, *TINY, "--out", tmp_path).exit_code == 130
    wrong = refusal("distill", data, *TINY, "--seed", "1", "--out", tmp_path, "--resume")
    assert "seed was 0 and is now 1" in wrong


def test_overwriting_keeps_the_pretrained_learner_where_it_fits(
    finished: Path, data: Path, tmp_path: Path, undrawn: None
) -> None:
    learned = (finished / "pretrained.safetensors").read_bytes()
    (tmp_path / "pretrained.safetensors").write_bytes(learned)
    first = run("distill", data, *TINY, "--epochs", "1", "--out", tmp_path)
    assert "pretrained already" in first.stdout
    again = run("distill", data, *TINY, "--out", tmp_path, "--overwrite")
    assert "pretrained already" in again.stdout
    assert (tmp_path / "summary.safetensors").read_bytes() == (finished / "summary.safetensors").read_bytes()
    # settings of another pretraining: done anew when overwriting, refused otherwise
    other = [*TINY, "--max-epochs", "2", "--epochs", "1", "--out", tmp_path]
    (tmp_path / "summary.safetensors").unlink()
    assert run("distill", data, *other, "--overwrite").exit_code == 0
    assert (tmp_path / "pretrained.safetensors").read_bytes() != learned


def test_a_run_that_cannot_begin_replaces_none(finished: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.csv"
    short.write_text("user,item,time\n" + "".join(f"{u},{u + i},{i}\n" for u in range(9) for i in range(2)))
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    command = ["distill", short, *TINY, "--out", finished, "--overwrite"]
    assert "no example to rank" in refusal(*command)
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_a_name_that_is_no_text_is_kept_as_it_is(data: Path, tmp_path: Path, undrawn: None) -> None:
    named = tmp_path / os.fsdecode(b"donn\xe9es.inter")
    try:
        named.write_bytes(data.read_bytes())
    except (OSError, UnicodeError):
        pytest.skip("the file system has text alone for names")
    result = run("distill", named, *TINY, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["distillation"]["settings"]["source"] == str(named)


def test_a_pretrained_learner_of_elsewhere_is_taken_when_named(
    finished: Path, data: Path, tmp_path: Path, undrawn: None
) -> None:
    named = ["--pretrained", str(finished / "pretrained.safetensors")]
    assert run("distill", data, *TINY, *named, "--out", tmp_path).exit_code == 0
    assert (tmp_path / "summary.safetensors").read_bytes() == (finished / "summary.safetensors").read_bytes()
    filtered = ["--min-item-interactions", "4", "--out", str(tmp_path / "other")]
    assert "pretrained on other data" in refusal("distill", data, *TINY, *named, *filtered)


def test_every_switch_reaches_the_summary(data: Path, tmp_path: Path, undrawn: None) -> None:
    switches = [
        "--item-embedding", "frozen", "--window-kind", "fixed", "--no-alignment", "--no-augmentation",
        "--users-per-step", "2", "--summary-lr", "0.02", "--learner-lr", "0.004", "--normalize", "none",
        "--engine", "higher", "--start", "fresh", "--selection", "full", "--validation-runs", "2",
        "--criterion", "cross_entropy",
        "--threads", "1", "--seed", "7",
    ]  # fmt: skip
    result = run("distill", data, *TINY, "--epochs", "1", *switches, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    summary = TuckerSummary.load(tmp_path / "summary.safetensors")
    assert summary.metadata is not None
    assert summary.normalize == "none"
    assert summary.metadata.settings["seed"] == 7
    config = summary.metadata.settings["distill"]
    expected = {
        "item_embedding": "frozen",
        "window_kind": "fixed",
        "start": "fresh",
        "selection": "full",
        "validation_runs": 2,
        "criterion": "cross_entropy",
        "alignment": 0.0,
        "augmentation": False,
        "users_per_step": 2,
        "summary_lr": 0.02,
        "learner_lr": 0.004,
        "engine": "higher",
        "user_rank": 3,
    }
    assert {name: config[name] for name in expected} == expected


def test_the_authors_semantics_run_through(data: Path, tmp_path: Path, undrawn: None) -> None:
    result = run("distill", data, *TINY, "--semantics", "authors", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    evaluated = run(
        "evaluate", tmp_path / "summary.safetensors", data, "--seeds", "2", "--rows", "summary,zero-step"
    )
    assert evaluated.exit_code == 0, evaluated.output
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["ddof"] == 0


def test_improvements_differentiate_half_of_the_inner_steps_asked_for() -> None:
    for steps, window in ((None, 100), (7, 4), (500, 250)):
        config = RECIPES["ml-100k"].improved(inner_steps=steps).distill
        assert (config.inner_steps, config.window) == (steps or 200, window)


def test_improvements_lower_the_rate_where_real_batches_are_small() -> None:
    recipe = RECIPES["ml-100k"]
    for batch_size, share in ((4096, 1.0), (1024, 1.0), (256, 0.5)):
        improved = recipe.improved(batch_size=batch_size)
        assert improved == replace(recipe, distill=replace(recipe.distill, batch_size=batch_size)).improved()
        assert improved.distill.summary_lr == pytest.approx(share * recipe.distill.summary_lr)


def test_improvements_take_smaller_steps_where_classes_take_turns() -> None:
    recipe = RECIPES["ml-100k"]
    together = recipe.improved(other_learners=("GRU4Rec", "narm")).distill
    assert together.other_learners == ("GRU4Rec", "NARM")
    assert together.summary_lr == pytest.approx(recipe.improved().distill.summary_lr / 3)


def test_improvements_are_in_what_is_run(data: Path, tmp_path: Path, undrawn: None) -> None:
    result = run("distill", data, *TINY, "--improved", "--validation-runs", "1", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    summary = TuckerSummary.load(tmp_path / "summary.safetensors")
    assert summary.metadata is not None
    config = summary.metadata.settings["distill"]
    expected = {**IMPROVEMENTS, "validation_runs": 1}
    assert {name: config[name] for name in expected} == expected


def test_evaluate_writes_every_row_and_does_no_run_twice(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["evaluate", finished / "summary.safetensors", data, "--seeds", "2", "--max-epochs", "2"]
    result = run(*command, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    for name in ("summary", "full", "random+embeddings", "longest", "popularity", "zero-step"):
        assert name in result.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"rows", "settings", "versions"}
    assert len(results["rows"]) == 16
    for row in results["rows"]:
        assert set(row["metrics"]["HR@10"]) == {"mean", "sd"}
        assert set(row["recovery"]) == set(row["metrics"])
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(sys.modules["td3_fast.evaluate"], "fit_examples", never)
    monkeypatch.setattr(sys.modules["td3_fast.evaluate"], "fit_on_summary", never)
    assert run(*command, "--out", tmp_path).exit_code == 0
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == results["rows"]
    anew = run(*command, "--out", tmp_path, "--overwrite")
    assert anew.exit_code == 1
    assert "a finished run was repeated" in str(anew.exception)


def test_runs_that_were_made_otherwise_are_told_of(
    finished: Path, data: Path, tmp_path: Path, undrawn: None
) -> None:
    command = ["evaluate", finished / "summary.safetensors", data, "--rows", "popularity", "--out", tmp_path]
    assert "note:" not in run(*command).stdout
    entries = read_json_lines(tmp_path / "evaluation.jsonl")
    for entry in entries:
        entry["made_with"]["torch"] = "1.13"
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert "note: 1 kept runs were made otherwise, torch was" in run(*command).stdout
    assert run(*command, "--overwrite").exit_code == 0
    assert "note:" not in run(*command).stdout


def test_an_interrupted_evaluation_goes_on(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    command = ["evaluate", finished / "summary.safetensors", data, "--seeds", "2", "--max-epochs", "2"]
    command += ["--rows", "summary,full,zero-step"]
    with monkeypatch.context() as patches:
        Hook(patches, 18, lambda: signal.raise_signal(signal.SIGTERM))
        stopped = run(*command, "--out", tmp_path / "a")
    assert stopped.exit_code == 130, stopped.output
    assert not (tmp_path / "a" / "results.json").exists()
    done = len(read_json_lines(tmp_path / "a" / "evaluation.jsonl"))
    assert 0 < done < 6
    assert run(*command, "--out", tmp_path / "a").exit_code == 0
    assert run(*command, "--out", tmp_path / "b").exit_code == 0
    a, b = (json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in "ab")
    assert a == b


def test_an_evaluation_beside_its_distillation_keeps_the_course(
    finished: Path, data: Path, tmp_path: Path, undrawn: None
) -> None:
    for name in ("summary.safetensors", "results.json", "log.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    command = ["evaluate", tmp_path / "summary.safetensors", data, "--seeds", "1", "--max-epochs", "1"]
    assert run(*command, "--rows", "summary,popularity").exit_code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["summary"] * 2 + ["popularity"] * 2
    assert [entry["epoch"] for entry in results["distillation"]["history"]] == [1, 2]


def test_results_of_something_else_are_not_written_over(
    finished: Path, data: Path, tmp_path: Path, undrawn: None
) -> None:
    few = ["--rows", "popularity", "--seeds", "1", "--out", tmp_path]
    assert run("baselines", data, "--recipe", "synthetic", "--size", "5x5", *few).exit_code == 0
    command = ["evaluate", finished / "summary.safetensors", data, *few]
    assert "results of something else" in refusal(*command)
    assert run(*command, "--overwrite").exit_code == 0


def test_baselines_pretrain_where_a_row_needs_it(data: Path, tmp_path: Path, undrawn: None) -> None:
    common = [
        "baselines",
        data,
        "--recipe",
        "synthetic",
        "--size",
        "6x6",
        "--seeds",
        "2",
        "--max-epochs",
        "2",
    ]
    assert run(*common, "--rows", "full,random,popularity", "--out", tmp_path / "a").exit_code == 0
    assert not (tmp_path / "a" / "pretrained.safetensors").exists()
    result = run(*common, "--out", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "b" / "pretrained.safetensors").exists()
    assert "zero-step" in result.stdout
    assert "no summary among the baselines" in refusal(*common, "--rows", "summary", "--out", tmp_path / "c")


def test_fit_needs_no_data_and_scores_on_some(finished: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "learner.safetensors"
    command = ["fit", finished / "summary.safetensors", "--learner", "SASRec", "--out", out]
    result = run(*command, "--test", data)
    assert result.exit_code == 0, result.output
    assert "SASRec" in result.stdout
    assert "uni100" in result.stdout
    first = out.read_bytes()
    assert "exists" in refusal(*command)
    assert run(*command, "--overwrite").exit_code == 0
    assert out.read_bytes() == first


def test_another_learner_is_evaluated_in_a_folder_of_its_own(finished: Path, data: Path) -> None:
    before = (finished / "results.json").read_text()
    command = ["evaluate", finished / "summary.safetensors", data, "--seeds", "1", "--max-epochs", "1"]
    result = run(*command, "--learner", "narm")
    assert result.exit_code == 0, result.output
    results = json.loads((finished / "narm" / "results.json").read_text())
    assert results["settings"]["learner"] == "NARM"
    assert [row["name"] for row in results["rows"][::2]] == [
        "summary",
        "full",
        "full+embeddings",
        "zero-step",
    ]
    assert (finished / "results.json").read_text() == before
    assert "something else" in refusal(*command, "--learner", "narm", "--out", finished)
    assert "expected one of" in refusal(*command, "--learner", "Oracle")


@pytest.mark.parametrize("learner", ["GRU4Rec", "bert4rec"])
def test_another_learner_distils(data: Path, tmp_path: Path, learner: str) -> None:
    result = run("distill", data, "--out", tmp_path / "run", *TINY, "--learner", learner)
    assert result.exit_code == 0, result.output
    path = tmp_path / "run" / "summary.safetensors"
    metadata = TuckerSummary.load(path).metadata
    assert metadata is not None
    assert metadata.training.learner.lower() == learner.lower()
    assert run("fit", path).exit_code == 0
    pretrained = ["--pretrained", tmp_path / "run" / "pretrained.safetensors"]
    other = ["distill", data, "--out", tmp_path / "other", *TINY]
    for option in (("--learner", learner), ("--loss", "sampled")):
        assert f"{option[0]} and --pretrained exclude each other" in refusal(*other, *pretrained, *option)


def test_the_version_names_what_runs() -> None:
    result = run("--version")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"td3_fast {td3_fast.__version__}, torch {torch.__version__}, ")


def test_info_says_what_a_summary_is(finished: Path) -> None:
    text = run("info", finished / "summary.safetensors").stdout
    for words in ("6 users by 6 positions", "tiny", "SASRec, 6 steps", "item table frozen"):
        assert words in text


def test_info_shows_no_control_characters_of_the_file(finished: Path, tmp_path: Path) -> None:
    summary = TuckerSummary.load(finished / "summary.safetensors")
    assert summary.metadata is not None
    steering = replace(summary.metadata.preprocessing, data="x\x1b]0;title\x07")
    summary.metadata = replace(summary.metadata, preprocessing=steering, settings={"distill": "x"})
    summary.save(tmp_path / "summary.safetensors")
    text = run("info", tmp_path / "summary.safetensors").stdout
    assert "\x1b" not in text
    assert "x\\x1b]0;title" in text


def test_filters_that_no_command_applies_are_refused(finished: Path, data: Path, tmp_path: Path) -> None:
    summary = TuckerSummary.load(finished / "summary.safetensors")
    assert summary.metadata is not None
    filtered = replace(summary.metadata.preprocessing, filters={"min_rating": 4})
    summary.metadata = replace(summary.metadata, preprocessing=filtered)
    summary.save(tmp_path / "summary.safetensors")
    assert "'min_rating', which no command applies" in refusal(
        "evaluate", tmp_path / "summary.safetensors", data
    )


def test_demo_runs_the_whole_path(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undrawn: None
) -> None:
    recipe = RECIPES["synthetic"]
    config = replace(
        recipe.distill, users=5, positions=5, user_rank=2, position_rank=2, epochs=1, inner_steps=4, window=2
    )
    fit = replace(recipe.pretrain.fit, max_epochs=2)
    monkeypatch.setitem(
        RECIPES, "synthetic", replace(recipe, distill=config, pretrain=replace(recipe.pretrain, fit=fit))
    )
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # without --out its own folder is used again
        result = run("demo", data, "--seeds", "2")
        assert result.exit_code == 0, result.output
    for name in ("summary", "full", "random", "longest", "zero-step"):
        assert name in result.stdout
    assert (tmp_path / "runs" / "demo" / "summary.safetensors").exists()
    assert "holds a run already" in refusal("demo", data, "--seeds", "2", "--out", tmp_path / "runs" / "demo")


def test_data_commands(tmp_path: Path) -> None:
    path = tmp_path / "made.inter.gz"
    assert (
        run("data", "generate", path, "--users", "20", "--items", "15", "--mean-length", "6").exit_code == 0
    )
    assert "exists" in refusal("data", "generate", path)
    checked = run("data", "check", path)
    assert "20 users" in checked.stdout
    assert "ml-100k" in run("data", "list").stdout
    assert "600 users" in run("data", "check", "synthetic").stdout
    few = ["--users", "9", "--items", "5", "--mean-length", "3"]
    assert "9 users" in run("data", "generate", tmp_path / "new folder" / "few.inter", *few).stdout
    assert "no data set 'nothing'" in refusal("data", "fetch", "nothing")
    assert "ml-1m of more than 50 users: user rank 64" in " ".join(run("recipes").stdout.split())


def test_columns_and_format_are_named(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("who,what,when\n" + "".join(f"u{u},i{i},{i}\n" for u in range(3) for i in range(4)))
    result = run("data", "check", path, "--format", "csv", "--columns", "user=who,item=what,timestamp=when")
    assert "3 users, 4 items, 12 interactions" in result.stdout
    assert "--columns is like" in refusal("data", "check", path, "--format", "csv", "--columns", "who")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "nope"], "unknown recipe 'nope': expected one of magazine, epinions, ml-100k"),
        (["--recipe", "synthetic", "--size", "6by6"], "a size is USERSxPOSITIONS"),
        (["--recipe", "synthetic", "--window", "300"], "the window (300) cannot be longer"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    data: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    assert words in refusal("distill", data, *options, "--out", tmp_path)


def test_without_a_recipe_that_of_the_name_is_taken_or_a_common_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise ValueError("enough seen")

    monkeypatch.setattr("td3_fast.run.Run.distill", stop)
    assert "by the recipe synthetic" in run("distill", "synthetic", "--out", tmp_path).stdout
    assert "by the recipe ml-100k" in run("distill", data, "--out", tmp_path).stdout


def test_what_is_to_be_tested_on_is_read_before_anything_is_written(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.inter"
    write_interactions(generate_interactions(num_users=9, num_items=12, mean_length=6, seed=4), other)
    summary = finished / "summary.safetensors"
    for command, out in (("fit", tmp_path / "learner"), ("export", tmp_path / "hard.inter")):
        assert "the summary is over" in refusal(command, summary, "--out", out, "--test", other)
        assert not out.exists()
    baselines = ["baselines", data, "--recipe", "synthetic", "--out", tmp_path / "b"]
    assert "no summary among the baselines" in refusal(*baselines, "--rows", "full,hard")
    assert ".inter or .inter.gz" in refusal("data", "generate", tmp_path / "made.csv")
    assert "finite" in refusal("data", "generate", tmp_path / "made.inter", "--mean-length", "inf")


def test_data_and_artefacts_that_cannot_be_are_refused(finished: Path, data: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    broken = tmp_path / "broken.inter"
    broken.write_text("user_id:token\titem_id:token\ttimestamp:float\nu\ti\tnoon\n")
    assert "broken.inter:2:5: expected" in refusal("distill", broken, *TINY, *out)
    assert "no file" in refusal("distill", tmp_path / "missing", *TINY, *out)
    summary = finished / "summary.safetensors"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(summary.read_bytes()[:-10])
    assert "truncated" in refusal("evaluate", cut, data, *out)
    assert "cannot be read" in refusal("info", tmp_path / "missing")
    assert "expected one of" in refusal("fit", summary, "--learner", "Oracle")
    assert "unknown row 'all'" in refusal("evaluate", summary, data, "--rows", "all", *out)
    other = tmp_path / "other.inter"
    write_interactions(generate_interactions(num_users=30, num_items=25, mean_length=8, seed=4), other)
    assert "the summary" in refusal("evaluate", summary, other, *out)
    assert "other interactions" in refusal("evaluate", summary, _permuted(data, tmp_path), *out)


def _permuted(data: Path, folder: Path) -> Path:
    """The same items in the same order of first appearance, but another last interaction."""
    lines = data.read_text().splitlines()
    user, _, when = lines[-1].split("\t")
    item = lines[1].split("\t")[1]
    path = folder / "permuted.inter"
    path.write_text("\n".join([*lines, f"{user}\t{item}\t{int(float(when)) + 1}"]) + "\n")
    return path


def test_wrong_usage_exits_with_2(tmp_path: Path) -> None:
    assert run("distill").exit_code == 2
    assert run("distill", "synthetic", "--out", tmp_path, "--engine", "steam").exit_code == 2
    assert run("evaluate", tmp_path, "synthetic", "--seeds", "0").exit_code == 2


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("pyarrow", ["data", "check", "log.parquet"]),
        ("higher", ["distill", "tiny.inter", "--out", "run", "--engine", "higher"]),
    ],
)
def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, words: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log.parquet").write_bytes(b"PAR1")
    assert package in refusal(*words)


def test_a_traceback_is_shown_on_demand(tmp_path: Path) -> None:
    assert isinstance(run("--traceback", "info", tmp_path / "missing").exception, ValueError)


def test_without_matplotlib_the_run_goes_on(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*arguments: Any, **options: Any) -> None:
        raise ImportError("matplotlib")

    monkeypatch.setattr("td3_fast.run_folder.draw_report", missing)
    result = run(
        "evaluate",
        finished / "summary.safetensors",
        data,
        "--rows",
        "popularity",
        "--seeds",
        "1",
        "--out",
        tmp_path,
    )
    assert result.exit_code == 0, result.output
    assert "report.png is left out" in result.stdout
    assert not (tmp_path / "report.png").exists()


def test_the_command_starts_without_torch() -> None:
    code = "import sys, td3_fast.cli; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
