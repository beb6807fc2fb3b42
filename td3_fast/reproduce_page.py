"""The page of a reproduced table: one HTML file with its pictures inside, readable without a network."""

from __future__ import annotations

import base64
import functools
import importlib
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from td3_fast.paper import CROSS, DISTILLING
from td3_fast.report import BLUE, GREY

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:90rem;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}"
    "th,td{padding:.2rem .6rem;text-align:right;border-bottom:1px solid #ddd}"
    "th{vertical-align:bottom;line-height:1.2}td{white-space:nowrap}"
    "th:first-child,td:first-child{text-align:left}"
    ".paper{color:#777}.below{color:#a33}.above{color:#175}img{max-width:100%}"
)
PROTOCOLS = {
    "uni100": "uni100: the target among 100 items drawn at random, as in the paper",
    "full": "full: the target among all items",
}
SIGNIFICANT = 0.05
HEADLINE = ("HR@10", "NDCG@10")
Line = Mapping[str, Any]


class Section(NamedTuple):
    """A table under its heading; `about` says how it was made, `parts` are HTML."""

    title: str
    about: str
    parts: Sequence[str]


def section(lines: Sequence[Line], *, title: str, about: str, notes: Sequence[str] = ()) -> Section:
    """What is shown of the lines of a table's CSV file; `notes` are sentences more.

    Pictures are left out, and it says so, where matplotlib is not installed.
    """
    parts = []
    for protocol, heading in PROTOCOLS.items():
        chosen = [line for line in lines if line["protocol"] == protocol]
        if chosen:
            parts.append(
                f"<h2>{escape(heading)}</h2>{_comparison(chosen)}<h3>All metrics</h3>{_table(chosen)}"
            )
    said = [
        "Percent, mean ± standard deviation over distillations, or over learners where there is one distillation."
    ]
    if any(line["paper_mean_percent"] is not None for line in lines):
        said.append("In brackets the paper's figure, ours red where it is below and green where it is not.")
    if any(line["recovery_percent"] is not None for line in lines):
        said.append(
            "Recovery: the share of the way from the zero-step control to the full data, where these are above it."
        )
    if any(line["p_value"] is not None for line in lines):
        said.append(_about_tests(lines))
    parts.append(f"<p>{escape(' '.join(said))}</p>")
    parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>" if notes else "")
    parts.append(_picture([line for line in lines if line["protocol"] == "uni100"]))
    return Section(title, about, parts)


def document(one: Section) -> str:
    """A whole page of HTML of one section."""
    return _html(one.title, _inner(one))


def collection(title: str, sections: Sequence[Section]) -> str:
    """A whole page of HTML of several sections, with links to each at its head."""
    links = "".join(f'<li><a href="#{i}">{escape(one.title)}</a></li>' for i, one in enumerate(sections))
    parts = "".join(
        f'<section id="{i}"><h1>{escape(one.title)}</h1>{_inner(one)}</section>'
        for i, one in enumerate(sections)
    )
    return _html(title, f"<ul>{links}</ul>{parts}")


def _inner(one: Section) -> str:
    return f"<p>{escape(one.about)}.</p>{''.join(one.parts)}"


