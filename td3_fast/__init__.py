"""Dataset distillation for sequential recommendation by Tucker decomposition, fast.

The functions `distill`, `evaluate` and `pretrain` bear the names of the modules they live in and stand before them:
what else those modules hold is imported from them by name, as in `from td3_fast.distill import DistillConfig`.
"""

from td3_fast import data, ops
from td3_fast.data import Interactions, generate_interactions, leave_one_out, load_interactions
from td3_fast.distill import DistillConfig, distill
from td3_fast.evaluate import EvaluateConfig, evaluate
from td3_fast.learners import SASRec, SASRecConfig
from td3_fast.pretrain import PretrainConfig, pretrain
from td3_fast.recipes import RECIPES, Recipe, recipe_named
from td3_fast.summary import SummaryError, TuckerSummary
from td3_fast.training import FitConfig, Pretrained
from td3_fast.unroll import fit_on_summary

__all__ = [
    "RECIPES",
    "DistillConfig",
    "EvaluateConfig",
    "FitConfig",
    "Interactions",
    "PretrainConfig",
    "Pretrained",
    "Recipe",
    "SASRec",
    "SASRecConfig",
    "SummaryError",
    "TuckerSummary",
    "data",
    "distill",
    "evaluate",
    "fit_on_summary",
    "generate_interactions",
    "leave_one_out",
    "load_interactions",
    "ops",
    "pretrain",
    "recipe_named",
]
