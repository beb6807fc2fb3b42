"""Hit rate, NDCG and MRR from the ranks of targets, and how runs are summed up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

CUTOFFS = (5, 10, 20)
Metric = Literal["HR@5", "HR@10", "HR@20", "NDCG@5", "NDCG@10", "NDCG@20", "MRR@5", "MRR@10", "MRR@20"]


def metrics_from_ranks(
    ranks: Tensor,  # (examples,) int64, 1 is the best
    cutoffs: Sequence[int] = CUTOFFS,
) -> dict[str, float]:
    """HR@k = [rank <= k], NDCG@k = [rank <= k] / log2(rank + 1), MRR@k = [rank <= k] / rank, as means.

    One target is relevant per example, so the ideal DCG is 1. The means over examples are taken in float64.

    Args:
        ranks: the rank of each example's target.
        cutoffs: the k, each at least 1.

    Returns:
        Fractions by name: "HR@5", "NDCG@5", "MRR@5" and so on for every cut-off.

    Raises:
        ValueError: there is no rank, `ranks` is not one-dimensional or not of integers, a rank or a cut-off
            is below 1.
    """
    if ranks.ndim != 1 or ranks.is_floating_point() or ranks.is_complex() or ranks.dtype == torch.bool:
        raise ValueError(
            f"ranks must be integers of shape (examples,), got {ranks.dtype} of {tuple(ranks.shape)}"
        )
    if ranks.numel() == 0:
        raise ValueError("metrics of no ranks are undefined: there was no example to rank")
    if int(ranks.min()) < 1:
        raise ValueError(f"ranks start at 1, got {int(ranks.min())}")
    if any(k < 1 for k in cutoffs):
        raise ValueError(f"cut-offs must be at least 1, got {tuple(cutoffs)}")
    exact = ranks.to("cpu", torch.float64)  # not every device has float64
    gains = {"HR": torch.ones_like(exact), "NDCG": 1 / torch.log2(exact + 1), "MRR": 1 / exact}
    within = exact <= exact.new_tensor(cutoffs).unsqueeze(1)  # (cut-offs, examples)
    means = {name: torch.where(within, gain, 0.0).mean(1).tolist() for name, gain in gains.items()}
    return {f"{name}@{k}": means[name][i] for i, k in enumerate(cutoffs) for name in gains}


def mean_and_sd(runs: Sequence[Mapping[str, float]], *, ddof: int = 1) -> dict[str, dict[str, float]]:
    """{"mean", "sd"} of every metric; sd = sqrt(sum (x - mean)^2 / (runs - ddof)), 0 for a single run.

    Raises:
        ValueError: there is no run, or two runs do not have the same metrics.
    """
    if not runs:
        raise ValueError("the mean of no runs is undefined")
    if any(run.keys() != runs[0].keys() for run in runs):
        raise ValueError("every run must have the same metrics")
    summed: dict[str, dict[str, float]] = {}
    for name in runs[0]:
        values = [run[name] for run in runs]
        mean = math.fsum(values) / len(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        freedom = len(values) - ddof
        summed[name] = {"mean": mean, "sd": math.sqrt(squares / freedom) if freedom > 0 else 0.0}
    return summed


def recovery(
    summary: Mapping[str, float], control: Mapping[str, float], full: Mapping[str, float]
) -> dict[str, float | None]:
    """(summary - control) / (full - control) of each metric, None where the full data give no more than control.

    The share of what training on the full data adds to the untrained control that the summary adds too.

    Raises:
        ValueError: the three do not have the same metrics.
    """
    if not summary.keys() == control.keys() == full.keys():
        raise ValueError("summary, control and full must have the same metrics")
    return {
        name: None if full[name] <= control[name] else (value - control[name]) / (full[name] - control[name])
        for name, value in summary.items()
    }
