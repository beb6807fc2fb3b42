"""The command `td3-fast`. Nothing here but options, words and exit codes; torch is imported where work begins."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from td3_fast.cli_data import Columns, Data, Format, Seed, check_place, data_app
from td3_fast.cli_distill import distill
from td3_fast.cli_export import export
from td3_fast.cli_options import (
    BaselineRows,
    Device,
    LearnerName,
    MaxEpochs,
    MinItem,
    MinUser,
    Out,
    Overwrite,
    PretrainedFile,
    RecipeName,
    Rows,
    Seeds,
    Size,
    SummaryFile,
    Threads,
    chosen_filters,
    chosen_recipe,
    device_named,
    filters_of,
    go_on,
    names_in,
    print_rows,
    read_split,
    say_plan,
    say_tuned,
    set_threads,
    watching,
)
from td3_fast.cli_reproduce import reproduce
from td3_fast.cli_search import search
from td3_fast.terminal import console, guarded, say, settings

if TYPE_CHECKING:
    from td3_fast.distill_config import DistillConfig
    from td3_fast.recipes import Recipe

DEMO_FOLDER = Path("runs/demo")
DEMO_ROWS = ("summary", "full", "random", "longest", "zero-step")
# a file of any size takes the demo some minutes: so many examples are seen in one training run at most
DEMO_EXAMPLES = 1_000_000
DEMO_OUTER_STEPS = 200

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil the log of a recommender into a small summary that models can be trained on.",
)
app.add_typer(data_app, name="data")


def _say_version(wanted: bool) -> None:
    if not wanted:
        return
    import torch

    import td3_fast

    facts = td3_fast.ops.build_facts()
    kernels = "no compiled kernels"
    if facts is not None:
        kernels = f"kernels for {facts['instruction_sets'][0]}"
        if facts["cuda_architectures"]:
            kernels += f" and CUDA ({facts['cuda_architectures']})"
    say(f"td3_fast {td3_fast.__version__}, torch {torch.__version__}, {kernels}")
    raise typer.Exit


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_say_version,
            is_eager=True,
            help="Print the versions of td3_fast and torch, and what the kernels are built for.",
        ),
    ] = False,
) -> None:
    settings.tracebacks = traceback


@guarded
def evaluate(
    summary: SummaryFile,
    data: Data,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder for the results; that of SUMMARY if left out.")
    ] = None,
    learner: Annotated[
        str | None, typer.Option("--learner", help="The learner's class; the summary's own if left out.")
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Choose learner rate, steps and so on by the validation part, for the row summary."
        ),
    ] = False,
    seeds: Seeds = 3,
    rows: Rows = None,
    seed: Seed = 0,
    max_epochs: MaxEpochs = None,
    format: Format = None,
    columns: Columns = None,
    threads: Threads = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Train learners on SUMMARY and on the baselines, and score them on the test part of DATA.

    Leaves results.json and report.png in the folder.
    Finished runs are kept there: an evaluation that was stopped goes on where it was.

    With a learner of another class than SUMMARY was distilled for, unless others are named:
    the rows are summary, full, full+embeddings and zero-step,
    and the folder is one of that learner's name inside that of SUMMARY.
    """
    set_threads(threads)
    from td3_fast.evaluate import CROSS_ROWS, ROWS
    from td3_fast.evaluate_run import EvaluateRun
    from td3_fast.learners import learner_named
    from td3_fast.run_folder import RESULTS
    from td3_fast.summary import load_summary
    from td3_fast.tune import TuneConfig

    loaded = load_summary(summary).to(device_named(device))
    split = read_split(data, format=format, columns=columns, **filters_of(loaded))
    folder, default_rows = summary.parent, ROWS
    if learner is not None:
        learner = learner_named(learner)
        if loaded.metadata is not None and learner != loaded.metadata.training.learner:
            folder, default_rows = folder / learner.lower(), CROSS_ROWS
    folder = folder if out is None else out
    say(f"{split.interactions!r}; summary of {loaded.size}; results into {folder}")
    with watching(go_on(without="--overwrite")) as watcher:
        run = EvaluateRun(
            folder=folder,
            summary=loaded,
            split=split,
            source=data,
            seed=seed,
            rows=default_rows if rows is None else names_in(rows),
            seeds=seeds,
            learner=learner,
            max_epochs=max_epochs,
            tune=TuneConfig() if tune else None,
            watcher=watcher,
        )
        scored = run.evaluate(overwrite=overwrite)
        if tune:
            say_tuned(run.tried(), loaded)
    print_rows(scored)
    say(f"\nwritten: {folder / RESULTS}")