def _html(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{escape(title)}</h1>{body}</html>\n"
    )


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already; the first of each row is its name."""
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{titles}</tr>{body}</table>"


def _about_tests(lines: Sequence[Line]) -> str:
    pairs = sorted({line["pairs"] for line in lines if line["pairs"] is not None})
    units = "distillations" if any("distillations" in line["over"] for line in lines) else "learners"
    caution = "" if units == "distillations" else "; they speak of this one distillation alone"
    return (
        f"Differences have the two-sided p of a paired t-test over {' or '.join(map(str, pairs))} {units}, those of "
        f"one seed making a pair{caution}. p is not corrected for the number of comparisons; * stands for "
        f"p < {SIGNIFICANT}."
    )


def label(line: Line) -> str:
    """The row of a line, its learner named as in `Cell.label`."""
    other = line["learner"] if line["table"] == CROSS or line["learner"] != DISTILLING else None
    return " ".join(filter(None, (line["method"], line["size"], other)))


def _by_label(lines: Sequence[Line]) -> dict[str, dict[str, Line]]:
    """Row -> metric -> line."""
    rows: dict[str, dict[str, Line]] = {}
    for line in lines:
        rows.setdefault(label(line), {})[line["metric"]] = line
    return rows


def _comparison(lines: Sequence[Line]) -> str:
    """What each row is worth beside the others, by the metrics that are looked at first."""
    columns: dict[str, Callable[[Mapping[str, Line]], str]] = {}
    for metric in HEADLINE:
        columns[metric] = functools.partial(_shown, metric, _cell)
        columns[f"of full, {metric}"] = functools.partial(_shown, metric, _percent("of_full_percent"))
        columns[f"recovery, {metric}"] = functools.partial(_shown, metric, _percent("recovery_percent"))
        columns[f"difference, {metric}"] = functools.partial(_shown, metric, _difference)
    columns["to"] = functools.partial(_shown, HEADLINE[0], _against)
    found = _by_label(lines)
    cells = {title: [shown(row) for row in found.values()] for title, shown in columns.items()}
    cells = {title: column for title, column in cells.items() if any(column)}
    rows = [[escape(name), *row] for name, row in zip(found, zip(*cells.values(), strict=True), strict=True)]
    return html_table(["", *cells], rows)


def _shown(metric: str, show: Callable[[Line], str], row: Mapping[str, Line]) -> str:
    return show(row[metric]) if metric in row else ""


def _percent(name: str) -> Callable[[Line], str]:
    return lambda line: "" if line[name] is None else f"{line[name]:.1f} %"


def _difference(line: Line) -> str:
    if line["difference_percent"] is None:
        return ""
    return f"{line['difference_percent']:+.2f}{_star(line)} (p = {line['p_value']:.2g})"


def _against(line: Line) -> str:
    return "" if line["difference_percent"] is None else escape(line["against"])


def _table(lines: Sequence[Line]) -> str:
    metrics = list(dict.fromkeys(line["metric"] for line in lines))
    rows = [
        [escape(name), *(_cell(found[metric]) for metric in metrics)]
        for name, found in _by_label(lines).items()
    ]
    return html_table(["", *metrics], rows)


def _star(line: Line) -> str:
    return "*" if line["p_value"] is not None and line["p_value"] < SIGNIFICANT else ""


def _cell(line: Line) -> str:
    spread = "" if line["sd_percent"] is None else f" ± {line['sd_percent']:.2f}"
    ours = f"{line['mean_percent']:.2f}{spread}{_star(line)}"
    paper = line["paper_mean_percent"]
    if paper is None:
        return ours
    kind = "below" if line["mean_percent"] < paper else "above"
    return f'<span class="{kind}">{ours}</span> <span class="paper">({paper:.2f})</span>'


def _picture(lines: Sequence[Line]) -> str:
    try:
        figure_module = importlib.import_module("matplotlib.figure")
    except ImportError:
        return "<p>The picture is left out: matplotlib, the extra <code>plot</code> of td3-fast, is not installed.</p>"
    compared = [line for line in lines if line["paper_mean_percent"] is not None]
    metrics = list(dict.fromkeys(line["metric"] for line in compared or lines))
    shown = [metric for metric in ("HR@10", "NDCG@10", "MRR@10") if metric in metrics] or metrics[:3]
    height = 1.2 + 0.4 * len({label(line) for line in lines})
    figure = figure_module.Figure(figsize=(5 * len(shown), height), layout="constrained", dpi=110)
    axes = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axis, metric in zip(axes, shown, strict=True):
        chosen = [line for line in lines if line["metric"] == metric]
        places = {label(line): place for place, line in enumerate(chosen)}
        published = [line for line in chosen if line["paper_mean_percent"] is not None]
        aside, thick = (0.2, 0.38) if compared else (0.0, 0.7)
        axis.barh(
            [place - aside for place in places.values()], [line["mean_percent"] for line in chosen], thick,
            xerr=[line["sd_percent"] or 0.0 for line in chosen], color=BLUE, label="here",
        )  # fmt: skip
        if published:
            axis.barh(
                [places[label(line)] + aside for line in published],
                [line["paper_mean_percent"] for line in published], thick,
                xerr=[line["paper_sd_percent"] or 0.0 for line in published], color=GREY, label="paper",
            )  # fmt: skip
        axis.set_yticks(list(places.values()), list(places))
        axis.set(title=f"{metric}, uni100", xlabel="%")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    if compared:
        axes[0].legend(frameon=False, fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    encoded = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="The figures as bars" src="data:image/png;base64,{encoded}">'
