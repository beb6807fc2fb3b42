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

# Ratios are to the fused op or the native engine, and to the same variant at a base point. A column that no row fills
# is left out.
COLUMNS = ("median", "x fused", "x base", "GFLOP/s", "of mm", "peak MiB", "x base MiB")


class Row(NamedTuple):
    group: str
    variant: str
    median: float  # seconds
    # What was measured of fused_median (in interleaved rounds), base_median, flops, matrix_rate (of products of dtype),
    # peak_mib, base_peak_mib.
    extra: dict[str, Any]


def cells(row: Row, matrix_rates: dict[str, float]) -> Iterator[str]:
    fused, base, flops, peak, base_peak = (
        row.extra.get(key) for key in ("fused_median", "base_median", "flops", "peak_mib", "base_peak_mib")
    )
    yield f"{row.median * 1e3:.3f} ms"
    yield "" if fused is None else f"{row.median / fused:.2f}"
    yield "" if base is None else f"{row.median / base:.2f}"
    yield "" if flops is None else f"{flops / row.median / 1e9:.1f}"
    yield "" if flops is None else f"{flops / row.median / matrix_rates[row.extra['dtype']]:.0%}"
    yield "" if peak is None else f"{peak:.0f}"
    yield "" if not base_peak else f"{peak / base_peak:.2f}"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines; groups in the order of the rows."""
    matrix_rates: dict[str, float] = {}
    for extra in (row.extra for row in rows if "matrix_rate" in row.extra):
        matrix_rates[extra["dtype"]] = max(extra["matrix_rate"], matrix_rates.get(extra["dtype"], 0.0))
    for dtype, rate in matrix_rates.items():
        yield f"largest rate of mm, {dtype.removeprefix('torch.')}: {rate / 1e9:.1f} GFLOP/s"
    filled = [list(cells(row, matrix_rates)) for row in rows]
    kept = [i for i in range(len(COLUMNS)) if any(line[i] for line in filled)]
    yield f"{'':32}" + "".join(f"{COLUMNS[i]:>14}" for i in kept)
    for group, members in itertools.groupby(zip(rows, filled, strict=True), lambda member: member[0].group):
        yield group
        for row, line in members:
            yield f"  {row.variant:30}" + "".join(f"{line[i]:>14}" for i in kept)


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
