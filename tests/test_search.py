"""Model search on a summary: the grid, the order, its agreement with full data, and how it goes on."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from td3_fast.cli import app
from td3_fast.data import Split, write_interactions
from td3_fast.evaluate import learner_for, untrained_learner
from td3_fast.learners import LEARNERS, SASRec
from td3_fast.ops import derive_seed
from td3_fast.report import read_json_lines
from td3_fast.search import (
    Candidate,
    SearchConfig,
    Standing,
    Start,
    agreement,
    grid,
    kendall_tau,
    search,
)
from td3_fast.summary import Preprocessing, SummaryMetadata, TuckerSummary
from td3_fast.training import FitConfig, Ranker

FEW = [
    Candidate(learner="SASRec", hyperparameters={"hidden": 8, "layers": 1}),
    Candidate(learner="SASRec", hyperparameters={"hidden": 4, "layers": 1}),
    Candidate(learner="GRU4Rec", hyperparameters={"inner": 6}),
]
CONFIG = SearchConfig(seeds=2, full_seeds=1, fit=FitConfig(max_epochs=2, batch_size=64))


def test_candidates_that_differ_in_dropout_alone_are_told_apart(summary: TuckerSummary, split: Split) -> None:
    metadata = summary.metadata
    assert metadata is not None
    without = replace(metadata, training=replace(metadata.training, dropout=False))
    rates = [
        Candidate(learner="SASRec", hyperparameters={"layers": 1, "hidden_dropout": r}) for r in (0.0, 0.7)
    ]

    def scores(config: SearchConfig) -> list[float]:
        summary.metadata = without
        try:
            found = search(summary, split, rates, config=config)
        finally:
            summary.metadata = metadata
        return [standing.summary["full"]["MRR@20"]["mean"] for standing in found]

    # many steps, so that dropout moves ranks
    config = SearchConfig(seeds=1, steps=60)
    first, second = scores(config)
    assert first != second
    first, second = scores(replace(config, dropout=None))
    assert first == second


def test_the_grid_has_every_architecture_width_depth_and_dropout(summary: TuckerSummary) -> None:
    candidates = grid(summary)
    assert len(candidates) == 4 * 2 * 2 * 2
    assert {c.learner for c in candidates} == set(LEARNERS)
    assert {c.hyperparameters["hidden"] for c in candidates} == {8, 4}
    assert len({c.name for c in candidates}) == len(candidates)
    assert grid(summary, learners=["narm"], widths=[8], depths=[1], dropouts=[0.1]) == [
        Candidate(learner="NARM", hyperparameters={"hidden": 8, "layers": 1, "embedding_dropout": 0.1})
    ]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"widths": [16], "start": "pretrained"}, "has 8 columns, and a learner of width 16"),
        ({"learners": ["LSTM"]}, "unknown learner"),
        ({"dropouts": [1.5]}, "must lie in"),
    ],
)
def test_candidates_that_cannot_be_are_refused(
    summary: TuckerSummary, axes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        grid(summary, **axes)


@pytest.mark.parametrize("start", ["nothing", "pretrained"])
def test_where_a_learner_starts_on_the_summary(summary: TuckerSummary, split: Split, start: Start) -> None:
    (candidate,) = grid(summary, learners=["SASRec"], widths=[8], depths=[1], dropouts=[0.2], start=start)
    config = replace(CONFIG, seeds=1, full_seeds=0, start=start)
    (found,) = search(summary, split, [candidate], config=config, seed=3)
    seed = derive_seed(3, "run", 0)
    make = learner_for if start == "pretrained" else untrained_learner
    learner = make(summary, hyperparameters=candidate.hyperparameters, seed=seed)
    carried = torch.equal(learner.item_embeddings.detach(), summary.item_factors)
    assert carried == (start == "pretrained")
    summary.fit(learner, seed=seed, dropout=True, item_embedding="trained")
    scores = Ranker(split.validation, seed=derive_seed(3, "ranker")).metrics(learner)
    assert found.summary["full"]["NDCG@10"]["mean"] == scores["full"]["NDCG@10"]


def test_from_nothing_a_learner_may_be_wider_than_the_summarys(summary: TuckerSummary) -> None:
    assert {c.hyperparameters["hidden"] for c in grid(summary, widths=[16])} == {16}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_narrower_learner_starts_from_the_principal_axes(summary: TuckerSummary, name: str) -> None:
    learner = learner_for(summary, name=name, hyperparameters={"hidden": 4})
    table = summary.item_factors
    left, values, _ = torch.linalg.svd(table, full_matrices=False)
    nearest = (left[:, :4] * values[:4].square()) @ left[:, :4].T  # of rank 4 to the products between items
    narrow = learner.item_embeddings.detach()[:, :4]
    torch.testing.assert_close(narrow @ narrow.T, nearest, rtol=1e-4, atol=1e-6)
    if name == "SASRec":
        assert learner.position_embeddings is not None
        assert summary.position_embeddings is not None
        length = summary.position_embeddings.norm(dim=1)
        assert bool((learner.position_embeddings.detach().norm(dim=1) <= length + 1e-6).all())


def test_a_learner_of_the_same_width_has_the_tables_to_the_bit(summary: TuckerSummary) -> None:
    learner = learner_for(summary, hyperparameters={"layers": 2})
    assert torch.equal(learner.item_embeddings.detach(), summary.item_factors)
    assert learner.position_embeddings is not None
    assert summary.position_embeddings is not None
    assert torch.equal(learner.position_embeddings.detach(), summary.position_embeddings)
    assert learner.hyperparameters()["inner"] == 8


def test_what_the_summary_fixes_is_no_hyperparameter(summary: TuckerSummary) -> None:
    with pytest.raises(ValueError, match="max_len comes from the summary"):
        learner_for(summary, hyperparameters={"max_len": 9})


def test_candidates_come_best_first_and_judged(summary: TuckerSummary, split: Split) -> None:
    seen = []
    found = search(summary, split, FEW, config=CONFIG, on_trial=lambda *trial: seen.append(trial))
    assert len(seen) == 3 * 2 + 3
    assert [key[1] for key, _ in seen] == ["summary"] * 6 + ["full"] * 3
    figures = [standing.summary["uni100"]["NDCG@10"]["mean"] for standing in found]
    assert figures == sorted(figures, reverse=True)
    assert all(standing.full is not None and standing.full_seconds > 0 for standing in found)
    judged = agreement(found, protocol="uni100", metric="NDCG@10")
    assert judged is not None
    assert judged.candidates == 3
    assert judged.chosen == found[0].candidate.name
    assert judged.regret >= 0
    again = search(summary, split, FEW, config=CONFIG, known=dict(seen))
    assert again == found


def test_without_full_data_nothing_is_judged(summary: TuckerSummary, split: Split) -> None:
    found = search(summary, split, FEW[:2], config=SearchConfig(seeds=1))
    assert agreement(found, protocol="uni100", metric="NDCG@10") is None


def test_more_steps_on_the_summary_are_another_training(summary: TuckerSummary, split: Split) -> None:
    few, many = (search(summary, split, FEW[:1], config=SearchConfig(seeds=1, steps=n)) for n in (4, 30))
    as_distilled_for = search(summary, split, FEW[:1], config=SearchConfig(seeds=1))
    assert few[0].summary == as_distilled_for[0].summary
    assert few[0].summary != many[0].summary


def test_candidates_are_ranked_by_the_mean_of_their_losses_where_asked(
    summary: TuckerSummary, split: Split
) -> None:
    found = search(summary, split, FEW, config=replace(CONFIG, full_seeds=0, rank_by="loss"))
    means = [standing.summary_loss["mean"] for standing in found]
    assert means == sorted(means)
    by_metric = search(summary, split, FEW, config=replace(CONFIG, full_seeds=0))
    assert {s.candidate.name: s.summary_loss for s in found} == {
        s.candidate.name: s.summary_loss for s in by_metric
    }
    losses = []
    for run in range(CONFIG.seeds):
        seed = derive_seed(0, "run", run)
        learner = untrained_learner(
            summary, name=FEW[0].learner, hyperparameters=FEW[0].hyperparameters, seed=seed
        )
        losses += summary.fit(learner, seed=seed, **CONFIG.fit_changes())
    mine = next(standing for standing in found if standing.candidate == FEW[0])
    assert mine.summary_loss["mean"] == pytest.approx(sum(losses) / len(losses))


def test_a_candidate_that_diverges_is_the_last(
    summary: TuckerSummary, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = TuckerSummary.fit

    def diverging(self: TuckerSummary, learner: Any, **options: Any) -> list[float]:
        if isinstance(learner, SASRec):
            raise FloatingPointError("the loss of step 1 of 4 is not finite")
        return fit(self, learner, **options)

    monkeypatch.setattr(TuckerSummary, "fit", diverging)
    found = search(summary, split, FEW, config=SearchConfig(seeds=3, rank_by="loss"))
    assert found[0].candidate == FEW[2]
    assert len(found) == 3


def test_a_candidate_that_diverges_on_the_data_is_the_last_there(
    summary: TuckerSummary, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["td3_fast.search"]
    fit = module.fit_examples

    def diverging(learner: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(learner, SASRec):
            raise FloatingPointError("the loss of batch 1 is not finite")
        return fit(learner, *arguments, **options)

    monkeypatch.setattr(module, "fit_examples", diverging)
    found = search(summary, split, FEW, config=replace(CONFIG, full_seeds=1))
    ranked = sorted(found, key=lambda standing: -standing.full["uni100"]["NDCG@10"]["mean"])
    assert ranked[0].candidate == FEW[2]
    assert ranked[-1].full["uni100"]["HR@20"]["mean"] == 0.0


def test_names_tell_all_candidates_apart() -> None:
    names = [
        Candidate(
            learner="BERT4Rec", hyperparameters={"positions_from": "first", "hidden_dropout": rate}
        ).name
        for rate in (0.1234567, 0.1234568)
    ]
    assert names[0] == "BERT4Rec positions_from=first hidden_dropout=0.1234567"
    assert names[0] != names[1]


def test_a_candidate_twice_is_refused(summary: TuckerSummary, split: Split) -> None:
    with pytest.raises(ValueError, match="occurs twice"):
        search(summary, split, [FEW[0], FEW[0]])


@pytest.mark.parametrize(
    ("first", "second", "tau"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 2, 4, 3], 4 / 6),
        ([1, 1, 2], [1, 2, 3], 2 / 6**0.5),
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_kendall_tau_of_worked_cases(first: list[float], second: list[float], tau: float | None) -> None:
    assert kendall_tau(first, second) == (None if tau is None else pytest.approx(tau))


def test_regret_is_what_the_chosen_one_lacks() -> None:
    def standing(name: str, on_summary: float, on_data: float, loss: float | None = None) -> Standing:
        return Standing(
            candidate=Candidate(learner=name, hyperparameters={}),
            summary={"full": {"HR@5": {"mean": on_summary, "sd": 0.0}}},
            full={"full": {"HR@5": {"mean": on_data, "sd": 0.0}}},
            summary_seconds=1.0,
            full_seconds=10.0,
            summary_loss={"mean": 1.0 - on_summary if loss is None else loss, "sd": 0.0},
        )

    found = [standing("a", 0.3, 0.5), standing("b", 0.2, 0.75), standing("c", 0.1, 0.25)]
    judged = agreement(found, protocol="full", metric="HR@5")
    assert judged is not None
    assert (judged.chosen, judged.best, judged.regret) == ("a", "b", 0.25)
    assert (judged.summary_seconds, judged.full_seconds) == (3.0, 30.0)
    # by the loss the lowest is chosen
    found = [standing("a", 0.3, 0.5, 2.0), standing("b", 0.2, 0.75, 1.0), standing("c", 0.1, 0.25, 3.0)]
    judged = agreement(found, protocol="full", metric="HR@5", rank_by="loss")
    assert judged is not None
    assert (judged.chosen, judged.regret, judged.kendall_tau) == ("b", 0.0, 1.0)


# the command


@pytest.fixture
def files(summary: TuckerSummary, split: Split, tmp_path: Path) -> tuple[Path, Path]:
    data = tmp_path / "synthetic.inter"
    write_interactions(split.interactions, data)
    read = leave_one_out_of(data)
    own = summary.metadata
    assert own is not None
    items = {item: row for row, item in enumerate(own.item_ids)}
    order = torch.tensor([items[item] for item in read.item_ids.tolist()])
    saved = TuckerSummary(
        summary.core.detach(), summary.user_factors.detach(), summary.position_factors.detach(),
        summary.item_factors[order], position_embeddings=summary.position_embeddings,
        metadata=SummaryMetadata(
            item_ids=tuple(read.item_ids.tolist()),
            preprocessing=Preprocessing(data="synthetic", filters={}, fingerprint=read.fingerprint),
            training=own.training,
        ),
    )  # fmt: skip
    path = tmp_path / "summary.safetensors"
    saved.save(path)
    return path, data


def leave_one_out_of(data: Path) -> Any:
    from td3_fast.data import load_interactions

    return load_interactions(data)


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


SMALL = (
    "--learners",
    "SASRec,GRU4Rec",
    "--widths",
    "8",
    "--depths",
    "1",
    "--dropouts",
    "0.1",
    "--seeds",
    "1",
)


def test_a_stopped_search_goes_on_where_it_was(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("search", *files, *SMALL, "--full", "--max-epochs", "2")
    whole = run(*words, "--out", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    assert "chosen: " in whole.stdout
    assert whole.stdout.count("Kendall's tau") == 2
    by_loss = run(*words, "--out", tmp_path / "whole", "--rank-by", "loss")
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["agreement"] == results["agreements"]["loss"]
    assert f"chosen: {results['agreement']['chosen']}" in " ".join(by_loss.stdout.split())
    assert run(*words, "--out", tmp_path / "whole").exit_code == 0

    def stop_at_the_second(display: Any, stage: str, done: int, *_: Any) -> None:
        if stage == "search" and done == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patches:
        patches.setattr("td3_fast.terminal.Display.progress", stop_at_the_second)
        stopped = run(*words, "--out", tmp_path / "stopped")
    assert stopped.exit_code == 130
    assert len(read_json_lines(tmp_path / "stopped" / "trials.jsonl")) == 2
    assert len(json.loads((tmp_path / "stopped" / "results.json").read_text())["candidates"]) == 2
    resumed = run(*words, "--out", tmp_path / "stopped")
    assert resumed.exit_code == 0, resumed.output
    ours, theirs = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("stopped", "whole")
    )
    assert [c["summary"] for c in ours["candidates"]] == [c["summary"] for c in theirs["candidates"]]
    assert ours["agreement"]["kendall_tau"] == theirs["agreement"]["kendall_tau"]
    assert ours["settings"] == theirs["settings"]


def test_trials_of_other_settings_do_not_count(files: tuple[Path, Path], tmp_path: Path) -> None:
    words = ("search", *files, *SMALL, "--out", tmp_path / "search")
    assert run(*words).exit_code == 0
    assert run(*words).exit_code == 0
    assert len(read_json_lines(tmp_path / "search" / "trials.jsonl")) == 2
    assert run(*words, "--seed", "1").exit_code == 0
    assert len(read_json_lines(tmp_path / "search" / "trials.jsonl")) == 4


def test_trials_of_other_defaults_do_not_count(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("search", *files, *SMALL, "--full", "--max-epochs", "1", "--out", tmp_path / "search")
    assert run(*words).exit_code == 0
    before = len(read_json_lines(tmp_path / "search" / "trials.jsonl"))
    assert run(*words).exit_code == 0
    assert len(read_json_lines(tmp_path / "search" / "trials.jsonl")) == before
    everything = sys.modules["td3_fast.evaluate"].all_hyperparameters
    monkeypatch.setattr(
        sys.modules["td3_fast.evaluate"],
        "all_hyperparameters",
        lambda name, given: everything(name, {**given, "inner": 5}),
    )
    assert run(*words).exit_code == 0
    assert len(read_json_lines(tmp_path / "search" / "trials.jsonl")) == 2 * before


def test_trials_on_the_full_data_serve_other_summaries_of_them(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    summary, data = files
    other = TuckerSummary.load(summary)
    other.core.detach().mul_(2)
    other.save(tmp_path / "other.safetensors")
    for number, path in enumerate((summary, tmp_path / "other.safetensors"), start=1):
        words = ("search", path, data, *SMALL, "--full", "--max-epochs", "1", "--out", tmp_path / "search")
        assert run(*words).exit_code == 0
        trials = read_json_lines(tmp_path / "search" / "trials.jsonl")
        sources = [trial["source"] for trial in trials]
        assert (sources.count("summary"), sources.count("full")) == (2 * number, 2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--widths", "64", "--start", "pretrained"), "has 8 columns"),
        (("--depths", "deep"), "--depths is a list of numbers"),
        (("--learners", "LSTM"), "unknown learner"),
        (("--full-seeds", "2"), "--full-seeds is of --full"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    files: tuple[Path, Path], tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    result = run("search", *files, *more, "--out", tmp_path / "search")
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_a_folder_of_something_else_is_not_overwritten(files: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    result = run("search", *files, *SMALL, "--out", tmp_path)
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr


@pytest.mark.gpu
def test_on_a_gpu(summary: TuckerSummary, split: Split) -> None:
    there = copy.deepcopy(summary).to(torch.device("cuda"))
    found = search(there, split, FEW, config=CONFIG)
    assert {standing.candidate.name for standing in found} == {candidate.name for candidate in FEW}
    assert all(standing.full is not None for standing in found)
