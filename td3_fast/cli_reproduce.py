"""The command `td3-fast reproduce`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from td3_fast.cli_data import Columns, Data, Format, Seed
from td3_fast.cli_options import (
    Device,
    MaxEpochs,
    Threads,
    device_named,
    go_on,
    names_in,
    read_split,
    set_threads,
    watching,
)
from td3_fast.terminal import duration, guarded, say

if TYPE_CHECKING:
    from td3_fast.cost import CostTable
    from td3_fast.figures import Figure
    from td3_fast.paper import Cell
    from td3_fast.recipes import Recipe
    from td3_fast.reproduce import Reproduction
    from td3_fast.reproduce_page import Section
    from td3_fast.run_folder import Watcher
    from td3_fast.side_by_side import Ahead

Table = Literal["2", "3", "4", "5", "6", "faults", "all"]
ALL = ("2", "3", "6", "4", "faults", "5")
OF_ONE_SIZE = ("4", "5", "faults")  # tables that are of one size: the recipe's, unless it is named


@guarded
def reproduce(
    table: Annotated[
        Table,
        typer.Argument(help="As the paper numbers them; faults: of its released program; all of these."),
    ],
    data: Data,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The folder; results/table-TABLE-DATASET if left out, with the recipe where it is named.",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", help="The data set's name, where the name of DATA does not say which."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", help="Of `td3-fast recipes`, with its filters of the log; the data set's if left out."
        ),
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
    other_learners: Annotated[
        str | None,
        typer.Option(
            "--other-learners",
            help="Of table 4, beside --improved: classes that take turns in distilling, as of distill.",
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Of tables 2, 3, 4 and 6: training on a summary is tuned, as by evaluate."
        ),
    ] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Of each distillation; by recipe.")] = None,
    seed: Seed = 0,
    max_epochs: MaxEpochs = None,
    format: Format = None,
    columns: Columns = None,
    processes: Annotated[
        int,
        typer.Option(
            min=1, help="Cells that are made side by side, each in a process with its share of --threads."
        ),
    ] = 1,
    threads: Threads = None,
    device: Device = "cpu",
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Make these cells anew, and learners shared with others.",
        ),
    ] = False,
) -> None:
    """Make the cells of a table of the paper and print them beside the paper's figures.

    2: quality by size; 3: baselines; 4: four learners on one summary; 5: time and memory; 6: ablation.
    faults: what each fault of the released program is worth.
    all: every table of these data, with report.html, which shows them together.

    Tables 2, 3 and 6 are of the paper's data sets and sizes; the others of any data that have a recipe.

    Cell by cell into table.csv and table.html, one file with its pictures inside.
    The same command goes on where it was stopped, or where more distillations or learners are asked for.
    """
    set_threads(threads)
    where = device_named(device)
    from td3_fast.paper import CROSS, SAME_FORM
    from td3_fast.recipes import RECIPES, parse_size, recipe_named
    from td3_fast.table_files import PAGE, TABLE
    from td3_fast.tune import TuneConfig

    dataset = Path(data).name.split(".")[0] if dataset is None else dataset
    if table in ("faults", "all") and (improved or semantics != "paper"):
        which = "the table of faults is" if table == "faults" else "the tables together are"
        raise ValueError(f"{which} of the paper's method: leave --improved and --semantics out")
    if table == "5" and processes > 1:
        raise ValueError("table 5 measures one step at a time: leave --processes out")
    if table == "all" and size is not None:
        raise ValueError("--size is of one table: name that, or leave --size out")
    if other_learners is not None and (table != "4" or not improved):
        raise ValueError("--other-learners is of table 4, beside --improved: add these, or leave it out")
    if tune and table not in (*SAME_FORM, CROSS):
        raise ValueError("--tune is of tables 2, 3, 4 and 6: name one of these, or leave it out")
    if size is not None:
        size = "{}x{}".format(*parse_size(size))
    if recipe is None and dataset not in RECIPES:
        raise ValueError(
            f"no recipe is named {dataset!r}, as DATA is: say by --dataset whose data these are, or name a --recipe, "
            f"of {', '.join(RECIPES)}"
        )
    known = recipe_named(recipe or dataset)
    chosen = _all_of(dataset) if table == "all" else (table,)
    cells = {one: _cells(one, dataset, known, size, together=table == "all") for one in chosen}
    recipe_of = partial(
        recipe_for,
        known,
        semantics=semantics,
        improved=improved,
        other_learners=() if other_learners is None else names_in(other_learners),
        epochs=epochs,
        max_epochs=max_epochs,
    )
    # tables that share a pretrained learner need all that any of them needs
    recipe_of = partial(recipe_of, pool_items=any(recipe_of(one).pretrain.pool_items for one in chosen))
    minima = {
        "min_item_interactions": known.min_item_interactions,
        "min_user_interactions": known.min_user_interactions,
    }
    filters = {name: minimum for name, minimum in minima.items() if minimum}
    if out is None:
        folder = Path("results") / "-".join(["table", table, dataset, *([] if recipe is None else [recipe])])
    else:
        folder = out
    split = read_split(data, format=format, columns=columns, **filters)
    common: dict[str, Any] = {
        "split": split,
        "source": data,
        "filters": filters,
        "distillations": distillations,
        "seeds": seeds,
        "seed": seed,
        "device": where,
    }
    if tune:
        common["tune"] = TuneConfig()
    say(f"{split.interactions!r}; into {folder}")
    report = _Report(folder, dataset) if table == "all" else None
    places = dict.fromkeys(chosen, folder)
    if table == "all":
        places = {one: folder / f"table-{one}" for one in chosen}
    elif size is not None:
        places = {table: folder / size}  # beside the whole table, whose cells they are
    # of cells their own size is meant; that of the learners on the full data is the same in all tables
    common |= {"on_written": report.take} if report is not None else {}
    own = {
        one: common | {"recipe": recipe_of(one, size=size if one == "5" else None), "folder": places[one]}
        for one in chosen
    }
    with watching(go_on(without="--overwrite")) as watcher:
        works = {
            one: _work(cells[one], own[one], watcher, recipe_of=partial(recipe_of, one), shared=folder)
            for one in chosen
            if one != "5"
        }
        costs = _costs(dataset, own["5"], watcher) if "5" in chosen else None
        if overwrite:
            all_works: list[Reproduction | CostTable] = [*works.values(), *([costs] if costs else [])]
            for work in all_works:
                work.check_place()
            for work in all_works:
                work.clear()
            if report is not None:
                report.clear()
        with _ahead(list(works.values()), processes, watcher) as ahead:
            for one in chosen:
                say(f"\ntable {one}" + (f": {len(cells[one])} cells" if cells[one] else ""))
                if costs is not None and one == "5":
                    _make_costs(costs, watcher)
                else:
                    _make_cells(works[one], watcher, ahead)
                say(f"\nwritten: {places[one] / TABLE} and {places[one] / PAGE}")
    if report is not None:
        say(f"all tables together: {report.path}")


class _Report:
    """The page of several tables, written anew whenever one of them is; not while an older one shows more of them."""

    def __init__(self, folder: Path, dataset: str) -> None:
        self.path = folder / "report.html"
        self._shown = self.path.read_text(encoding="utf-8").count("<section ") if self.path.exists() else 0
        self._title = f"The tables of TD3 on {dataset}"
        self._sections: dict[str, Section] = {}

    def clear(self) -> None:
        """Of what older tables showed nothing is kept."""
        self.path.unlink(missing_ok=True)
        self._shown = 0

    def take(self, section: Section) -> None:
        """A table as it is now."""
        from td3_fast.files import write_text
        from td3_fast.reproduce_page import collection

        self._sections[section.title] = section
        if len(self._sections) >= self._shown:
            write_text(self.path, collection(self._title, list(self._sections.values())))


def _all_of(dataset: str) -> tuple[str, ...]:
    """The tables that can be made of these data."""
    from td3_fast.paper import tables

    one_size = (table for table in ALL if table in OF_ONE_SIZE)
    made = {table for table, datasets in tables().items() if dataset in datasets}.union(one_size)
    return tuple(table for table in ALL if table in made)


def _cells(table: str, dataset: str, recipe: Recipe, size: str | None, *, together: bool) -> Sequence[Cell]:
    """The cells of a table of qualities; `together` with the other tables, in one folder."""
    from td3_fast.faults import fault_cells
    from td3_fast.paper import cells_of, cross_cells, published_size

    if table not in OF_ONE_SIZE:
        return cells_of(table, dataset, size)
    if table == "5":
        return []
    config = recipe.distill
    own = f"{config.users}x{config.positions}"
    if table == "faults":
        # where the recipe is the paper's method, the other tables have its summaries
        same = together and recipe.as_published() == recipe
        return fault_cells(dataset, size or own, same_run_as="TD3" if same else None)
    return cross_cells(dataset, size or published_size(dataset) or own)


def recipe_for(
    known: Recipe,
    table: str,
    size: str | None = None,
    *,
    semantics: Literal["paper", "authors"],
    improved: bool,
    epochs: int | None,
    max_epochs: int | None,
    other_learners: tuple[str, ...] = (),
    pool_items: bool = False,
) -> Recipe:
    """The recipe of a table; size: of its summaries, which decides on what is improved."""
    from td3_fast.distill_config import with_semantics

    recipe = known if size is None else known.sized(size)
    if table == "faults":
        recipe = recipe.as_published()
    else:
        recipe = recipe.improved(other_learners=other_learners) if improved else recipe
        recipe = replace(recipe, distill=with_semantics(recipe.distill, semantics))
        recipe.distill.check_pretrained(recipe.learner_name)
        pool_items |= recipe.distill.item_embedding == "trained" and recipe.distill.start == "pool"
    if epochs is not None:
        recipe = replace(recipe, distill=replace(recipe.distill, epochs=epochs))
    if pool_items:
        recipe = replace(recipe, pretrain=replace(recipe.pretrain, pool_items=True))
    return recipe.fitted(max_epochs=max_epochs)


def _work(cells: Sequence[Cell], own: dict[str, Any], watcher: Watcher, **more: Any) -> Reproduction:
    from td3_fast.reproduce import Reproduction

    notes = _notes(cells[0])
    if "tune" in own:
        notes.append(
            "Learner rate, steps, targets and dropout on each summary were chosen on the validation part, those of "
            "other rows were not."
        )
    return Reproduction(cells=cells, notes=notes, watcher=watcher, **own, **more)


@contextmanager
def _ahead(works: Sequence[Reproduction], processes: int, watcher: Watcher) -> Iterator[Ahead | None]:
    """What makes the cells of all tables in `processes` processes; None for one, which is this."""
    import torch

    from td3_fast.side_by_side import Ahead

    if processes == 1:
        yield None
        return
    for work in works:
        work.check_place()
    threads = max(1, torch.get_num_threads() // processes)
    steps = [step for work in works for step in work.steps()]
    with Ahead(steps, processes=processes, threads=threads, watcher=watcher) as ahead:
        yield ahead


def _costs(dataset: str, own: dict[str, Any], watcher: Watcher) -> CostTable:
    from td3_fast.cost import CostTable
    from td3_fast.paper import published_costs

    return CostTable(dataset=dataset, published=published_costs(dataset), watcher=watcher, **own)


def _make_costs(work: CostTable, watcher: Watcher) -> None:
    from td3_fast.cost import in_words, speed_up

    costs = work.run(lambda step: watcher.say(f"step: {step[0]}, seed {step[1]}, number {step[2] + 1}"))
    watcher.progress("done", 1, 1, {})
    say()
    for cost in costs:
        memory = "" if cost.peak_memory_mib is None else f"{cost.peak_memory_mib:7.0f} MiB"
        paper = "" if cost.paper is None else f"  paper {duration(cost.paper[0])}, {cost.paper[1]:.0f} MB"
        say(f"{cost.operation:28} {in_words(cost):24}{memory}{paper}")
    faster = speed_up(costs)
    if faster is not None:
        say(f"a learner is trained {faster:.1f} times faster on the summary")


def _make_cells(work: Reproduction, watcher: Watcher, ahead: Ahead | None) -> None:
    figures = work.run(lambda cell: watcher.say(f"cell: {cell.label}"), ahead=ahead)
    watcher.progress("done", 1, 1, {})
    say()
    for figure in figures:
        if figure.protocol == "uni100" and figure.metric in ("HR@10", "NDCG@10"):
            say(_words(figure))
    for note in work.notes:
        say(f"\n{note}")


def _words(figure: Figure) -> str:
    words = f"{figure.cell.label:34} {figure.metric:8} {figure.mean:6.2f}"
    if figure.sd is not None:
        words += f" ± {figure.sd:.2f}"
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
