"""Tables of the paper: which cells there are, how they are made and gone on with, what is written."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from td3_fast.cli import app
from td3_fast.data import Split, generate_interactions, leave_one_out
from td3_fast.paper import METHODS, Cell, cells_of, tables
from td3_fast.recipes import Recipe, recipe_named
from td3_fast.reproduce import Figure, Reproduction
from td3_fast.run import RunError, Stopped, Watcher


@pytest.fixture(scope="module", autouse=True)
def _undrawn() -> Iterator[None]:
    """No picture of every single run: they take longer than the runs."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("td3_fast.run.draw", lambda folder, watcher: None)
        yield


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


CELLS = [
    Cell(table=3, dataset="toy", method="farzi", size="6x6", published={"HR@10": (50.0, 1.0)}),
    Cell(table=3, dataset="toy", method="TD3", size="6x6", published={"HR@10": (60.0, None)}),
    Cell(table=3, dataset="toy", method="random", size="6x6", published={}),
    Cell(table=3, dataset="toy", method="full", size=None, published={"HR@10": (99.0, 0.5)}),
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
    assert set(tables()) == {2, 3, 6}
    for table, datasets in tables().items():
        for dataset in datasets:
            cells = cells_of(table, dataset)
            assert {cell.method for cell in cells} <= set(METHODS)
            assert all(0 < mean < 100 for cell in cells for mean, _ in cell.published.values())
    by_size = {cell.size: cell for cell in cells_of(2, "ml-100k")}
    assert set(by_size) == {"25x150", "30x50", "50x50", None}
    assert by_size["50x50"].published["NDCG@10"] == (40.62, 0.16)
    assert len(by_size["50x50"].published) == 9


@pytest.mark.parametrize(("table", "dataset"), [(5, "ml-100k"), (2, "magazine")])
def test_other_tables_are_refused(table: int, dataset: str) -> None:
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
    assert ours["recovery_percent"] != ""
    assert by_place["TD3", "full", "HR@10"]["paper_mean_percent"] == ""
    assert by_place["full", "uni100", "HR@10"]["recovery_percent"] == ""
    assert by_place["farzi", "uni100", "NDCG@10"] != by_place["TD3", "uni100", "NDCG@10"]


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


def test_another_table_is_not_written_over(
    finished: tuple[Path, list[Figure]], split: Split, recipe: Recipe
) -> None:
    cells = [replace(CELLS[1], table=2)]
    with pytest.raises(RunError, match="another table"):
        make(finished[0], split, recipe, cells=cells).run()


def test_the_command_refuses_in_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["reproduce", "2", "synthetic", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "cannot be reproduced" in result.stderr
