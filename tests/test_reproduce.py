"""Tables of the paper: which cells there are, how they are made and gone on with, what is written."""

from __future__ import annotations

import csv
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from td3_fast.cli import app
from td3_fast.cli_reproduce import recipe_for
from td3_fast.data import Split, generate_interactions, leave_one_out, write_interactions
from td3_fast.distill_config import Semantics
from td3_fast.evaluate_run import EvaluateRun
from td3_fast.faults import FROZEN, MEANINGS, fault_cells
from td3_fast.figures import Figure
from td3_fast.paper import METHODS, Cell, cells_of, cross_cells, published_shares, published_size, tables
from td3_fast.recipes import RECIPES, Recipe, recipe_named
from td3_fast.report import read_json_lines
from td3_fast.reproduce import Reproduction
from td3_fast.reproduce_page import label
from td3_fast.run_folder import RunError, Stopped, Watcher
from td3_fast.summary import load_summary
from td3_fast.tune import TuneConfig

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def split() -> Split:
    return leave_one_out(generate_interactions(num_users=30, num_items=130, mean_length=8, seed=3))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    tiny = recipe_named("synthetic").sized("6x6")
    fit = replace(tiny.pretrain.fit, max_epochs=2)
    config = replace(
        tiny.distill, user_rank=3, position_rank=3, epochs=1, inner_steps=6, window=3, batch_size=100, latent_rank=3
    )  # fmt: skip
    return replace(tiny, pretrain=replace(tiny.pretrain, fit=fit), distill=config)


def toy(method: str, size: str | None = "6x6", **changes: Any) -> Cell:
    row, config = METHODS[method]
    against = {"TD3": "full", "full": None}.get(method, "TD3")
    named = {"table": "3", "dataset": "toy", "row": row, "changes": config, "against": against}
    return Cell(method=method, size=size, **{**named, **changes})


CELLS = [
    toy("farzi", published={"HR@10": (50.0, 1.0)}),
    toy("TD3", published={"HR@10": (60.0, None)}),
    toy("random"),
    toy("full", None, published={"HR@10": (99.0, 0.5)}),
]


def make(folder: Path, split: Split, recipe: Recipe, **changes: Any) -> Reproduction:
    options = {"cells": CELLS, "seeds": 2, "source": "toy", **changes}
    return Reproduction(folder=folder, split=split, recipe=recipe, **options)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, split: Split, recipe: Recipe
) -> tuple[Path, list[Figure]]:
    folder = tmp_path_factory.mktemp("table")
    return folder, make(folder, split, recipe).run()


def test_the_tables_name_known_methods_and_every_metric_once() -> None:
    assert set(tables()) == {"2", "3", "6"}
    for table, datasets in tables().items():
        for dataset in datasets:
            cells = cells_of(table, dataset)
            assert {cell.method for cell in cells} <= set(METHODS)
            assert all(0 < mean < 100 for cell in cells for mean, _ in cell.published.values())
    by_size = {cell.size: cell for cell in cells_of("2", "ml-100k")}
    assert set(by_size) == {"25x150", "30x50", "50x50", None}
    assert by_size["50x50"].published["NDCG@10"] == (40.62, 0.16)
    assert len(by_size["50x50"].published) == 9
    assert {cell.size for cell in cells_of("2", "ml-100k", "30x50")} == {"30x50", None}


