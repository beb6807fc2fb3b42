"""The command `td3-fast reproduce`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from td3_fast.cli_data import Columns, Data, Format, Seed
from td3_fast.cli_options import MaxEpochs, Threads, go_on, read_split, set_threads, watching
from td3_fast.terminal import guarded, say

if TYPE_CHECKING:
    from td3_fast.paper import Cell


@guarded
def reproduce(
    table: Annotated[int, typer.Argument(help="2, 3 or 6, as the paper numbers them.", show_default=False)],
    data: Data,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder; results/table-TABLE-DATASET if left out.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", help="ml-100k or ml-1m, where the name of DATA does not say which."),
    ] = None,
    distillations: Annotated[int, typer.Option(min=1, help="Summaries per cell, from as many seeds.")] = 1,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Learners per summary or baseline.")] = 3,
    semantics: Annotated[
        Literal["paper", "authors"], typer.Option(help="The paper's method, or its released program's.")
    ] = "paper",
    epochs: Annotated[int | None, typer.Option(min=1, help="Of each distillation; 30 if left out.")] = None,
    seed: Seed = 0,
    max_epochs: MaxEpochs = None,
    format: Format = None,
    columns: Columns = None,
    threads: Threads = None,
) -> None:
    """Make the cells of a table of the paper and print them beside the paper's figures.

    Cell by cell into table.csv and table.html, one file with its pictures inside. The same command goes on where it was
    stopped, or where more distillations are asked for.
    """
    set_threads(threads)
    from td3_fast.distill import with_semantics
    from td3_fast.paper import cells_of
    from td3_fast.recipes import recipe_named
    from td3_fast.reproduce import Reproduction

    dataset = Path(data).name.split(".")[0] if dataset is None else dataset
    cells = cells_of(table, dataset)
    recipe = recipe_named(dataset)
    recipe = replace(recipe, distill=with_semantics(recipe.distill, semantics))
    if epochs is not None:
        recipe = replace(recipe, distill=replace(recipe.distill, epochs=epochs))
    if max_epochs is not None:
        fit = replace(recipe.pretrain.fit, max_epochs=max_epochs)
        recipe = replace(recipe, pretrain=replace(recipe.pretrain, fit=fit))
    folder = Path("results") / f"table-{table}-{dataset}" if out is None else out
    split = read_split(data, format=format, columns=columns)
    say(f"{split.interactions!r}; {len(cells)} cells of table {table}; into {folder}")
    with watching(go_on()) as watcher:
        work = Reproduction(
            folder=folder,
            split=split,
            source=data,
            cells=cells,
            recipe=recipe,
            distillations=distillations,
            seeds=seeds,
            seed=seed,
            watcher=watcher,
        )
        figures = work.run(lambda cell: watcher.say(f"cell: {_words(cell)}"))
    say()
    for figure in figures:
        if figure.protocol == "uni100" and figure.metric in ("HR@10", "NDCG@10"):
            paper = "" if figure.paper is None else f"  paper {figure.paper[0]:.2f}"
            say(f"{_words(figure.cell):34} {figure.metric:8} {figure.mean:6.2f} ± {figure.sd:.2f}{paper}")
    say(f"\nwritten: {folder / 'table.csv'} and {folder / 'table.html'}")


def _words(cell: Cell) -> str:
    return " ".join(filter(None, (cell.method, cell.size)))
