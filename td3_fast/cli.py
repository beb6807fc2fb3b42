"""The command `td3-fast`. Nothing here but options, words and exit codes; torch is imported where work begins."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from td3_fast.cli_data import Columns, Data, Format, Seed, data_app, parse_bytes
from td3_fast.cli_export import export
from td3_fast.cli_options import (
    Device,
    MaxEpochs,
    Overwrite,
    SummaryFile,
    Threads,
    device_named,
    filters_of,
    go_on,
    names_in,
    read_split,
    set_threads,
    watching,
)
from td3_fast.cli_reproduce import reproduce
from td3_fast.cli_search import search
from td3_fast.terminal import Interrupted, Interrupts, console, fail, guarded, say, settings

if TYPE_CHECKING:
    from td3_fast.data import Split
    from td3_fast.distill_config import DistillConfig
    from td3_fast.evaluate import Row
    from td3_fast.parallel import Ranks
    from td3_fast.recipes import Recipe
    from td3_fast.run import Watcher

DEFAULT_RECIPE = "ml-100k"
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
app.command()(export)
app.command()(search)
app.command()(reproduce)


@app.callback()
def options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
) -> None:
    settings.tracebacks = traceback


@contextmanager
def _processes(item_shards: int, device: str) -> Iterator[Ranks]:
    """Those that torchrun started, connected for tensors on `device`; else this one alone."""
    from td3_fast.parallel import ALONE, is_launched, join

    if is_launched(os.environ):
        with join(item_shards=item_shards, device=device) as ranks:
            yield ranks
    elif item_shards == 1:
        yield ALONE
    else:
        raise ValueError(
            f"--item-shards {item_shards} needs as many processes: start with torchrun --nproc-per-node "
            f"{item_shards} -m td3_fast.cli"
        )


@contextmanager
def _taking_part(when_stopped: str, ranks: Ranks) -> Iterator[Watcher]:
    """`watching` in the first of several processes, silence in the others; a lost one is an error with a way on."""
    from td3_fast.parallel import LostRank
    from td3_fast.run import Stopped, Watcher

    with watching(when_stopped) if ranks.first else Interrupts(lambda: None) as watched:
        try:
            yield watched if isinstance(watched, Watcher) else Watcher(stop=lambda: watched.requested)
        except LostRank as error:
            # said here, where the SIGTERM that torchrun sends next is only taken note of
            fail(f"error: {error}; {when_stopped}", 2)
        except (Stopped, KeyboardInterrupt):
            if ranks.first:
                raise
            raise Interrupted("stopped") from None


Out = Annotated[Path, typer.Option("--out", help="The folder that everything goes into.", show_default=False)]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", help=f"A name from `td3-fast recipes`; that of DATA, or {DEFAULT_RECIPE}."),
]
LearnerName = Annotated[
    str | None, typer.Option("--learner", help="SASRec, GRU4Rec, NARM or BERT4Rec; SASRec if left out.")
]
Size = Annotated[
    str | None, typer.Option("--size", help="Synthetic users and positions of each, as in 50x50.")
]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Learners that are trained for each row.")]
Rows = Annotated[
    str | None, typer.Option("--rows", help="Rows of the table, separated by commas; all if left out.")
]
MinItem = Annotated[
    int | None, typer.Option("--min-item-interactions", min=0, help="Leave out rarer items; by recipe.")
]
MinUser = Annotated[
    int | None,
    typer.Option("--min-user-interactions", min=0, help="Then leave out users with less; by recipe."),
]
PretrainedFile = Annotated[
    Path | None, typer.Option("--pretrained", help="A pretrained.safetensors of the same data to start from.")
]


@app.command()
@guarded
def distill(
    data: Data,
    out: Out,
    recipe: RecipeName = None,
    learner: LearnerName = None,
    size: Size = None,
    seed: Seed = 0,
    improved: Annotated[
        bool,
        typer.Option(
            "--improved",
            help="Beyond the paper: frozen table, fresh starts, factors from sequences, choice on the full ranking.",
        ),
    ] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the real examples.")] = None,
    item_embedding: Annotated[
        Literal["frozen", "trained"] | None, typer.Option(help="Whether learners' item tables move.")
    ] = None,
    item_dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="How a frozen table is kept while distilling, and in the summary."),
    ] = None,
    semantics: Annotated[
        Literal["paper", "authors"], typer.Option(help="The paper's method, or its released program's.")
    ] = "paper",
    engine: Annotated[
        Literal["native", "higher"] | None, typer.Option(help="What differentiates the inner loop.")
    ] = None,
    window_kind: Annotated[
        Literal["random", "fixed", "full"] | None, typer.Option(help="Where the differentiated steps lie.")
    ] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Differentiated inner steps.")] = None,
    inner_steps: Annotated[int | None, typer.Option(min=1, help="Inner steps at most.")] = None,
    growth_limit: Annotated[
        float | None,
        typer.Option(help="Cuts a window short where the gradient has grown so many times on its way back."),
    ] = None,
    start: Annotated[
        Literal["pool", "fresh"] | None,
        typer.Option(help="Learners of the outer steps: checkpoints of pretraining, or encoders drawn anew."),
    ] = None,
    initial: Annotated[
        Literal["noise", "sequences"] | None,
        typer.Option(help="Factors to start from: noise, or those of sequences of real users."),
    ] = None,
    selection: Annotated[
        Literal["full", "uni100"] | None, typer.Option(help="Protocol that chooses the best summary.")
    ] = None,
    criterion: Annotated[
        Literal["MRR@10", "cross_entropy"] | None,
        typer.Option(help="Validation figure that chooses it; cross-entropy is the less noisy one."),
    ] = None,
    validation_runs: Annotated[
        int | None, typer.Option(min=1, help="Learners trained and averaged for that choice.")
    ] = None,
    no_alignment: Annotated[bool, typer.Option("--no-alignment", help="No feature space alignment.")] = False,
    no_augmentation: Annotated[
        bool, typer.Option("--no-augmentation", help="No middle position in the inner loss.")
    ] = False,
    middle_positions: Annotated[
        int | None, typer.Option(min=1, help="Middle positions of a user in the inner loss of a step.")
    ] = None,
    no_inner_dropout: Annotated[
        bool,
        typer.Option("--no-inner-dropout", help="No dropout in training on the summary, then and later."),
    ] = False,
    normalize: Annotated[
        Literal["softmax", "none"] | None, typer.Option(help="How the summary becomes a distribution.")
    ] = None,
    summary: Annotated[
        Literal["tucker", "farzi"],
        typer.Option(help="The kind of summary: TD3's, or the one it compares with."),
    ] = "tucker",
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Of user and position factors; of a Farzi summary, its latent space's."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Real examples per outer step.")] = None,
    users_per_step: Annotated[int | None, typer.Option(min=1, help="Synthetic users per inner step.")] = None,
    trajectories: Annotated[
        int | None, typer.Option(min=1, help="Learners per outer step, whose gradients are averaged.")
    ] = None,
    summary_lr: Annotated[float | None, typer.Option(help="Rate of the outer optimiser.")] = None,
    learner_lr: Annotated[float | None, typer.Option(help="Rate of the inner optimiser.")] = None,
    loss: Annotated[
        Literal["full", "sampled"] | None,
        typer.Option(
            help="Pretraining's softmax: over all items, or over some that are drawn for each batch."
        ),
    ] = None,
    num_sampled: Annotated[
        int | None, typer.Option(min=1, help="Items drawn for each batch of a sampled loss.")
    ] = None,
    proposal: Annotated[
        Literal["unigram", "log-uniform"] | None, typer.Option(help="What they are drawn from.")
    ] = None,
    optimiser: Annotated[
        Literal["adam", "lazy-adam"] | None,
        typer.Option(help="Pretraining's; lazy-adam leaves alone items that a batch does not meet."),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option("--memory-limit", help="Of distilling, above data and libraries, as in 2GiB or 512MiB."),
    ] = None,
    pretrained: PretrainedFile = None,
    max_epochs: MaxEpochs = None,
    min_item_interactions: MinItem = None,
    min_user_interactions: MinUser = None,
    format: Format = None,
    columns: Columns = None,
    threads: Threads = None,
    device: Device = "cpu",
    item_shards: Annotated[
        int, typer.Option(min=1, help="Processes that an item table is split over, under torchrun.")
    ] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Pretrain a learner on DATA and distil DATA into a summary.

    Leaves summary.safetensors, pretrained.safetensors, results.json, log.jsonl and report.png in the folder. Under
    torchrun, with `-m td3_fast.cli` for the program, processes share out the real examples of each outer step, or hold
    an item table among them; a restart goes on by itself.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        resume, overwrite = True, False
    set_threads(threads)
    where = device_named(device)
    from td3_fast.distill_config import with_semantics
    from td3_fast.run import SUMMARY, Run, check_free

    chosen = _recipe(recipe, data, size, max_epochs, learner, pretrained)
    chosen = chosen.fitted(loss=loss, num_sampled=num_sampled, proposal=proposal, optimiser=optimiser)
    if improved:
        chosen = chosen.improved(inner_steps=inner_steps, batch_size=batch_size)
    changes: dict[str, Any] = {
        "item_dtype": item_dtype,
        "epochs": epochs,
        "engine": engine,
        "window_kind": window_kind,
        "window": window,
        "inner_steps": inner_steps,
        "growth_limit": growth_limit,
        "start": start,
        "initial": initial,
        "selection": selection,
        "criterion": criterion,
        "validation_runs": validation_runs,
        "alignment": 0.0 if no_alignment else None,
        "augmentation": False if no_augmentation else None,
        "middle_positions": middle_positions,
        "inner_dropout": False if no_inner_dropout else None,
        "normalize": normalize,
        "summary": summary,
        **dict.fromkeys(("latent_rank",) if summary == "farzi" else ("user_rank", "position_rank"), rank),
        "batch_size": batch_size,
        "users_per_step": users_per_step,
        "trajectories": trajectories,
        "memory_limit": None if memory_limit is None else parse_bytes(memory_limit),
        "summary_lr": summary_lr,
        "learner_lr": learner_lr,
    }
    config = with_semantics(chosen.distill, semantics)
    if item_embedding is not None:
        changes["item_embedding"] = item_embedding
    config = replace(config, **{name: value for name, value in changes.items() if value is not None})
    chosen = replace(chosen, distill=config)
    if config.item_embedding == "trained" and config.start == "pool":
        chosen = replace(chosen, pretrain=replace(chosen.pretrain, pool_items=True))
    filters = _filters(chosen, min_item_interactions, min_user_interactions)
    way_on = go_on(without="--overwrite", also="--resume")
    with _processes(item_shards, str(where)) as ranks:
        if ranks.first:
            check_free(out, resume=resume, overwrite=overwrite)
        split = read_split(data, format=format, columns=columns, **filters)
        if ranks.first:
            _plan(split, chosen, out)
            if config.engine == "native" and ranks.items.size == 1:
                _plan_of_memory(split, chosen, pretrained)
        with _taking_part(way_on, ranks) as watcher:
            run = Run(
                folder=out,
                split=split,
                recipe=chosen,
                seed=seed,
                source=data,
                filters=filters,
                pretrained_from=pretrained,
                watcher=watcher,
                ranks=ranks,
                device=where,
            )
            rows = run.distill(resume=resume, overwrite=overwrite)
    if not ranks.first:
        return
    _print_rows(rows)
    say(f"\n{out / SUMMARY} is the summary. All baselines beside it:")
    say(f"  {shlex.join(['td3-fast', 'evaluate', str(out / SUMMARY), data, '--out', str(out)])}")


@app.command()
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

    Leaves results.json and report.png in the folder. Finished runs are kept there, so that an evaluation that was
    stopped goes on where it was. A learner of another class than SUMMARY was distilled for has the rows summary, full,
    full+embeddings and zero-step, and a folder of its own inside that of SUMMARY, unless others are named.
    """
    set_threads(threads)
    from td3_fast.evaluate import CROSS_ROWS, ROWS
    from td3_fast.learners import learner_named
    from td3_fast.run import RESULTS, EvaluateRun
    from td3_fast.summary import load_summary

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
            watcher=watcher,
        )
        scored = run.evaluate(overwrite=overwrite)
    _print_rows(scored)
    say(f"\nwritten: {folder / RESULTS}")


