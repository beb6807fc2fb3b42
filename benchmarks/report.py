"""A table of a run: medians, ratios to the fused op, the share of the matrix product's rate, peak memory.

    python benchmarks/report.py results.json

prints it from the JSON of `pytest benchmarks --benchmark-enable --benchmark-json results.json`. A run prints it too.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

COLUMNS = ("median", "x fused", "GFLOP/s", "of mm", "peak MiB")


class Row(NamedTuple):
    group: str
    variant: str
    median: float  # seconds
    # What was measured of fused_median (in interleaved rounds), flops, matrix_rate (of products of dtype), peak_mib.
    extra: dict[str, Any]


def cells(row: Row, matrix_rates: dict[str, float]) -> Iterator[str]:
    fused, flops, peak = (row.extra.get(key) for key in ("fused_median", "flops", "peak_mib"))
    yield f"{row.median * 1e3:.3f} ms"
    yield "" if fused is None else f"{row.median / fused:.2f}"
    yield "" if flops is None else f"{flops / row.median / 1e9:.1f}"
    yield "" if flops is None else f"{flops / row.median / matrix_rates[row.extra['dtype']]:.0%}"
    yield "" if peak is None else f"{peak:.0f}"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines; groups in the order of the rows."""
    matrix_rates: dict[str, float] = {}
    for extra in (row.extra for row in rows if "matrix_rate" in row.extra):
        matrix_rates[extra["dtype"]] = max(extra["matrix_rate"], matrix_rates.get(extra["dtype"], 0.0))
    for dtype, rate in matrix_rates.items():
        yield f"largest rate of mm, {dtype.removeprefix('torch.')}: {rate / 1e9:.1f} GFLOP/s"
    yield f"{'':32}" + "".join(f"{column:>14}" for column in COLUMNS)
    for group, members in itertools.groupby(rows, lambda row: row.group):
        yield group
        for row in members:
            yield f"  {row.variant:30}" + "".join(f"{cell:>14}" for cell in cells(row, matrix_rates))


def rows_of(results: dict) -> list[Row]:
    """The rows of a JSON of pytest-benchmark."""
    return [
        Row(entry["group"], entry["extra_info"]["variant"], entry["stats"]["median"], entry["extra_info"])
        for entry in results["benchmarks"]
        if "variant" in entry["extra_info"]
    ]


if __name__ == "__main__":
    results = json.loads(Path(sys.argv[1]).read_text())
    facts = results["machine_info"]
    print(
        *(f"{key} {facts[key]}" for key in ("device", "threads", "torch") if key in facts), sep=", ", end=", "
    )
    print(
        "commit",
        results["commit_info"].get("id"),
        "with changes" if results["commit_info"].get("dirty") else "",
    )
    print("\n".join(table(rows_of(results))))