@pytest.mark.parametrize(("table", "dataset"), [("5", "ml-100k"), ("2", "magazine")])
def test_other_tables_are_refused(table: str, dataset: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be reproduced: there are table 2 on ml-100k, ml-1m"):
        cells_of(table, dataset)


def test_every_cell_has_its_figures_beside_the_papers(finished: tuple[Path, list[Figure]]) -> None:
    folder, figures = finished
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(figures) == 4 * 2 * 9
    by_place = {(line["method"], line["protocol"], line["metric"]): line for line in lines}
    ours = by_place["TD3", "uni100", "HR@10"]
    assert (ours["size"], ours["paper_mean_percent"], ours["paper_sd_percent"]) == ("6x6", "60.0", "")
    assert ours["over"] == "2 learners"
    assert by_place["TD3", "full", "HR@10"]["paper_mean_percent"] == ""
    assert by_place["full", "uni100", "HR@10"]["recovery_percent"] == ""
    assert by_place["farzi", "uni100", "NDCG@10"] != by_place["TD3", "uni100", "NDCG@10"]
    assert (ours["against"], ours["pairs"]) == ("full", "2")
    assert 0 <= float(ours["p_value"]) <= 1
    full = by_place["full", "uni100", "HR@10"]
    share = 100 * float(ours["mean_percent"]) / float(full["mean_percent"])
    assert float(ours["of_full_percent"]) == pytest.approx(share, abs=0.1)
    assert by_place["random", "full", "HR@10"]["against"] == "TD3 6x6"
    assert (full["against"], full["p_value"], full["of_full_percent"]) == ("", "", "")


def test_the_page_needs_no_network(finished: tuple[Path, list[Figure]]) -> None:
    text = (finished[0] / "table.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=\"(?!data:image/png;base64,)", text)
    assert "data:image/png;base64," in text
    assert "4 of 4 cells" in text
    assert "(60.00)" in text


def test_a_stopped_table_goes_on_where_it_was(
    finished: tuple[Path, list[Figure]], split: Split, recipe: Recipe, tmp_path: Path
) -> None:
    met: list[str] = []

    def stop_at_the_second(cell: Cell) -> None:
        met.append(cell.method)
        if len(met) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        make(tmp_path, split, recipe).run(stop_at_the_second)
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 9
    stages: list[str] = []
    watcher = Watcher(progress=lambda stage, *rest: stages.append(stage))
    figures = make(tmp_path, split, recipe, watcher=watcher).run()
    assert figures == finished[1]
    stages.clear()
    make(tmp_path, split, recipe, watcher=watcher).run()
    assert not {"distill", "train", "fit"} & set(stages)


def test_distillations_are_averaged(split: Split, recipe: Recipe, tmp_path: Path) -> None:
    one = make(tmp_path, split, recipe, cells=CELLS[1:2]).run()
    two = make(tmp_path, split, recipe, cells=CELLS[1:2], distillations=2).run()
    other = make(tmp_path / "other", split, recipe, cells=CELLS[1:2], seed=1).run()
    for first, second, mean in zip(one, other, two, strict=True):
        assert mean.mean == pytest.approx((first.mean + second.mean) / 2)
        assert mean.sd == pytest.approx(abs(first.mean - second.mean) / 2**0.5)
        assert mean.over == "2 distillations"


def test_more_learners_are_trained_where_more_are_asked_for(
    split: Split, recipe: Recipe, tmp_path: Path
) -> None:
    make(tmp_path, split, recipe, cells=CELLS[1:2]).run()
    stages: list[str] = []
    watcher = Watcher(progress=lambda stage, *rest: stages.append(stage))
    more = make(tmp_path, split, recipe, cells=CELLS[1:2], seeds=3, watcher=watcher).run()
    assert {figure.over for figure in more} == {"3 learners"}
    assert "distill" not in stages


def test_another_evaluation_in_a_cells_folder_changes_no_figure(
    split: Split, recipe: Recipe, tmp_path: Path
) -> None:
    before = make(tmp_path, split, recipe, cells=CELLS[1:2], seed=1).run()
    folder = tmp_path / "cells" / "TD3-6x6-1"
    summary = load_summary(folder / "summary.safetensors")
    for rows in (("summary", "zero-step"), ("popularity",)):
        EvaluateRun(folder=folder, summary=summary, split=split, source="toy", rows=rows, seeds=2).evaluate()
        assert make(tmp_path, split, recipe, cells=CELLS[1:2], seed=1).run() == before


def test_training_on_a_cells_summary_may_be_tuned(split: Split, recipe: Recipe, tmp_path: Path) -> None:
    tuning = TuneConfig(rates=(3.0,), lengths=(2.0,), dropouts=(False,), middle_positions=(1,))
    own, tuned = (
        make(tmp_path, split, recipe, cells=[toy("TD3"), toy("zero-step")], **more).run()
        for more in ({}, {"tune": tuning})
    )
    changed = {a.cell.method for a, b in zip(own, tuned, strict=True) if a.mean != b.mean}
    assert changed == {"TD3"}
    assert make(tmp_path, split, recipe, cells=[toy("TD3"), toy("zero-step")]).run() == own


def test_a_recipe_may_depend_on_the_size(split: Split, recipe: Recipe, tmp_path: Path) -> None:
    def recipe_of(size: str) -> Recipe:
        sized = recipe.sized(size)
        return replace(sized, distill=replace(sized.distill, user_rank=sized.distill.users))

    make(tmp_path, split, recipe, cells=[toy("TD3", "5x6")], recipe_of=recipe_of).run()
    summary = load_summary(tmp_path / "cells" / "TD3-5x6-0" / "summary.safetensors")
    assert summary.state_dict()["core"].shape[:2] == (5, 3)


def test_one_summary_serves_every_learner(split: Split, recipe: Recipe, tmp_path: Path) -> None:
    cells = [
        toy(method, None if method == "full" else "6x6", table="4", learner=learner)
        for learner in ("SASRec", "GRU4Rec")
        for method in ("TD3", "zero-step", "full")
    ]
    figures = make(tmp_path, split, recipe, cells=cells).run()
    distilled = [path.parent.name for path in tmp_path.glob("cells/*/summary.safetensors")]
    assert distilled == ["TD3-6x6-0"]
    by_cell = {
        (figure.cell.learner, figure.cell.method): figure
        for figure in figures
        if (figure.protocol, figure.metric) == ("uni100", "NDCG@10")
    }
    assert len(by_cell) == 6
    ours, whole = by_cell["GRU4Rec", "TD3"], by_cell["GRU4Rec", "full"]
    assert ours.of_full == pytest.approx(100 * ours.mean / whole.mean)
    assert ours.mean != by_cell["SASRec", "TD3"].mean
    assert by_cell["GRU4Rec", "zero-step"].mean != by_cell["SASRec", "zero-step"].mean
    assert by_cell["GRU4Rec", "zero-step"].against == "TD3 6x6 GRU4Rec"
    text = (tmp_path / "table.html").read_text(encoding="utf-8")
    assert "TD3 6x6 GRU4Rec" in text


def test_table_4_is_of_any_data_and_has_the_papers_figures_for_its_own() -> None:
    size = published_size("epinions")
    assert (size, published_size("ml-100k")) == ("50x20", None)
    assert size is not None
    own = {(cell.learner, cell.method): cell for cell in cross_cells("epinions", size)}
    learners = {"SASRec", "GRU4Rec", "NARM", "BERT4Rec"}
    assert set(own) == {(learner, method) for learner in learners for method in ("TD3", "zero-step", "full")}
    assert own["NARM", "TD3"].published["NDCG@10"] == (10.67, None)
    other = cross_cells("ml-100k", "50x50")
    assert [cell.published for cell in other] == [{}] * 12
    assert [cell.published for cell in cross_cells("epinions", "9x9") if cell.method == "TD3"] == [{}] * 4
    assert published_shares()["SASRec"] == pytest.approx(100 * 10.61 / 10.45)


def test_every_fault_is_one_switch_beside_the_papers_semantics(recipe: Recipe) -> None:
    cells = {cell.method: cell for cell in fault_cells("toy", "6x6")}
    assert set(cells) == {"paper", "full", *MEANINGS}
    plain = recipe.as_published()
    configs = {name: replace(plain.distill, **cell.changes) for name, cell in cells.items()}
    switched = {
        name: {
            entry.name
            for entry in fields(Semantics)
            if getattr(config.semantics, entry.name) != getattr(Semantics(), entry.name)
        }
        for name, config in configs.items()
    }
    assert switched.pop("authors") == {entry.name for entry in fields(Semantics)}
    assert (
        switched.pop("paper") == switched.pop("full") == switched.pop(FROZEN) == switched.pop("ddof") == set()
    )
    assert all(value == {name} for name, value in switched.items())
    assert {name for name, config in configs.items() if config.item_embedding == "frozen"} == {FROZEN}
    assert cells["ddof"].ddof == 0


def test_what_a_fault_is_worth(split: Split, recipe: Recipe, tmp_path: Path) -> None:
    chosen = ("paper", "carry_embeddings", "ddof", FROZEN)
    cells = [cell for cell in fault_cells("toy", "6x6") if cell.method in chosen]
    figures = make(tmp_path, split, recipe.as_published(), cells=cells).run()
    by_method = {
        figure.cell.method: figure
        for figure in figures
        if (figure.protocol, figure.metric) == ("full", "NDCG@10")
    }
    plain, ddof = by_method["paper"], by_method["ddof"]
    assert (ddof.mean, ddof.sd) == (plain.mean, pytest.approx(plain.sd / 2**0.5))
    assert not (tmp_path / "cells" / "ddof-6x6-0").exists()
    # its epochs are those of the paper's semantics, which distils once
    log = read_json_lines(tmp_path / "cells" / "carry_embeddings-6x6-0" / "log.jsonl")
    assert {entry["event"] for entry in log} == {"epoch"}
    for name in ("carry_embeddings", FROZEN):
        test = by_method[name].test
        assert by_method[name].against == "paper 6x6"
        assert test is not None
        assert test.difference == pytest.approx(by_method[name].mean - plain.mean)


def test_a_recipe_as_published_has_nothing_beyond_the_paper() -> None:
    magazine = recipe_named("magazine").as_published()
    assert magazine.distill.item_embedding == "trained"
    assert (magazine.distill.start, magazine.distill.initial) == ("pool", "noise")
    assert recipe_named("ml-100k").as_published() == recipe_named("ml-100k")
    assert recipe_named("ciao").as_published().pretrain.pool_items


def test_what_was_made_otherwise_is_made_anew_where_asked(split: Split, tmp_path: Path) -> None:
    data = tmp_path / "log.inter"
    write_interactions(split.interactions, data)
    words = ["reproduce", "4", str(data), "--recipe", "synthetic", "--out", str(tmp_path), "--seeds", "1"]
    words += ["--size", "6x6", "--max-epochs", "1"]
    assert CliRunner().invoke(app, [*words, "--epochs", "1"]).exit_code == 0
    lines = list(csv.DictReader((tmp_path / "6x6" / "table.csv").read_text().splitlines()))
    assert {line["over"] for line in lines} == {"1 learner"}
    assert {line["sd_percent"] for line in lines} == {""}
    refused = CliRunner().invoke(app, [*words, "--epochs", "2"])
    assert refused.exit_code == 2
    assert "or --overwrite" in refused.stderr.replace("\n", " ")
    again = CliRunner().invoke(app, [*words, "--epochs", "2", "--overwrite"])
    assert again.exit_code == 0, again.stderr
    metadata = load_summary(tmp_path / "cells" / "TD3-6x6-0" / "summary.safetensors").metadata
    assert metadata is not None
    assert metadata.settings["distill"]["epochs"] == 2


def test_another_table_is_not_written_over(
    finished: tuple[Path, list[Figure]], split: Split, recipe: Recipe
) -> None:
    cells = [replace(CELLS[1], table="2")]
    with pytest.raises(RunError, match="another table"):
        make(finished[0], split, recipe, cells=cells).run()


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["2", "synthetic"], "cannot be reproduced"),
        (["2", "ml-100k", "--size", "5x5"], "there are 25x150, 30x50, 50x50"),
        (["faults", "synthetic", "--improved"], "leave --improved"),
        (["all", "synthetic", "--semantics", "authors"], "together are of the paper's method"),
        (["all", "synthetic", "--size", "6x6"], "leave --size out"),
        (["4", "unheard-of"], "say by --dataset"),
        (["4", "synthetic", "--recipe", "unheard-of"], "unknown recipe"),
        (["4", "synthetic", "--other-learners", "NARM"], "is of table 4, beside --improved"),
        (["4", "synthetic", "--improved", "--other-learners", "SASRec"], "leave it out"),
    ],
)
def test_the_command_refuses_in_one_sentence(words: list[str], refusal: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["reproduce", *words, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert refusal in result.stderr


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("synthetic", ""),
        ("log", "--recipe synthetic"),
        ("synthetic", "--improved --other-learners NARM,gru4rec,BERT4Rec"),
    ],
)
def test_the_command_prints_the_share_of_the_full_data(
    split: Split, tmp_path: Path, name: str, more: str
) -> None:
    data = tmp_path / f"{name}.inter"
    write_interactions(split.interactions, data)
    options = f"--size 6x6 --seeds 2 --epochs 1 --max-epochs 1 {more}"
    words = ["reproduce", "4", str(data), *options.split()]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.stderr
    for learner in ("SASRec", "GRU4Rec", "NARM", "BERT4Rec"):
        assert re.search(rf"TD3 6x6 {learner} +NDCG@10 .* % of full", result.stdout)
    assert "on Epinions: SASRec 101.5 %" in result.stdout
    metadata = load_summary(tmp_path / "cells" / "TD3-6x6-0" / "summary.safetensors").metadata
    assert metadata is not None
    assert ("other_learners" in metadata.settings["distill"]) == ("--other-learners" in more)


