"""What the benchmarks of the outer step measure: a distillation that starts from an untrained SASRec."""

from __future__ import annotations

from typing import Any

import torch

from td3_fast.data import Split
from td3_fast.distill import Distiller
from td3_fast.distill_config import DistillConfig
from td3_fast.distill_state import DistillState
from td3_fast.learners import SASRec, SASRecConfig
from td3_fast.training import Pretrained

# Of the factors above those that a distillation starts from: softmaxes that differ from the uniform one.
SPREAD = 20


def make_distiller(
    split: Split,
    config: DistillConfig,
    learner: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Distiller:
    """learner: the sizes of the SASRec but the number of items."""
    made = SASRec(SASRecConfig(num_items=split.interactions.num_items, **learner), seed=0).to(device, dtype)
    state = {name: value.detach() for name, value in made.state_dict().items()}
    pretrained = Pretrained(
        learner_name="SASRec",
        learner_config=made.hyperparameters(),
        best=state,
        pool=[state],
        history=[],
        best_epoch=0,
    )
    return Distiller(split, pretrained, config, seed=0)


def spread_state(distiller: Distiller) -> DistillState:
    """The state before the first outer step, of a summary that prefers some items."""
    state = distiller.initial_state()
    for factor in state.factors.parameters:
        factor.mul_(SPREAD)
    return state
