"""The command `td3-fast search`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from td3_fast.cli_data import Columns, Data, Format, Seed
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
from td3_fast.terminal import console, duration, guarded, say

if TYPE_CHECKING:
    from td3_fast.search import Agreement, RankBy

Metric = Literal["HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR@5", "MRR@10", "MRR@20"]


@guarded
def search(
    summary: SummaryFile,
    data: Data,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder; `search` in that of SUMMARY if left out.")
    ] = None,
    learners: Annotated[
        str | None, typer.Option("--learners", help="Architectures, separated by commas; all if left out.")
    ] = None,
    widths: Annotated[
        str | None, typer.Option("--widths", help="Of item tables; SUMMARY's and half of it if left out.")
    ] = None,
    depths: Annotated[str | None, typer.Option("--depths", help="Layers; 1,2 if left out.")] = None,
    dropouts: Annotated[
        str | None, typer.Option("--dropouts", help="Rates at the inputs; 0.2,0.5 if left out.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Learners on the summary for each candidate.")] = 3,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps on the summary; as distilled for if left out.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Train each candidate on all data as well.")] = False,
    full_seeds: Annotated[
        int | None, typer.Option(min=1, help="Learners on all data for each candidate, with --full: 1.")
    ] = None,
    start: Annotated[
        Literal["nothing", "pretrained"],
        typer.Option(help="Of learners on the summary: all is learned, or with SUMMARY's pretrained tables."),
    ] = "nothing",
    protocol: Annotated[
        Literal["full", "uni100"], typer.Option(help="Of the figure that candidates are ranked by.")
    ] = "uni100",
    metric: Annotated[Metric, typer.Option(help="That figure.")] = "NDCG@10",
    rank_by: Annotated[
        Literal["metric", "loss"],
        typer.Option(help="Of training on the summary: that figure, or the mean of its loss over all steps."),
    ] = "metric",
    seed: Seed = 0,
    max_epochs: MaxEpochs = None,
    format: Format = None,
    columns: Columns = None,
    threads: Threads = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Choose a model by training candidates on SUMMARY and ranking them on the validation part of DATA.

    The candidates are all combinations of architecture, width of the item table, depth and dropout.
    They are trained from nothing, as on the data, and with their dropout even on a summary distilled without.

    With --full each is trained on all data too, which says how far the choice can be trusted:
    Kendall's tau of the two orders, what the chosen one lacks to the best one, and both times.

    Finished trials are kept beside results.json.
    A search that was stopped, or is given more candidates or seeds, goes on where it was.
    """
    if full_seeds is not None and not full:
        raise ValueError("--full-seeds is of --full, which trains the candidates on all data: give both")
    set_threads(threads)
    from td3_fast.evaluate_run import fit_config_of
    from td3_fast.run_folder import RESULTS
    from td3_fast.search import SearchConfig, agreement, grid
    from td3_fast.search_run import SearchRun, search_table
    from td3_fast.summary import load_summary

    loaded = load_summary(summary).to(device_named(device))
    axes: dict[str, Any] = {
        "learners": None if learners is None else names_in(learners),
        "widths": _numbers(widths, int, "--widths"),
        "depths": _numbers(depths, int, "--depths"),
        "dropouts": _numbers(dropouts, float, "--dropouts"),
    }
    candidates = grid(
        loaded, **{name: values for name, values in axes.items() if values is not None}, start=start
    )
    fit = fit_config_of(loaded)
    if max_epochs is not None:
        fit = replace(fit, max_epochs=max_epochs)
    config = SearchConfig(
        seeds=seeds,
        full_seeds=(full_seeds or 1) if full else 0,
        protocol=protocol,
        metric=metric,
        rank_by=rank_by,
        steps=steps,
        start=start,
        fit=fit,
    )
    split = read_split(data, format=format, columns=columns, **filters_of(loaded))
    folder = summary.parent / "search" if out is None else out
    say(f"{split.interactions!r}; summary of {loaded.size}; {len(candidates)} candidates; into {folder}")
    with watching(go_on(without="--overwrite")) as watcher:
        run = SearchRun(
            folder=folder,
            summary=loaded,
            split=split,
            source=data,
            candidates=candidates,
            config=config,
            seed=seed,
            watcher=watcher,
        )
        found = run.run(overwrite=overwrite)
    say()
    console.print(search_table(found, config), highlight=False, markup=False)
    names: tuple[RankBy, ...] = ("metric", "loss")
    for name in names:
        judged = agreement(found, protocol=protocol, metric=metric, rank_by=name)
        if judged is not None:
            figure = f"{metric} after training" if name == "metric" else "mean loss in training"
            say(f"by {figure} on the summary, {_verdict(judged)}")
    say(f"\nchosen: {found[0].candidate.name}. Written: {folder / RESULTS}")


def _verdict(judged: Agreement) -> str:
    tau = "undefined, all are level" if judged.kendall_tau is None else f"{judged.kendall_tau:.2f}"
    if judged.chosen == judged.best:
        standing = "is the best on full data too"
    else:
        standing = f"is {100 * judged.regret:.2f} points behind the best on full data, {judged.best}"
    return (
        f"over {judged.candidates} candidates trained on both: Kendall's tau {tau}; the chosen one, {judged.chosen}, "
        f"{standing}; {duration(judged.summary_seconds)} on the summary, {duration(judged.full_seconds)} on full data"
    )


def _numbers(text: str | None, kind: type, option: str) -> tuple[Any, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(kind(name) for name in names_in(text))
    except ValueError:
        values = ()
    if not values:
        raise ValueError(f"{option} is a list of numbers separated by commas, got {text!r}")
    return values
