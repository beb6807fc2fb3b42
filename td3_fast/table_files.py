"""The files of a reproduced table, and whether they are of this table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from td3_fast.files import write_text
from td3_fast.run_folder import RunError

TABLE = "table.csv"
PAGE = "table.html"


def check_place(folder: Path, *, table: str, dataset: str) -> None:
    """Refuse a folder that holds another table, or one of other data.

    Raises:
        RunError: it does.
    """
    path = folder / TABLE
    if not path.exists():
        return
    first = next(csv.DictReader(path.read_text(encoding="utf-8").splitlines()), {})
    own = {"table": table, "dataset": dataset}
    if {name: first.get(name) for name in own} != own:
        raise RunError(f"{path} is of another table or other data: choose another folder")


def clear_table(folder: Path) -> None:
    """Remove the files of a table, where there are any."""
    for name in (TABLE, PAGE):
        (folder / name).unlink(missing_ok=True)


def write_table(folder: Path, fields: Sequence[str], lines: Sequence[Mapping[str, Any]], page: str) -> None:
    """Write `table.csv` and `table.html` anew."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(folder / TABLE, text.getvalue())
    write_text(folder / PAGE, page)
