"""What a run leaves for people: the log, the results, the table and the picture."""

from __future__ import annotations

import importlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from td3_fast.evaluate import Row
from td3_fast.files import encoded, write_bytes, write_json, write_text
from td3_fast.summary_file import installed_versions

METRICS = ("HR@10", "NDCG@10", "MRR@10")
PROTOCOL_TITLES = {
    "uni100": "uni100: the target among 100 items drawn at random",
    "full": "full: the target among all items",
}
# distinct for the colour-blind as well (Okabe and Ito)
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8A8A8A"


class JsonLines:
    """A file of one JSON object a line that is appended to, a whole line at a time.

    A line that a crash cut short, and those that `keep` refuses, are taken out first.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, keep: Callable[[dict[str, Any]], bool] = lambda entry: True
    ) -> None:
        present = read_json_lines(path)
        kept = [entry for entry in present if keep(entry)]
        text = "".join(map(_line, kept))
        if not Path(path).exists() or Path(path).read_bytes() != encoded(text):
            write_text(path, text)
        self.entries = kept
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `__exit__`)

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """No more is written."""
        self._file.close()

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append one object."""
        self._file.write(encoded(_line(entry)))


def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without lines that are cut short; none where there is no file."""
    entries = []
    with suppress(FileNotFoundError):
        for line in Path(path).read_bytes().splitlines():
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict):
                    entries.append(entry)
    return entries


def versions() -> dict[str, str]:
    """Versions of everything that a result may depend on."""
    found = installed_versions()
    for package in ("numpy", "pandas", "safetensors"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def write_results(
    path: str | os.PathLike[str],
    rows: Sequence[Row],
    *,
    settings: Mapping[str, Any],
    distillation: Mapping[str, Any] | None = None,
) -> None:
    """Write `results.json`: rows of an evaluation, metrics as fractions, the settings and versions at work.

    distillation: history, times and peak memory of the run that made the summary, if in the same folder.
    """
    results = {"rows": [asdict(row) for row in rows], "settings": dict(settings), "versions": versions()}
    if distillation is not None:
        results["distillation"] = dict(distillation)
    write_json(path, results)


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_results` wrote, "rows" as `Row`; ValueError where the file holds something else."""
    try:
        results: dict[str, Any] = json.loads(Path(path).read_bytes())
        results["rows"] = [Row(**row) for row in results["rows"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds no results of td3-fast: remove it, or name another folder") from error
    return results


def results_tables(rows: Sequence[Row]) -> list[Table]:
    """One table per protocol: mean ± sd in percent over seeds, and the recovery: the share of the way from
    the zero-step control to the full data that a row covers."""
    return [
        _table(protocol, [row for row in rows if row.protocol == protocol]) for protocol in PROTOCOL_TITLES
    ]


def _table(protocol: str, rows: Sequence[Row]) -> Table:
    table = Table(
        title=PROTOCOL_TITLES[protocol],
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("trained on", no_wrap=True)
    for metric in METRICS:
        table.add_column(metric, justify="right", no_wrap=True)
    recovered = any(row.recovery for row in rows)
    if recovered:
        table.add_column("recovery", justify="right", no_wrap=True)
    for row in rows:
        cells = [in_percent(row.metrics[metric], runs=row.learners) for metric in METRICS]
        if recovered:
            cells.append(" / ".join(_percent(row.recovery.get(metric)) for metric in METRICS))
        table.add_row(row.name, *cells, style="bold" if row.name == "summary" else None)
    if recovered:
        table.caption = "in %; recovery of HR / NDCG / MRR: 0 is the zero-step control, 100 full data"
        table.caption_justify = "left"
    return table


def in_percent(figures: Mapping[str, float], *, runs: int) -> str:
    """A {"mean", "sd"} of fractions as in "12.34 ± 0.56"; the mean alone where one run says nothing of a spread."""
    mean = f"{100 * figures['mean']:.2f}"
    return mean if runs == 1 else f"{mean} ± {100 * figures['sd']:.2f}"


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{round(100 * share)}"


def _line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"


def draw_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    steps: Sequence[Mapping[str, float]] = (),
    epochs: Sequence[Mapping[str, float]] = (),
    best_epoch: int = 0,
    max_norm: float | None = None,
    rows: Sequence[Row] = (),
) -> None:
    """Draw what there is into one PNG: the outer steps, the epochs' validation, the rows of an evaluation.

    steps: losses of each outer step, with its number as "step"; epochs: history of a distillation, of which
    `best_epoch` was kept; max_norm: what the gradient's norm is clipped to.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure_module = importlib.import_module("matplotlib.figure")
    ticker = importlib.import_module("matplotlib.ticker")
    lines = 2 * bool(steps) + 2 * bool(rows)
    if not lines:
        return
    bars = len(dict.fromkeys(row.name for row in rows))
    heights = [3.2] * (2 * bool(steps)) + [0.9 + 0.34 * bars] * (2 * bool(rows))
    figure = figure_module.Figure(figsize=(11, sum(heights) + 0.5), layout="constrained", dpi=120)
    figure.suptitle(title, fontsize=13, parse_math=False)
    axes = figure.subplots(lines, 2, squeeze=False, height_ratios=heights)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    if steps:
        _draw_steps(axes, steps, max_norm)
        _draw_epochs(axes[1, 1], epochs, best_epoch)
        for axis in axes[:2].flat:
            axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    if rows:
        for line, protocol in zip(axes[-2:], PROTOCOL_TITLES, strict=True):
            for axis, metric in zip(line, METRICS, strict=False):
                _draw_rows(axis, [row for row in rows if row.protocol == protocol], metric)
            line[1].tick_params(labelleft=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_bytes(path, content.getvalue())


def _draw_steps(axes: Any, steps: Sequence[Mapping[str, float]], max_norm: float | None) -> None:
    at = np.array([step["step"] for step in steps])
    panels = (
        (axes[0, 0], "cross_entropy", "Outer loss: cross-entropy on real examples", "nats", BLUE),
        (axes[0, 1], "alignment", "Outer loss: alignment of features", "mean squared distance", ORANGE),
        (axes[1, 0], "gradient_norm", "Norm of the meta-gradient", "norm before clipping (log)", GREEN),
    )
    for axis, name, title, label, colour in panels:
        values = np.array([step[name] for step in steps])
        axis.set(title=title, xlabel="outer step", ylabel=label)
        if name == "gradient_norm" and (values > 0).all():
            axis.set_yscale("log")
        width = max(1, min(25, len(values) // 10))
        if width == 1:
            axis.plot(at, values, color=colour, marker="." if len(values) < 40 else None)
            continue
        axis.plot(at, values, color=colour, alpha=0.3, linewidth=0.8, label="each step")
        axis.plot(
            at, _trailing_mean(values, width), color=colour, linewidth=1.8, label=f"mean of {width} steps"
        )
        axis.legend(frameon=False, fontsize=8)
    if max_norm is not None and values.max() > max_norm / 10:  # the last panel's
        axes[1, 0].axhline(
            max_norm, color=GREY, linestyle="--", linewidth=1, label=f"clipped to {max_norm:g}"
        )
        axes[1, 0].legend(frameon=False, fontsize=8)


def _trailing_mean(values: np.ndarray, width: int) -> np.ndarray:
    sums = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    return (sums[end] - sums[start]) / (end - start)


def _draw_epochs(axis: Any, epochs: Sequence[Mapping[str, float]], best_epoch: int) -> None:
    axis.set(title="Validation after each epoch", xlabel="epoch", ylabel="%")
    for metric, colour in zip(METRICS, (BLUE, ORANGE, GREEN), strict=True):
        known = [epoch for epoch in epochs if metric in epoch]
        points = [epoch["epoch"] for epoch in known], [100 * epoch[metric] for epoch in known]
        axis.plot(*points, color=colour, marker="o", markersize=3, label=metric)
    if best_epoch:
        axis.axvline(best_epoch, color=GREY, linestyle="--", linewidth=1, label=f"kept: epoch {best_epoch}")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8, ncols=2)


def _draw_rows(axis: Any, rows: Sequence[Row], metric: str) -> None:
    names = [row.name for row in rows]
    means = [100 * row.metrics[metric]["mean"] for row in rows]
    deviations = [100 * row.metrics[metric]["sd"] for row in rows]
    colours = [{"summary": VERMILION, "full": BLUE}.get(name, GREY) for name in names]
    axis.barh(
        names, means, xerr=deviations, color=colours, height=0.7, error_kw={"capsize": 2, "linewidth": 1}
    )
    for name, style in (("zero-step", ":"), ("full", "--")):
        if name in names:
            mean = means[names.index(name)]
            axis.axvline(mean, color="black", linestyle=style, linewidth=1, alpha=0.6, zorder=0.5)
    for place, (mean, deviation) in enumerate(zip(means, deviations, strict=True)):
        axis.annotate(
            f"{mean:.2f}",
            (mean + deviation, place),
            xytext=(4, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.12)
    axis.set_xlim(left=0)
    axis.set(
        title=f"Test {metric}, {rows[0].protocol}",
        xlabel="%, mean ± sd over seeds; dotted: zero-step, dashed: full",
    )
