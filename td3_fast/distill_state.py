"""Where a distillation stands."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from td3_fast.unroll import AdamState


@dataclass(kw_only=True)
class DistillState:
    """Where a distillation stands: enough to go on with the same bits."""

    factors: AdamState  # of the summary, in the order of `Summary.factors`
    step: int = 0  # outer steps taken
    carried: tuple[Tensor, ...] | None = (
        None  # learners between outer steps, one after another, if not reloaded
    )
    validation_items: Tensor | None = None  # the item table between evaluations, where it is carried over
    best: tuple[Tensor, ...] | None = None
    best_epoch: int = 0
    best_score: float = float("-inf")
    history: list[dict[str, float]] = field(default_factory=list)  # one entry an epoch
    losses: list[dict[str, float]] = field(default_factory=list)  # of the current epoch's outer steps

    def to(self, device: torch.device) -> DistillState:
        """The same with every tensor on a device."""

        def to(tensors: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
            return None if tensors is None else tuple(t.to(device) for t in tensors)

        items = self.validation_items
        return replace(
            self,
            factors=self.factors.to(device),
            carried=to(self.carried),
            validation_items=None if items is None else items.to(device),
            best=to(self.best),
        )


def mean_of(figures: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure."""
    return {name: sum(some[name] for some in figures) / len(figures) for name in figures[0]}
