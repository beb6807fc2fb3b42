"""The command `td3-fast distill`, alone or in one of several processes."""

from __future__ import annotations

import importlib.util
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from td3_fast.cli_data import Columns, Data, Format, Seed, parse_bytes
from td3_fast.cli_options import (
    Device,
    LearnerName,
    MaxEpochs,
    MinItem,
    MinUser,
    Out,
    Overwrite,
    PretrainedFile,
    RecipeName,
    Size,
    Threads,
    chosen_filters,
    chosen_recipe,
    device_named,
    go_on,
    names_in,
    print_rows,
    read_split,
    say_plan,
    set_threads,
    watching,
)
from td3_fast.terminal import Interrupted, Interrupts, fail, guarded, say

if TYPE_CHECKING:
    from td3_fast.data import Split
    from td3_fast.parallel import Ranks
    from td3_fast.recipes import Recipe
    from td3_fast.run_folder import Watcher


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
    from td3_fast.run_folder import Stopped, Watcher

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
            help="Beyond the paper: frozen table, fresh starts, factors from sequences, choice on the full "
            "ranking among the later epochs.",
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
    other_learners: Annotated[
        str | None,
        typer.Option(
            "--other-learners",
            help="Classes of learners, separated by commas, that take turns with the pretrained one's in the outer "
            "steps, for a summary that serves them too.",
        ),
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
        typer.Option(help="Validation figure that chooses the best epoch."),
    ] = None,
    validation_runs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Learners trained and averaged for that choice, one of each class at least."
        ),
    ] = None,
    selection_start: Annotated[
        float | None,
        typer.Option(help="Share of the epochs after which the best is looked for, as in 0.5."),
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
        typer.Option(
            min=1,
            help="Rank of user and position factors; of a Farzi summary, the width of its latent space.",
        ),
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
        Literal["unigram", "log-uniform"] | None,
        typer.Option(help="How the items of a sampled loss are drawn."),
    ] = None,
    optimiser: Annotated[
        Literal["adam", "lazy-adam"] | None,
        typer.Option(help="Pretraining's; lazy-adam leaves alone items that a batch does not meet."),
    ] = None,
    ensemble: Annotated[
        int,
        typer.Option(
            min=0,
            help="Learners that are pretrained first and teach the one of the summary, by their mean prediction.",
        ),
    ] = 0,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            "--memory-limit", help="Most memory of distilling, beyond data and libraries, as in 2GiB."
        ),
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

    Leaves summary.safetensors, pretrained.safetensors, results.json, log.jsonl and report.png in the folder.

    Under torchrun, with `-m td3_fast.cli` for the program, several processes work on one run:
    they share out the learners or real examples of each outer step, or hold an item table among them.
    A restart goes on by itself.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        resume, overwrite = True, False
    set_threads(threads)
    where = device_named(device)
    from td3_fast.distill_config import with_semantics
    from td3_fast.ensemble import check_taught
    from td3_fast.learners import LEARNERS
    from td3_fast.run import Run
    from td3_fast.run_folder import SUMMARY, check_free

    chosen = chosen_recipe(recipe, data, size, max_epochs, learner, pretrained)
    of_pretraining = {"loss": loss, "num_sampled": num_sampled, "proposal": proposal, "optimiser": optimiser}
    if pretrained is not None:
        for name, value in of_pretraining.items():
            if value is not None:
                word = name.replace("_", "-")
                raise ValueError(
                    f"--{word} and --pretrained exclude each other: the file's learner is trained"
                )
    chosen = chosen.fitted(**of_pretraining)
    if chosen.pretrain.fit.loss == "full" and (num_sampled is not None or proposal is not None):
        raise ValueError("--num-sampled and --proposal are of a sampled loss: add --loss sampled")
    if engine == "higher" and importlib.util.find_spec("higher") is None:
        raise ValueError("--engine higher needs the package higher: `pip install higher`")
    if ensemble:
        if pretrained is not None:
            raise ValueError("--ensemble and --pretrained exclude each other: the file's learner is trained")
        if chosen.pretrain.fit.loss == "sampled":
            raise ValueError(
                "--ensemble teaches all items: give --loss full --optimiser adam, or leave it out"
            )
        check_taught(LEARNERS[chosen.learner_name][0])
        chosen = replace(chosen, pretrain=replace(chosen.pretrain, ensemble=ensemble))
    others = None if other_learners is None else names_in(other_learners)
    if improved:
        chosen = chosen.improved(inner_steps=inner_steps, batch_size=batch_size, other_learners=others or ())
    changes: dict[str, Any] = {
        "item_dtype": item_dtype,
        "epochs": epochs,
        "engine": engine,
        "window_kind": window_kind,
        "window": window,
        "inner_steps": inner_steps,
        "growth_limit": growth_limit,
        "start": start,
        "other_learners": others,
        "initial": initial,
        "selection": selection,
        "criterion": criterion,
        "validation_runs": validation_runs,
        "selection_start": selection_start,
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
    config.check_pretrained(chosen.learner_name)
    chosen = replace(chosen, distill=config)
    if config.item_embedding == "trained" and config.start == "pool":
        chosen = replace(chosen, pretrain=replace(chosen.pretrain, pool_items=True))
    filters = chosen_filters(chosen, min_item_interactions, min_user_interactions)
    way_on = go_on(without="--overwrite", also="--resume")
    with _processes(item_shards, str(where)) as ranks:
        if ranks.first:
            check_free(out, resume=resume, overwrite=overwrite)
        split = read_split(data, format=format, columns=columns, **filters)
        if ranks.first:
            say_plan(split, chosen, out)
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
    print_rows(rows)
    say(f"\n{out / SUMMARY} is the summary. All baselines beside it:")
    say(f"  {shlex.join(['td3-fast', 'evaluate', str(out / SUMMARY), data, '--out', str(out)])}")


def _plan_of_memory(split: Split, recipe: Recipe, pretrained: Path | None) -> None:
    """Say what distilling will take; MemoryLimitError where it does not fit."""
    from td3_fast.checkpoint import describe_pretrained
    from td3_fast.memory import plan_memory

    if pretrained is not None:
        name, sizes, pool, _ = describe_pretrained(pretrained)
    else:
        name, sizes = recipe.learner_name, {**recipe.learner, "num_items": split.interactions.num_items}
        pool = recipe.pretrain.pool_size
    plan = plan_memory(split, recipe.distill, learner_name=name, learner_config=sizes, pool=pool)
    first, *others = plan.lines()
    say(f"memory    {first}")
    for line in others:
        say(f"          {line}")
