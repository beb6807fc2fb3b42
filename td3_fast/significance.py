"""Whether two rows of a table differ by more than their seeds explain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """The mean difference of paired figures, and how probable one as large is where there is none."""

    difference: float
    p_value: float  # two-sided
    pairs: int


def paired_t_test(first: Sequence[float], second: Sequence[float]) -> PairedTest | None:
    """Student's paired t-test of first - second, two-sided; None for fewer than two pairs.

    Differences are taken to be normal, as they nearly are where each is a mean over many users. An exact test by
    flipping signs would not ask for that, but of n pairs its p is at least 2 / 2ⁿ, which three to five seeds could
    never bring below 0.05. Differences that are all alike have p = 0, or 1 where they are all zero.

    Raises:
        ValueError: there are not as many figures on one side as on the other.
    """
    if len(first) != len(second):
        raise ValueError(f"figures must come in pairs, got {len(first)} and {len(second)}")
    pairs = len(first)
    if pairs < 2:
        return None
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean = math.fsum(differences) / pairs
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (pairs - 1)
    if variance == 0:
        return PairedTest(difference=mean, p_value=float(mean == 0), pairs=pairs)
    statistic = mean / math.sqrt(variance / pairs)
    return PairedTest(difference=mean, p_value=two_sided(statistic, pairs - 1), pairs=pairs)


def two_sided(statistic: float, freedom: int) -> float:
    """P(|t| ≥ |statistic|) of Student's t with `freedom` ≥ 1 degrees of freedom.

    With θ = atan(|statistic| / √freedom) the probability of the inside is a finite sum in sin θ and cos θ
    (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    if freedom < 1:
        raise ValueError(f"Student's t has at least 1 degree of freedom, got {freedom}")
    angle = math.atan(abs(statistic) / math.sqrt(freedom))
    odd = freedom % 2
    square = math.cos(angle) ** 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    # powers of cos θ up to freedom - 2, each with the ratio of neighbouring factors
    for power in range(2 + odd, freedom - 1, 2):
        term *= square * (power - 1) / power
        total += term
    inside = math.sin(angle) * total
    if odd:
        inside = 2 / math.pi * (angle + inside)
    return min(max(1 - inside, 0.0), 1.0)
