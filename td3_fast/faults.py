"""What each fault of the paper's released program is worth: the cells of that table."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from td3_fast.distill_config import SEMANTICS, Semantics
from td3_fast.paper import Cell

FAULTS = "faults"
PAPER = "paper"
FROZEN = "item table frozen"
MEANINGS = {
    "reload_learner": "the learner is taken from the pool once an epoch and drifts in between, not at every outer step",
    "alignment_dropout": "features to align with come from passes of the pretrained model with dropout",
    "outer_dropout": "dropout in the pass over real examples",
    "validation_dropout": "dropout on while the epochs' summaries are compared",
    "redraw_negatives": "the 100 negatives are drawn anew at each evaluation",
    "shuffle": "real examples in the same order in every epoch",
    "restart_batches": "the cycle of synthetic users starts over at the differentiated window",
    "separate_passes": "a pass of the encoder, with dropout of its own, for each inner target",
    "carry_embeddings": "evaluations are not independent: each starts from the item table that the last one left",
    "ddof": "standard deviations over n instead of n - 1; the summaries are those of the paper's semantics",
    "authors": "all of these together",
    FROZEN: "the item table does not move, as the paper has it and as the program asks for to no effect; "
    "all other rows train it",
}


def fault_cells(dataset: str, size: str, *, same_run_as: str | None = None) -> list[Cell]:
    """The paper's semantics, each departure of the released program alone, all of them, a frozen table, full data.

    `DistillConfig` is to be that of `Recipe.as_published`. same_run_as: a method of another table whose summaries are
    those of the paper's semantics, where the two share a folder.
    """
    common: dict[str, Any] = {"table": FAULTS, "dataset": dataset}
    plain = {"semantics": SEMANTICS[PAPER]}
    cells = [Cell(method=PAPER, size=size, changes=plain, same_run_as=same_run_as, **common)]
    common["against"] = PAPER
    for entry in fields(Semantics):
        value = getattr(SEMANTICS["authors"], entry.name)
        if entry.name == "ddof":  # changes what is reported of a summary, not the summary
            changes: dict[str, Any] = {"changes": cells[0].changes, "ddof": value}
            changes["same_run_as"] = same_run_as or PAPER
        else:
            semantics = Semantics(**{entry.name: value})
            changes = {"changes": {"semantics": semantics}}
            if semantics.but_for_comparing == SEMANTICS[PAPER]:
                changes["same_epochs_as"] = same_run_as or PAPER
        cells.append(Cell(method=entry.name, size=size, **changes, **common))
    alone = {"semantics": SEMANTICS[PAPER], "item_embedding": "frozen"}
    cells.append(Cell(method="authors", size=size, changes={"semantics": SEMANTICS["authors"]}, **common))
    cells.append(Cell(method=FROZEN, size=size, changes=alone, **common))
    cells.append(Cell(method="full", size=None, row="full", **common))
    return cells