def test_all_tables_stand_on_one_page_and_share_their_summaries(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "toy.inter"
    write_interactions(split.interactions, data)
    tiny = recipe_named("synthetic").sized("6x6").as_published()
    config = replace(tiny.distill, user_rank=3, position_rank=3, inner_steps=6, window=3, batch_size=100)
    monkeypatch.setitem(RECIPES, "toy", replace(tiny, name="toy", distill=config))
    few = [replace(cell, table="4") for cell in (CELLS[1], CELLS[3])]
    monkeypatch.setattr("td3_fast.paper.cross_cells", lambda dataset, size: few)
    monkeypatch.setattr("td3_fast.cli_reproduce.ALL", ("2", "4", "faults"))
    faults = [
        cell for cell in fault_cells("toy", "6x6", same_run_as="TD3") if cell.method in ("paper", "ddof")
    ]
    monkeypatch.setattr(
        "td3_fast.faults.fault_cells", lambda *args, same_run_as: faults if same_run_as else []
    )
    out = tmp_path / "results"
    options = "--seeds 1 --epochs 1 --max-epochs 1"
    result = CliRunner().invoke(app, ["reproduce", "all", str(data), *options.split(), "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    text = (out / "report.html").read_text(encoding="utf-8")
    titles = ["Table 4 of TD3 on toy", "TD3&#x27;s released program: faults on toy"]
    assert (
        re.findall(r'<a href="#\d">([^<]*)</a>', text)
        == titles
        == re.findall(r"<section id=\"\d\"><h1>([^<]*)</h1>", text)
    )
    for table in ("4", "faults"):
        assert (out / f"table-{table}" / "table.csv").exists()
    # the paper's semantics are the other tables' method, whose summary is there already
    assert (out / "cells" / "TD3-6x6-0").exists()
    assert not (out / "cells" / "paper-6x6-0").exists()
    assert not (out / "table-4" / "cells").exists()
    # a table that is made again does not take the place of all of them
    monkeypatch.setattr("td3_fast.cli_reproduce.ALL", ("4",))
    result = CliRunner().invoke(app, ["reproduce", "all", str(data), *options.split(), "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    assert (out / "report.html").read_text(encoding="utf-8") == text


def test_processes_side_by_side_make_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = cross_cells("toy", "6x6")[:3]  # of one learner
    monkeypatch.setattr("td3_fast.paper.cross_cells", lambda *given: cells)
    data = tmp_path / "toy.inter"
    write_interactions(generate_interactions(num_users=40, num_items=26, mean_length=9, seed=3), data)
    options = ["--dataset", "synthetic", "--seeds", "1", "--epochs", "1", "--max-epochs", "1"]
    made = []
    for processes in ("1", "2"):
        out = tmp_path / processes
        words = ["reproduce", "4", str(data), *options, "--processes", processes, "--out", str(out)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.stderr
        made.append((out / "table.csv").read_text())
    assert made[0] == made[1]
    assert "process 2 has done" in result.stdout
    refused = CliRunner().invoke(app, ["reproduce", "5", str(data), *options, "--processes", "2"])
    assert refused.exit_code == 2
    assert "leave --processes out" in refused.stderr


@pytest.mark.parametrize("name", RECIPES)
def test_tables_that_share_a_pretrained_learner_ask_for_the_same(
    name: str, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Recipe] = {}

    def note(work: Reproduction, *rest: object) -> None:
        asked[work.cells[0].table] = work.recipe
        assert work.shared is not None
        assert work.folder == work.shared / f"table-{work.cells[0].table}"

    monkeypatch.setattr("td3_fast.cli_reproduce._make_cells", note)
    monkeypatch.setattr("td3_fast.cli_reproduce._make_costs", lambda *given, **options: None)
    monkeypatch.setattr("td3_fast.cli_reproduce.read_split", lambda *args, **options: split)
    words = ["reproduce", "all", "log.inter", "--dataset", name, "--out", str(tmp_path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    settings = {}
    for table, recipe in asked.items():
        sized = (
            [recipe.sized(cell.size) for cell in cells_of(table, name) if cell.size]
            if table in "236"
            else [recipe]
        )
        for one in sized:
            length = one.learner["max_len"]
            assert settings.setdefault(length, one.pretrain.settings()) == one.pretrain.settings()


def test_the_cells_of_one_size_stand_beside_the_whole_table(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Reproduction] = []
    monkeypatch.setattr("td3_fast.cli_reproduce._make_cells", lambda work, *rest: seen.append(work))
    monkeypatch.setattr("td3_fast.cli_reproduce.read_split", lambda *args, **options: split)
    words = ["reproduce", "2", "ml-100k.inter", "--size", "30X50", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    (work,) = seen
    assert [cell.label for cell in work.cells] == ["TD3 30x50", "full"]
    assert (work.folder, work.shared) == (tmp_path / "30x50", tmp_path)


@pytest.mark.parametrize("table", ["4", "faults"])
def test_a_table_at_another_size_has_the_same_learners_on_the_full_data(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    seen: list[Reproduction] = []
    monkeypatch.setattr("td3_fast.cli_reproduce._make_cells", lambda work, *rest: seen.append(work))
    monkeypatch.setattr("td3_fast.cli_reproduce.read_split", lambda *args, **options: split)
    for size in ("6x6", "5x35"):
        words = ["reproduce", table, "synthetic.inter", "--size", size, "--out", str(tmp_path)]
        assert CliRunner().invoke(app, words).exit_code == 0
    first, second = seen
    assert first.recipe == second.recipe
    assert second.recipe_of is not None
    assert second.recipe_of("5x35").learner["max_len"] == 35


@pytest.mark.parametrize(("size", "ranks"), [("25x150", (25, 64)), ("50x50", (50, 50))])
def test_what_is_improved_depends_on_the_size_of_a_cell(size: str, ranks: tuple[int, int]) -> None:
    asked: dict[str, Any] = {"semantics": "paper", "improved": True, "epochs": None, "max_epochs": None}
    config = recipe_for(recipe_named("ml-100k"), "2", size, **asked).distill
    assert (config.user_rank, config.position_rank) == ranks


@pytest.mark.parametrize("changes", [{}, {"learner": "GRU4Rec"}, {"table": "4"}, {"size": None}])
def test_the_page_names_rows_as_cells_are_named(changes: dict[str, Any]) -> None:
    cell = toy("TD3", **changes)
    line = {"table": cell.table, "method": cell.method, "size": cell.size, "learner": cell.learner}
    assert label(line) == cell.label


@pytest.mark.gpu
def test_on_a_gpu(split: Split, recipe: Recipe, tmp_path: Path) -> None:
    cells = [*CELLS, toy("TD3", learner="GRU4Rec"), toy("full", None, learner="GRU4Rec")]
    figures = make(tmp_path, split, recipe, cells=cells, device=torch.device("cuda", 0)).run()
    assert {figure.cell.label for figure in figures} == {cell.label for cell in cells}
    assert all(0 <= figure.mean <= 100 for figure in figures)