@guarded
def baselines(
    data: Data,
    out: Out,
    recipe: RecipeName = None,
    learner: LearnerName = None,
    size: Size = None,
    seeds: Seeds = 3,
    rows: BaselineRows = None,
    seed: Seed = 0,
    pretrained: PretrainedFile = None,
    max_epochs: MaxEpochs = None,
    min_item_interactions: MinItem = None,
    min_user_interactions: MinUser = None,
    format: Format = None,
    columns: Columns = None,
    threads: Threads = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Score what a summary of the given size has to beat.

    That is full data, random and longest users, popularity, and pretrained embeddings under an untrained encoder.
    """
    set_threads(threads)
    from td3_fast.evaluate import ROWS
    from td3_fast.run import Run
    from td3_fast.run_folder import RESULTS

    chosen = chosen_recipe(recipe, data, size, max_epochs, learner, pretrained)
    filters = chosen_filters(chosen, min_item_interactions, min_user_interactions)
    split = read_split(data, format=format, columns=columns, **filters)
    names = tuple(row for row in ROWS if row != "summary") if rows is None else names_in(rows)
    say(f"{split.interactions!r}; results into {out}")
    with watching(go_on(without="--overwrite")) as watcher:
        run = Run(
            folder=out,
            split=split,
            recipe=chosen,
            seed=seed,
            source=data,
            filters=filters,
            pretrained_from=pretrained,
            watcher=watcher,
            device=device_named(device),
        )
        scored = run.baselines(rows=names, seeds=seeds, overwrite=overwrite)
    print_rows(scored)
    say(f"\nwritten: {out / RESULTS}")


@guarded
def fit(
    summary: SummaryFile,
    learner: Annotated[
        str | None, typer.Option("--learner", help="The learner's class; the summary's own if left out.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The file for the trained learner.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps; as distilled for if left out.")
    ] = None,
    test: Annotated[str | None, typer.Option("--test", help="DATA to score the learner on.")] = None,
    tune: Annotated[
        str | None,
        typer.Option(
            "--tune", help="DATA by whose validation part learner rate, steps and so on are chosen."
        ),
    ] = None,
    seed: Seed = 0,
    format: Format = None,
    columns: Columns = None,
    threads: Threads = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Train a learner on SUMMARY: no interaction data are needed."""
    if tune is not None and steps is not None:
        raise ValueError("--tune chooses the number of steps: leave --steps out, or --tune")
    set_threads(threads)
    from td3_fast.checkpoint import save_learner
    from td3_fast.evaluate import learner_for
    from td3_fast.summary import load_summary

    if out is not None:
        check_place(out, overwrite=overwrite)
    loaded = load_summary(summary).to(device_named(device))
    tested = None
    if test is not None:
        tested = read_split(test, format=format, columns=columns, **filters_of(loaded))
        if loaded.metadata is not None:
            loaded.metadata.check_items(tested.interactions.item_ids.tolist())
    made = learner_for(loaded, name=learner, seed=seed)
    with watching("nothing is written") as watcher:
        more: dict[str, Any] = {} if steps is None else {"steps": steps}
        if tune is not None:
            from td3_fast.tune import tune as find

            split = read_split(tune, format=format, columns=columns, **filters_of(loaded))
            tried = find(loaded, split, learner=learner, seed=seed, progress=watcher.interruptible)
            say_tuned(tried, loaded)
            more = tried[0].options
        begun = time.perf_counter()
        losses = loaded.fit(made, seed=seed, progress=watcher.interruptible, **more)
        took = time.perf_counter() - begun
    say(
        f"{type(made).__name__} trained on a summary of {loaded.size} in {took:.1f} s: {len(losses)} steps, "
        f"inner loss {losses[0]:.4f} at first and {losses[-1]:.4f} at last"
    )
    if out is not None:
        save_learner(out, made, item_ids=loaded.metadata.item_ids if loaded.metadata else ())
        say(f"written: {out}")
    if tested is not None:
        from td3_fast.evaluate_run import score

        print_rows(score(made, tested, seed=seed))


@guarded
def info(summary: SummaryFile) -> None:
    """Say what a summary is, what it stands for and how it is used."""
    from td3_fast.summary import load_summary

    loaded = load_summary(summary)

    def plain(text: object) -> str:
        """Without what would steer the terminal: the file may be anybody's."""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    learned = sum(p.numel() for p in loaded.parameters())
    table.add_row(
        "summary", f"{loaded.num_users} users by {loaded.num_positions} positions, {loaded.normalize}"
    )
    shapes = ", ".join(
        f"{name.replace('_', ' ')} {' by '.join(map(str, factor.shape))}"
        for name, factor in zip(loaded.factor_names, loaded.factors, strict=True)
    )
    table.add_row("factors", f"{shapes}; {learned:,} numbers learned")
    table.add_row(
        "items", f"{loaded.num_items - 1:,} and padding, {loaded.item_factors.shape[1]} numbers each"
    )
    table.add_row("file", f"{summary.stat().st_size:,} bytes")
    metadata = loaded.metadata
    if metadata is not None:
        recipe, source = metadata.training, metadata.preprocessing
        table.add_row("data", plain(f"{source.data}, filters {source.filters or 'none'}"))
        table.add_row("fingerprint", plain(source.fingerprint))
        table.add_row(
            "training",
            plain(
                f"{recipe.learner}, {recipe.steps} steps of {recipe.batch_size} users, {recipe.optimiser}, rate "
                f"{recipe.learning_rate:g}, weight decay {recipe.weight_decay:g}, item table {recipe.item_embedding}"
            ),
        )
        table.add_row("learner", plain(", ".join(f"{k} {v}" for k, v in recipe.learner_config.items())))
        shown = [
            f"{name} {100 * value:.2f} %" for name, value in metadata.metrics.items() if name.endswith("@10")
        ]
        table.add_row("validation", plain(", ".join(shown)))
        settings = metadata.settings.get("distill")
        for name, value in settings.items() if isinstance(settings, dict) else ():
            table.add_row(f"  {plain(name)}", plain(value))
        versions = ", ".join(f"{name} {number}" for name, number in metadata.versions.items())
        table.add_row("versions", plain(versions))
    console.print(table, highlight=False, markup=False)


@guarded
def recipes() -> None:
    """List the named configurations."""
    from td3_fast.recipes import RECIPES

    table = Table(box=None, pad_edge=False)
    for name in ("recipe", "size", "rank", "learner", "epochs", "batch", "inner steps", "window", "filters"):
        table.add_column(name)
    for recipe in RECIPES.values():
        config, learner = recipe.distill, recipe.learner
        table.add_row(
            recipe.name,
            f"{config.users}x{config.positions}",
            str(config.user_rank),
            f"{recipe.learner_name}, {learner['hidden']} wide, {learner['max_len']} long",
            str(config.epochs),
            f"{config.batch_size:,}",
            str(config.inner_steps),
            str(config.window),
            f"{recipe.min_item_interactions} by item, {recipe.min_user_interactions} by user",
        )
    console.print(table, highlight=False)
    for recipe in filter(lambda recipe: recipe.larger, RECIPES.values()):
        changes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in recipe.larger.items())
        console.print(f"{recipe.name} of more than {recipe.distill.users} users: {changes}", highlight=False)


