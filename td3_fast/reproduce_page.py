"""The page of a reproduced table: one HTML file with its pictures inside, readable without a network."""

from __future__ import annotations

import base64
import importlib
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from td3_fast.report import BLUE, GREY

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}th,td{padding:.25rem .7rem;text-align:right;"
    "border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}"
    ".paper{color:#777}.below{color:#a33}.above{color:#175}img{max-width:100%}"
)
PROTOCOLS = {
    "uni100": "uni100: the target among 100 items drawn at random, as in the paper",
    "full": "full: the target among all items",
}


def page(lines: Sequence[Mapping[str, Any]], *, title: str, about: str) -> str:
    """The page from the lines of a table's CSV file; `about` says how they were made.

    Pictures are left out, and the page says so, where matplotlib is not installed.
    """
    parts = [f"<h1>{escape(title)}</h1><p>{escape(about)}.</p>"]
    for protocol, heading in PROTOCOLS.items():
        chosen = [line for line in lines if line["protocol"] == protocol]
        if chosen:
            parts.append(f"<h2>{escape(heading)}</h2>{_table(chosen)}")
    parts.append(
        "<p>Percent, mean ± standard deviation over distillations, or over learners where there is one distillation. "
        "In brackets the paper's figure, ours red where it is below and green where it is not. Recovery: the share of "
        "the way from the zero-step control to the full data.</p>"
    )
    compared = [line for line in lines if line["paper_mean_percent"] is not None]
    parts.append(_picture(compared) if compared else "")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style>{''.join(parts)}</html>\n"
    )


def _label(line: Mapping[str, Any]) -> str:
    return " ".join(filter(None, (line["method"], line["size"])))


def _table(lines: Sequence[Mapping[str, Any]]) -> str:
    metrics = list(dict.fromkeys(line["metric"] for line in lines))
    by_label: dict[str, dict[str, Mapping[str, Any]]] = {}
    for line in lines:
        by_label.setdefault(_label(line), {})[line["metric"]] = line
    head = "".join(f"<th>{escape(metric)}</th>" for metric in ("", *metrics, "recovery NDCG@10"))
    body = []
    for label, found in by_label.items():
        recovered = found.get("NDCG@10", {}).get("recovery_percent")
        cells = [escape(label), *(_cell(found[metric]) for metric in metrics)]
        cells.append("" if recovered is None else f"{recovered:.0f}")
        body.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def _cell(line: Mapping[str, Any]) -> str:
    ours = f"{line['mean_percent']:.2f} ± {line['sd_percent']:.2f}"
    paper = line["paper_mean_percent"]
    if paper is None:
        return ours
    kind = "below" if line["mean_percent"] < paper else "above"
    return f'<span class="{kind}">{ours}</span> <span class="paper">({paper:.2f})</span>'


def _picture(lines: Sequence[Mapping[str, Any]]) -> str:
    try:
        figure_module = importlib.import_module("matplotlib.figure")
    except ImportError:
        return "<p>The picture is left out: matplotlib, the extra <code>plot</code> of td3-fast, is not installed.</p>"
    metrics = list(dict.fromkeys(line["metric"] for line in lines))
    shown = [metric for metric in ("HR@10", "NDCG@10", "MRR@10") if metric in metrics] or metrics[:3]
    figure = figure_module.Figure(figsize=(5 * len(shown), 4), layout="constrained", dpi=110)
    for axis, metric in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        chosen = [line for line in lines if line["metric"] == metric]
        places = range(len(chosen))
        paper = [line["paper_mean_percent"] for line in chosen]
        spread = [line["paper_sd_percent"] or 0.0 for line in chosen]
        ours = [line["mean_percent"] for line in chosen]
        axis.barh(
            [place - 0.2 for place in places], ours, 0.38, xerr=[line["sd_percent"] for line in chosen],
            color=BLUE, label="here",
        )  # fmt: skip
        axis.barh([place + 0.2 for place in places], paper, 0.38, xerr=spread, color=GREY, label="paper")
        axis.set_yticks(list(places), [_label(line) for line in chosen])
        axis.invert_yaxis()
        axis.set(title=f"{metric}, uni100", xlabel="%")
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    encoded = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="Figures here beside the paper\'s" src="data:image/png;base64,{encoded}">'
