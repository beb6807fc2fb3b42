"""Options that several commands have, what they turn into, and how a command at work is watched and stopped."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from td3_fast.cli_data import parse_columns
from td3_fast.terminal import Display, Interrupted, Interrupts, console, say

if TYPE_CHECKING:
    import torch

    from td3_fast.data import Split
    from td3_fast.evaluate import Row
    from td3_fast.recipes import Recipe
    from td3_fast.run_folder import Watcher
    from td3_fast.summary import Summary
    from td3_fast.tune import Tried

FILTERS = ("min_item_interactions", "min_user_interactions", "filter_passes", "repeats")
DEFAULT_RECIPE = "ml-100k"

SummaryFile = Annotated[Path, typer.Argument(help="A summary.safetensors.", show_default=False)]
MaxEpochs = Annotated[
    int | None, typer.Option("--max-epochs", min=1, help="Most epochs of training on real data.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of torch; its own choice if left out.")
]
Device = Annotated[
    str, typer.Option("--device", help="Where it is computed: cpu, cuda, or cuda:1 for the second GPU.")
]
Out = Annotated[Path, typer.Option("--out", help="The folder that everything goes into.", show_default=False)]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="A name from `td3-fast recipes`; if left out, DATA's name up to its first dot where that is one, "
        f"else {DEFAULT_RECIPE}.",
    ),
]
LearnerName = Annotated[
    str | None, typer.Option("--learner", help="SASRec, GRU4Rec, NARM or BERT4Rec; SASRec if left out.")
]
Size = Annotated[
    str | None, typer.Option("--size", help="Synthetic users and positions of each, as in 50x50.")
]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Learners that are trained for each row.")]
Rows = Annotated[
    str | None,
    typer.Option(
        "--rows",
        help="Rows of the table, separated by commas: summary, full, random, random+embeddings, longest, "
        "longest+embeddings, popularity, zero-step (these if left out); also full+embeddings, hard, hard+embeddings.",
    ),
]
BaselineRows = Annotated[
    str | None,
    typer.Option(
        "--rows",
        help="Rows of the table, separated by commas: full, random, random+embeddings, longest, longest+embeddings, "
        "popularity, zero-step (these if left out); also full+embeddings.",
    ),
]
MinItem = Annotated[
    int | None,
    typer.Option(
        "--min-item-interactions", min=0, help="Leave out items with fewer interactions; by recipe."
    ),
]
MinUser = Annotated[
    int | None,
    typer.Option("--min-user-interactions", min=0, help="After that, leave out users with fewer; by recipe."),
]
PretrainedFile = Annotated[
    Path | None, typer.Option("--pretrained", help="A pretrained.safetensors of the same data to start from.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]


@contextmanager
def watching(when_stopped: str) -> Iterator[Watcher]:
    """Progress on the terminal; an interruption ends in the words `when_stopped`."""
    from td3_fast.run_folder import Stopped, Watcher

    with Display(console) as display:

        def announce() -> None:
            display.say("stopping after the step in progress; once more stops at once")

        with Interrupts(announce) as interrupts:
            watcher = Watcher(
                progress=display.progress, say=display.say, stop=lambda: bool(interrupts.requested)
            )
            try:
                yield watcher
            except (Stopped, KeyboardInterrupt):
                raise Interrupted(f"stopped; {when_stopped}") from None


def go_on(*, without: str | None = None, also: str | None = None) -> str:
    """The command that takes up what this one has begun."""
    words = [word for word in sys.argv[1:] if word != without]
    if also is not None and also not in words:
        words.append(also)
    program = ["td3-fast"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        program = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "td3_fast.cli"]
    return f"what is done is kept. Go on with:\n  {shlex.join([*program, *words])}"


def set_threads(threads: int | None) -> None:
    """Torch's threads, its own choice where None."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def device_named(name: str) -> torch.device:
    """A device that is here; of the GPUs, where torchrun has started several processes, each takes its own.

    Raises:
        ValueError: it is none, or not here.
    """
    import torch

    kind, _, number = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (":" in name and not number.isdecimal())):
        raise ValueError(f"--device takes cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: PyTorch {torch.__version__} sees no GPU here; leave it out")
    own = os.environ.get("LOCAL_RANK")
    if own is not None and device.index is not None:
        raise ValueError(f"--device {name}: under torchrun each process takes a GPU of its own, say cuda")
    index = int(own or "0") if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: GPU {index} is asked for, there are {torch.cuda.device_count()}")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def names_in(text: str) -> tuple[str, ...]:
    """The distinct names in "a, b"."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def filters_of(summary: Summary) -> dict[str, Any]:
    """The filters of the log that a summary was distilled from."""
    filters = {} if summary.metadata is None else summary.metadata.preprocessing.filters
    unknown = [name for name in filters if name not in FILTERS]
    if unknown:
        raise ValueError(
            f"the summary was distilled from data with the filter {unknown[0]!r}, which no command applies: read the "
            "data in Python"
        )
    return filters


def read_split(data: str, *, format: str | None, columns: str | None, **filters: Any) -> Split:
    """The parts of a file or of a data set known by name."""
    from td3_fast.data import leave_one_out, resolve

    extra: dict[str, Any] = {"format": format, "columns": parse_columns(columns)}
    log = resolve(data, **{name: value for name, value in extra.items() if value is not None}, **filters)
    return leave_one_out(log)


def chosen_recipe(
    name: str | None,
    data: str,
    size: str | None,
    max_epochs: int | None,
    learner: str | None,
    pretrained: Path | None,
) -> Recipe:
    """The recipe of that name, or that of the data; what else is given stands in the place of its own."""
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


def chosen_filters(recipe: Recipe, min_item: int | None, min_user: int | None) -> dict[str, Any]:
    """The filters of the log, by recipe where they are not given, as arguments of `read_split`."""
    filters = {
        "min_item_interactions": recipe.min_item_interactions if min_item is None else min_item,
        "min_user_interactions": recipe.min_user_interactions if min_user is None else min_user,
    }
    return {name: minimum for name, minimum in filters.items() if minimum}


def say_plan(split: Split, recipe: Recipe, folder: Path) -> None:
    """Say what a run is going to do."""
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
    if not log.timed:
        say(
            "          no times were found: sequences are in the order of the file (--columns timestamp=NAME)"
        )
    say(f"          {examples:,} training examples, {len(split.validation):,} users validated and tested")
    say(
        f"pretrain  {recipe.learner_name}, {recipe.learner['hidden']} wide, histories of {recipe.learner['max_len']}; "
        f"at most {fit.max_epochs} epochs of {-(-examples // fit.batch_size):,} batches"
    )
    if recipe.pretrain.ensemble:
        say(
            f"          after {recipe.pretrain.ensemble} others, which then teach it by their mean prediction"
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


def say_tuned(tried: Sequence[Tried], summary: Summary) -> None:
    """Say how learners are trained on a summary after a choice on validation data, beside its own options."""
    from td3_fast.report import in_percent

    chosen = tried[0].options
    steps, middle = chosen["steps"], chosen["middle_positions"]
    with_dropout = "with dropout" if chosen["dropout"] else "without dropout"
    targets = f"{1 + middle * chosen['augmentation']} targets of each user"
    say(f"tuned: learner rate {chosen['learning_rate']:g}, {steps} steps, {targets}, {with_dropout}")

    def figure(entry: Tried) -> str:
        return f"{in_percent(entry.metrics['NDCG@10'], runs=entry.learners)} %"

    own = None if summary.metadata is None else summary.metadata.training.fit_options()
    beside = next((f", the summary's own {figure(entry)}" for entry in tried if entry.options == own), "")
    say(f"       validation NDCG@10 (uni100) of {tried[0].learners} learners {figure(tried[0])}{beside}")


def print_rows(rows: list[Row]) -> None:
    """Print the tables of an evaluation."""
    from td3_fast.report import results_tables

    for table in results_tables(rows):
        say()
        console.print(table, highlight=False, markup=False)