@guarded
def demo(
    data: Annotated[
        str, typer.Argument(help="A file or a name; the built-in data if left out.")
    ] = "synthetic",
    out: Annotated[
        Path | None,
        typer.Option("--out", help=f"The folder that everything goes into; {DEMO_FOLDER} if left out."),
    ] = None,
    seeds: Seeds = 3,
    seed: Seed = 0,
    format: Format = None,
    columns: Columns = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of torch.")] = 1,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace the run in the folder; without --out that is done anyway."),
    ] = False,
) -> None:
    """The whole path in some minutes, with small settings: pretrain, distil, evaluate.

    The figures show that it works; for figures to report, use a recipe with `distill` and `evaluate`.
    """
    set_threads(threads)
    from td3_fast.evaluate_run import EvaluateRun
    from td3_fast.recipes import recipe_named
    from td3_fast.run import Run
    from td3_fast.run_folder import REPORT, SUMMARY
    from td3_fast.summary import load_summary

    folder = DEMO_FOLDER if out is None else out
    recipe = recipe_named("synthetic")
    split = read_split(data, format=format, columns=columns)
    epochs = max(2, min(recipe.pretrain.fit.max_epochs, DEMO_EXAMPLES // max(len(split.train), 1)))
    recipe = replace(recipe.fitted(max_epochs=epochs), distill=_demo_config(recipe, len(split.train)))
    begun = time.perf_counter()
    say_plan(split, recipe, folder)
    command = shlex.join(["td3-fast", "evaluate", str(folder / SUMMARY), data, "--out", str(folder)])
    with watching("the same command starts anew, with the pretrained learner if it was finished") as watcher:
        run = Run(
            folder=folder,
            split=split,
            recipe=recipe,
            seed=seed,
            source=data,
            watcher=watcher,
            evaluation_seeds=seeds,
        )
        run.distill(overwrite=overwrite or out is None)
        rows = EvaluateRun(
            folder=folder,
            summary=load_summary(folder / SUMMARY),
            split=split,
            source=data,
            seed=seed,
            rows=DEMO_ROWS,
            seeds=seeds,
            watcher=watcher,
        ).evaluate()
    print_rows(rows)
    say(
        f"\n{time.perf_counter() - begun:.0f} s in all. The picture of it is {folder / REPORT}. Every baseline:"
    )
    say(f"  {command}")


def _demo_config(recipe: Recipe, num_examples: int) -> DistillConfig:
    """No more outer steps than for the built-in data, whatever the size of a file."""
    config = recipe.distill
    smallest = -(-num_examples * config.epochs // DEMO_OUTER_STEPS)
    return replace(config, batch_size=max(config.batch_size, smallest))


# in the order of the README
COMMANDS: tuple[Callable[..., None], ...] = (
    distill, evaluate, baselines, fit, export, search, reproduce, info, recipes, demo,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """The entry point of `td3-fast`."""
    app(prog_name="td3-fast")


if __name__ == "__main__":
    main()
