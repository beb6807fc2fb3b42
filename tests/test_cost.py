"""The table of costs: which steps are measured, how it is gone on with, what is written."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from td3_fast.cli import app
from td3_fast.cost import (
    DISTILLATION,
    ON_FULL,
    ON_SUMMARY,
    OPERATIONS,
    PRETRAINING,
    CostTable,
    Step,
    speed_up,
)
from td3_fast.data import Split, generate_interactions, leave_one_out, write_interactions
from td3_fast.paper import published_costs
from td3_fast.recipes import Recipe, recipe_named
from td3_fast.reproduce_page import Section
from td3_fast.run_folder import RunError, Stopped, Watcher


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps in this process, which takes less time than starting one for each."""
    monkeypatch.setattr("td3_fast.run_folder.draw_report", lambda *args, **options: None)
    monkeypatch.setattr("td3_fast.cost.in_own_process", lambda work, watcher: work(watcher))


@pytest.fixture(scope="module")
def split() -> Split:
    return leave_one_out(generate_interactions(num_users=30, num_items=130, mean_length=8, seed=3))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    tiny = recipe_named("synthetic").sized("6x6").fitted(max_epochs=2)
    config = replace(
        tiny.distill, user_rank=3, position_rank=3, epochs=1, inner_steps=6, window=3, batch_size=100
    )
    return replace(tiny, distill=config)


def make(folder: Path, split: Split, recipe: Recipe, **changes: Any) -> CostTable:
    options = {"dataset": "toy", "seeds": 2, "source": "toy", **changes}
    return CostTable(folder=folder, split=split, recipe=recipe, **options)


def test_what_was_measured_before_there_were_ensembles_is_known(
    split: Split, recipe: Recipe, tmp_path: Path
) -> None:
    fit = replace(recipe.pretrain, ensemble_share=0.3)
    assert make(tmp_path, split, recipe)._key() == make(tmp_path, split, replace(recipe, pretrain=fit))._key()
    fit = replace(fit, ensemble=1)
    assert make(tmp_path, split, recipe)._key() != make(tmp_path, split, replace(recipe, pretrain=fit))._key()


def test_every_operation_has_its_time_and_memory(split: Split, recipe: Recipe, tmp_path: Path) -> None:
    published = {DISTILLATION: (7104.0, 3460.0)}
    heard: list[Section] = []
    options = {"published": published, "seeds": 1, "on_written": heard.append}
    costs = make(tmp_path, split, recipe, **options).run()
    assert [section.title for section in heard] == ["Table 5 of TD3 on toy"] * 4
    assert tuple(cost.operation for cost in costs) == OPERATIONS
    assert [cost.times for cost in costs] == [1, 1, 1, 1]
    assert all(cost.seconds > 0 for cost in costs)
    assert speed_up(costs) == pytest.approx(costs[2].seconds / costs[3].seconds)
    if Path("/proc/self/status").exists():
        assert all(cost.peak_memory_mib is not None and 50 < cost.peak_memory_mib < 1e5 for cost in costs)
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        lines = {line["operation"]: line for line in csv.DictReader(file)}
    assert float(lines[ON_SUMMARY]["seconds_mean"]) == pytest.approx(costs[3].seconds, abs=1e-3)
    assert (lines[DISTILLATION]["paper_seconds"], lines[PRETRAINING]["paper_seconds"]) == ("7104.0", "")
    page = (tmp_path / "table.html").read_text(encoding="utf-8")
    assert "4 of 4 steps" in page
    assert "1 h 58 min" in page
    assert "http" not in page
    assert {line["device"] for line in lines.values()} == {"CPU"}


@pytest.mark.usefixtures("at_once")
def test_a_step_that_is_done_is_not_done_again(split: Split, recipe: Recipe, tmp_path: Path) -> None:
    met: list[Step] = []

    def stop_at_the_fourth(step: Step) -> None:
        met.append(step)
        if len(met) == 4:
            raise Stopped

    with pytest.raises(Stopped):
        make(tmp_path, split, recipe).run(stop_at_the_fourth)
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 1 + 3
    rest: list[Step] = []
    first = make(tmp_path, split, recipe).run(rest.append)
    assert rest == [(ON_SUMMARY, 0, 1), (ON_FULL, 0, 0), (ON_FULL, 0, 1)]
    rest.clear()
    assert make(tmp_path, split, recipe).run(rest.append) == first
    make(tmp_path, split, recipe, distillations=2).run(rest.append)
    assert rest == [
        (PRETRAINING, 1, 0),
        (DISTILLATION, 1, 0),
        (ON_SUMMARY, 1, 0),
        (ON_SUMMARY, 1, 1),
        (ON_FULL, 1, 0),
    ]


@pytest.mark.usefixtures("at_once")
def test_pretraining_counts_the_time_before_an_interruption(
    split: Split, recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        make(tmp_path, split, recipe, watcher=Watcher(stop=lambda: True)).run()
    log = tmp_path / "cells" / "6x6-0" / "log.jsonl"
    (first,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert (first["event"], first["epoch"]) == ("pretrain", 1)
    costs = make(tmp_path, split, recipe).run()
    # were it not counted, the second epoch would be all there is
    epochs = [json.loads(line) for line in log.read_text().splitlines() if '"pretrain"' in line]
    assert epochs[0] == first
    assert costs[0].seconds == epochs[1]["seconds"] > first["seconds"]


@pytest.mark.usefixtures("at_once")
def test_another_table_is_not_written_over(split: Split, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("table,dataset\n3,toy\n")
    with pytest.raises(RunError, match="another table"):
        make(tmp_path, split, recipe).run()


def test_the_papers_costs_are_of_its_four_data_sets() -> None:
    assert published_costs("ml-100k")[ON_FULL] == (347.0, 1910.0)
    assert set(published_costs("ml-1m")) == {DISTILLATION, ON_FULL, ON_SUMMARY}
    assert published_costs("ciao") == {}


@pytest.mark.usefixtures("at_once")
def test_the_command_says_what_each_operation_took(split: Split, tmp_path: Path) -> None:
    data = tmp_path / "synthetic.inter"
    write_interactions(split.interactions, data)
    options = "--size 6x6 --seeds 1 --epochs 1 --max-epochs 1"
    words = ["reproduce", "5", str(data), *options.split()]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    for operation in OPERATIONS:
        assert operation in result.stdout
    assert "times faster on the summary" in result.stdout


@pytest.mark.gpu
def test_on_a_gpu_memory_is_that_of_the_gpu(split: Split, recipe: Recipe, tmp_path: Path) -> None:
    costs = make(tmp_path, split, recipe, seeds=1, device=torch.device("cuda", 0)).run()
    assert all(cost.peak_memory_mib is not None and 0 < cost.peak_memory_mib < 100 for cost in costs)
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        assert {line["device"] for line in csv.DictReader(file)} == {torch.cuda.get_device_name()}
