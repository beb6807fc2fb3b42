"""The command `td3-fast export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from td3_fast.cli_data import Columns, Format, Seed, check_inter, check_place
from td3_fast.cli_options import (
    MaxEpochs,
    Overwrite,
    SummaryFile,
    Threads,
    filters_of,
    read_split,
    set_threads,
    watching,
)
from td3_fast.terminal import console, guarded, say

if TYPE_CHECKING:
    from td3_fast.data import Interactions


@guarded
def export(
    summary: SummaryFile,
    out: Annotated[
        Path,
        typer.Option("--out", help="The RecBole file to write, .inter or .inter.gz.", show_default=False),
    ],
    draws: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Draw so many sequences per synthetic user; the most probable items, once, if left out.",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Of the draws, 1 if left out; below it they keep closer to the most probable items."
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option("--test", help="DATA: also score learners trained on what was written."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Learners for each row of that table.")] = 3,
    seed: Seed = 0,
    max_epochs: MaxEpochs = None,
    format: Format = None,
    columns: Columns = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
) -> None:
    """Write SUMMARY as sequences of real items, for any library that reads interactions.

    With --test, learners are trained on the summary itself and on what was written.
    The latter have pretrained embeddings, or none.
    All are scored on the test part of DATA: the difference is what the hard sequences cost.
    """
    set_threads(threads)
    from dataclasses import replace

    from td3_fast.data import write_interactions
    from td3_fast.evaluate import HARD_ROWS, EvaluateConfig, evaluate
    from td3_fast.evaluate_run import check_data, fit_config_of
    from td3_fast.export import HardConfig, hard_interactions
    from td3_fast.report import results_tables
    from td3_fast.summary import load_summary

    check_inter("--out", out)
    hard = HardConfig(draws=draws, temperature=1.0 if temperature is None else temperature, seed=seed)
    if draws is None and temperature is not None:
        raise ValueError("--temperature is of draws: add --draws, or leave it out")
    check_place(out, overwrite=overwrite)
    loaded = load_summary(summary)
    split = None
    if test is not None:
        split = read_split(test, format=format, columns=columns, **filters_of(loaded))
        check_data(loaded, split, test)
    with watching("nothing is written") as watcher:
        made = hard_interactions(loaded, hard, progress=watcher.interruptible)
    write_interactions(made, out)
    say(f"{out}: {_words(made)}")
    if split is None:
        return
    fit = fit_config_of(loaded)
    if max_epochs is not None:
        fit = replace(fit, max_epochs=max_epochs)
    config = EvaluateConfig(seeds=seeds, rows=("summary", *HARD_ROWS, "zero-step"), fit=fit, hard=hard)
    with watching(f"{out} is written, the table is not made") as watcher:
        rows = evaluate(loaded, split, config=config, seed=seed, progress=watcher.interruptible)
    for table in results_tables(rows):
        say()
        console.print(table, highlight=False, markup=False)


def _words(made: Interactions) -> str:
    by_user = made.items.reshape(made.num_users, -1)
    again = (by_user[:, 1:] == by_user[:, :-1]).mean() if by_user.shape[1] > 1 else 0.0
    return (
        f"{made.num_users:,} sequences of {by_user.shape[1]:,}, {len(np.unique(made.items)):,} of "
        f"{made.num_items - 1:,} items; {100 * again:.1f} % of the items repeat the one before"
    )