@app.command()
@guarded
def baselines(
    data: Data,
    out: Out,
    recipe: RecipeName = None,
    learner: LearnerName = None,
    size: Size = None,
    seeds: Seeds = 3,
    rows: Rows = None,
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
    """Score what a summary of the given size has to beat: full data, random and longest users, popularity, and
    pretrained embeddings under an untrained encoder."""
    set_threads(threads)
    from td3_fast.evaluate import ROWS
    from td3_fast.run import RESULTS, Run

    chosen = _recipe(recipe, data, size, max_epochs, learner, pretrained)
    filters = _filters(chosen, min_item_interactions, min_user_interactions)
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
    _print_rows(scored)
    say(f"\nwritten: {out / RESULTS}")


@app.command()
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
    seed: Seed = 0,
    format: Format = None,
    columns: Columns = None,
    threads: Threads = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Train a learner on SUMMARY: no interaction data are needed."""
    set_threads(threads)
    from td3_fast.checkpoint import save_learner
    from td3_fast.evaluate import teacher_of
    from td3_fast.summary import load_summary

    if out is not None and out.exists() and not overwrite:
        raise ValueError(f"{out} exists: choose another file, or --overwrite")
    loaded = load_summary(summary).to(device_named(device))
    made = teacher_of(loaded, name=learner, seed=seed)
    begun = time.perf_counter()
    with watching("nothing is written") as watcher:
        more = {} if steps is None else {"steps": steps}
        losses = loaded.fit(made, seed=seed, progress=watcher.interruptible, **more)
    took = time.perf_counter() - begun
    say(
        f"{type(made).__name__} trained on a summary of {loaded.size} in {took:.1f} s: {len(losses)} steps, "
        f"inner loss {losses[0]:.4f} at first and {losses[-1]:.4f} at last"
    )
    if out is not None:
        save_learner(out, made, item_ids=loaded.metadata.item_ids if loaded.metadata else ())
        say(f"written: {out}")
    if test is not None:
        from td3_fast.run import score

        split = read_split(test, format=format, columns=columns, **filters_of(loaded))
        if loaded.metadata is not None:
            loaded.metadata.check_items(split.interactions.item_ids.tolist())
        _print_rows(score(made, split, seed=seed))


@app.command()
@guarded
def info(summary: SummaryFile) -> None:
    """Say what a summary is, what it stands for and how it is used."""
    from td3_fast.summary import load_summary

    loaded = load_summary(summary)
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
        table.add_row("data", f"{source.data}, filters {source.filters or 'none'}")
        table.add_row("fingerprint", source.fingerprint)
        table.add_row(
            "training",
            f"{recipe.learner}, {recipe.steps} steps of {recipe.batch_size} users, {recipe.optimiser}, rate "
            f"{recipe.learning_rate:g}, weight decay {recipe.weight_decay:g}, item table {recipe.item_embedding}",
        )
        table.add_row("learner", ", ".join(f"{k} {v}" for k, v in recipe.learner_config.items()))
        shown = [
            f"{name} {100 * value:.2f} %" for name, value in metadata.metrics.items() if name.endswith("@10")
        ]
        table.add_row("validation", ", ".join(shown))
        for name, value in metadata.settings.get("distill", {}).items():
            table.add_row(f"  {name}", str(value))
        table.add_row("versions", ", ".join(f"{name} {number}" for name, number in metadata.versions.items()))
    console.print(table, highlight=False, markup=False)


@app.command()
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


@app.command()
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
    overwrite: Overwrite = False,
) -> None:
    """The whole path in some minutes, with small settings: pretrain, distil, evaluate.

    The figures show that it works; for figures to report, use a recipe with `distill` and `evaluate`.
    """
    set_threads(threads)
    from td3_fast.recipes import recipe_named
    from td3_fast.run import REPORT, SUMMARY, EvaluateRun, Run
    from td3_fast.summary import load_summary

    folder = DEMO_FOLDER if out is None else out
    recipe = recipe_named("synthetic")
    split = read_split(data, format=format, columns=columns)
    epochs = max(2, min(recipe.pretrain.fit.max_epochs, DEMO_EXAMPLES // max(len(split.train), 1)))
    recipe = replace(recipe.fitted(max_epochs=epochs), distill=_demo_config(recipe, len(split.train)))
    begun = time.perf_counter()
    _plan(split, recipe, folder)
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
    _print_rows(rows)
    say(
        f"\n{time.perf_counter() - begun:.0f} s in all. The picture of it is {folder / REPORT}. Every baseline:"
    )
    say(f"  {command}")


def _demo_config(recipe: Recipe, num_examples: int) -> DistillConfig:
    """No more outer steps than for the built-in data, whatever the size of a file."""
    config = recipe.distill
    smallest = -(-num_examples * config.epochs // DEMO_OUTER_STEPS)
    return replace(config, batch_size=max(config.batch_size, smallest))


def _recipe(
    name: str | None,
    data: str,
    size: str | None,
    max_epochs: int | None,
    learner: str | None,
    pretrained: Path | None,
) -> Recipe:
    from td3_fast.recipes import RECIPES, recipe_named

    if name is None:
        name = Path(data).name.split(".")[0]
        name = name if name in RECIPES else DEFAULT_RECIPE
    recipe = recipe_named(name)
    if learner is not None:
        if pretrained is not None:
            raise ValueError("--learner and --pretrained exclude each other: the file says whose it is")
        recipe = recipe.with_learner(learner)
    if size is not None:
        recipe = recipe.sized(size)
    return recipe.fitted(max_epochs=max_epochs)


def _filters(recipe: Recipe, min_item: int | None, min_user: int | None) -> dict[str, Any]:
    filters = {
        "min_item_interactions": recipe.min_item_interactions if min_item is None else min_item,
        "min_user_interactions": recipe.min_user_interactions if min_user is None else min_user,
    }
    return {name: minimum for name, minimum in filters.items() if minimum}


def _plan(split: Split, recipe: Recipe, folder: Path) -> None:
    config, fit = recipe.distill, recipe.pretrain.fit
    log, examples = split.interactions, len(split.train)
    steps = -(-examples // config.batch_size)
    first = config.inner_steps if config.window_kind != "random" else config.window
    inner = f"{first} to {config.inner_steps}" if first != config.inner_steps else str(first)
    window = config.inner_steps if config.window_kind == "full" else config.window
    say(
        f"data      {log.name}: {log.num_users:,} users, {log.num_items - 1:,} items, "
        f"{log.num_interactions:,} interactions"
    )
    say(f"          {examples:,} training examples, {len(split.validation):,} users validated and tested")
    say(
        f"pretrain  {recipe.learner_name}, {recipe.learner['hidden']} wide, histories of {recipe.learner['max_len']}; "
        f"at most {fit.max_epochs} epochs of {-(-examples // fit.batch_size):,} batches"
    )
    if fit.loss == "sampled":
        say(
            f"          softmax over {fit.num_sampled:,} items drawn for each batch ({fit.proposal}), {fit.optimiser}"
        )
    kind = f"ranks {config.user_rank} and {config.position_rank}"
    if config.summary == "farzi":
        kind = f"Farzi, rank {config.latent_rank}"
    say(
        f"distil    {config.users} users by {config.positions} positions, {kind}; "
        f"{config.epochs} epochs of {steps:,} outer steps"
    )
    learners = f", by each of {config.trajectories} learners" if config.trajectories > 1 else ""
    say(
        f"          {inner} inner steps in each{learners}, the last {window} differentiated; "
        f"item table {config.item_embedding}"
        + (f", {config.item_dtype}" if config.item_embedding == "frozen" else "")
    )
    say(f"into      {folder}, by the recipe {recipe.name}")


def _plan_of_memory(split: Split, recipe: Recipe, pretrained: Path | None) -> None:
    """Say what distilling will take; MemoryLimitError where it does not fit."""
    from td3_fast.checkpoint import load_pretrained
    from td3_fast.memory import plan_memory

    if pretrained is not None:
        made, _ = load_pretrained(pretrained)
        name, sizes, pool = made.learner_name, made.learner_config, len(made.pool)
        del made
    else:
        name, sizes = recipe.learner_name, {**recipe.learner, "num_items": split.interactions.num_items}
        pool = recipe.pretrain.pool_size
    plan = plan_memory(split, recipe.distill, learner_name=name, learner_config=sizes, pool=pool)
    first, *others = plan.lines()
    say(f"memory    {first}")
    for line in others:
        say(f"          {line}")


def _print_rows(rows: list[Row]) -> None:
    from td3_fast.report import results_tables

    for table in results_tables(rows):
        say()
        console.print(table, highlight=False, markup=False)


def main() -> None:
    """The entry point of `td3-fast`."""
    app(prog_name="td3-fast")


if __name__ == "__main__":
    main()
