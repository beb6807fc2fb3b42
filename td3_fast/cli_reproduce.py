"""The command `td3-fast reproduce`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from td3_fast.cli_data import Columns, Data, Format, Seed
from td3_fast.cli_options import MaxEpochs, Threads, go_on, read_split, set_threads, watching
from td3_fast.terminal import duration, guarded, say

if TYPE_CHECKING:
    from td3_fast.figures import Figure
    from td3_fast.paper import Cell
    from td3_fast.recipes import Recipe

Table = Literal["2", "3", "4", "5", "6", "faults"]
OF_ONE_SIZE = ("4", "5", "faults")  # tables that are of one size: the recipe's, unless it is named


@guarded
def reproduce(
    table: Annotated[
        Table, typer.Argument(help="As the paper numbers them; faults: of its released program.")
    ],
    data: Data,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder; results/table-TABLE-DATASET if left out.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", help="The name of its recipe, where the name of DATA does not say which."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            help="Of summaries in tables 4, 5 and faults, the recipe's if left out; of 2, 3 and 6 its cells alone.",
        ),
    ] = None,
    distillations: Annotated[int, typer.Option(min=1, help="Summaries per cell, from as many seeds.")] = 1,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Learners per summary; in all for a row without one.")
    ] = 3,
    semantics: Annotated[
        Literal["paper", "authors"], typer.Option(help="The paper's method, or its released program's.")
    ] = "paper",
    improved: Annotated[
        bool, typer.Option("--improved", help="Beyond the paper, as that option of distill.")
    ] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of each distillation; by recipe.")] = None,
    seed: Seed = 0,
    max_epochs: MaxEpochs = None,
    format: Format = None,
    columns: Columns = None,
    threads: Threads = None,
) -> None:
    """Make the cells of a table of the paper and print them beside the paper's figures.

    2: quality by size; 3: baselines; 4: four learners on one summary; 5: time and memory; 6: ablation; faults: what
    each fault of the released program is worth. Tables 2, 3 and 6 are of the paper's data sets and sizes; the others
    can be made of any that has a recipe.

    Cell by cell into table.csv and table.html, one file with its pictures inside. The same command goes on where it was
    stopped, or where more distillations or learners are asked for.
    """
    set_threads(threads)
    from td3_fast.recipes import recipe_named

    dataset = Path(data).name.split(".")[0] if dataset is None else dataset
    if table == "faults" and (improved or semantics != "paper"):
        raise ValueError("the table of faults is of the paper's method: leave --improved and --semantics out")
    cells = _cells(table, dataset, size)
    own_size = size if table in OF_ONE_SIZE else None
    recipe = _recipe(recipe_named(dataset), table, own_size, semantics, improved)
    if epochs is not None:
        recipe = replace(recipe, distill=replace(recipe.distill, epochs=epochs))
    recipe = recipe.fitted(max_epochs=max_epochs)
    minima = {
        "min_item_interactions": recipe.min_item_interactions,
        "min_user_interactions": recipe.min_user_interactions,
    }
    filters = {name: minimum for name, minimum in minima.items() if minimum}
    folder = Path("results") / f"table-{table}-{dataset}" if out is None else out
    split = read_split(data, format=format, columns=columns, **filters)
    common = {
        "folder": folder,
        "split": split,
        "source": data,
        "recipe": recipe,
        "filters": filters,
        "distillations": distillations,
        "seeds": seeds,
        "seed": seed,
    }
    say(f"{split.interactions!r}; {len(cells) or 'all'} cells of table {table}; into {folder}")
    if table == "5":
        _make_costs(dataset, common)
    else:
        _make_cells(cells, common)
    say(f"\nwritten: {folder / 'table.csv'} and {folder / 'table.html'}")


def _cells(table: Table, dataset: str, size: str | None) -> Sequence[Cell]:
    """The cells of a table of qualities."""
    from td3_fast.faults import fault_cells
    from td3_fast.paper import cells_of, cross_cells, published_size
    from td3_fast.recipes import recipe_named

    if table not in OF_ONE_SIZE:
        return cells_of(table, dataset, size)
    if table == "5":
        return []
    config = recipe_named(dataset).distill
    own = f"{config.users}x{config.positions}"
    if table == "faults":
        return fault_cells(dataset, size or own)
    return cross_cells(dataset, size or published_size(dataset) or own)


def _recipe(
    recipe: Recipe, table: Table, size: str | None, semantics: Literal["paper", "authors"], improved: bool
) -> Recipe:
    from td3_fast.distill_config import with_semantics

    if size is not None:
        recipe = recipe.sized(size)
    if table == "faults":
        return recipe.as_published()
    if improved:
        recipe = recipe.improved()
    recipe = replace(recipe, distill=with_semantics(recipe.distill, semantics))
    if recipe.distill.item_embedding == "trained" and recipe.distill.start == "pool":
        recipe = replace(recipe, pretrain=replace(recipe.pretrain, pool_items=True))
    return recipe


def _make_costs(dataset: str, common: dict[str, Any]) -> None:
    from td3_fast.cost import CostTable, in_words, speed_up
    from td3_fast.paper import published_costs

    with watching(go_on()) as watcher:
        work = CostTable(dataset=dataset, published=published_costs(dataset), watcher=watcher, **common)
        costs = work.run(lambda step: watcher.say(f"step: {step[0]}, seed {step[1]}, number {step[2] + 1}"))
    say()
    for cost in costs:
        memory = "" if cost.peak_memory_mib is None else f"{cost.peak_memory_mib:7.0f} MiB"
        paper = "" if cost.paper is None else f"  paper {duration(cost.paper[0])}, {cost.paper[1]:.0f} MB"
        say(f"{cost.operation:28} {in_words(cost):24}{memory}{paper}")
    faster = speed_up(costs)
    if faster is not None:
        say(f"a learner is trained {faster:.1f} times faster on the summary")


def _make_cells(cells: Sequence[Cell], common: dict[str, Any]) -> None:
    from td3_fast.reproduce import Reproduction

    with watching(go_on()) as watcher:
        work = Reproduction(cells=cells, notes=_notes(cells[0]), watcher=watcher, **common)
        figures = work.run(lambda cell: watcher.say(f"cell: {cell.label}"))
    say()
    for figure in figures:
        if figure.protocol == "uni100" and figure.metric in ("HR@10", "NDCG@10"):
            say(_words(figure))
    for note in _notes(cells[0]):
        say(f"\n{note}")


def _words(figure: Figure) -> str:
    words = f"{figure.cell.label:34} {figure.metric:8} {figure.mean:6.2f} ± {figure.sd:.2f}"
    if figure.of_full is not None:
        words += f"  {figure.of_full:5.1f} % of full"
    if figure.test is not None:
        words += f"  {figure.test.difference:+.2f} to {figure.against} (p = {figure.test.p_value:.2g})"
    if figure.paper is not None:
        words += f"  paper {figure.paper[0]:.2f}"
    return words


def _notes(cell: Cell) -> list[str]:
    """Sentences that the reader of a cell's table needs."""
    from td3_fast.faults import FAULTS, MEANINGS
    from td3_fast.paper import CROSS, published_shares

    if cell.table == FAULTS:
        return [f"{name}: {meaning}." for name, meaning in MEANINGS.items()]
    if cell.table == CROSS:
        shares = ", ".join(f"{learner} {share:.1f} %" for learner, share in published_shares().items())
        return [f"The paper's NDCG@10 on the summary, of that on the full data, on Epinions: {shares}."]
    return []
