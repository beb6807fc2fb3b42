"""Dataset distillation for sequential recommendation by Tucker decomposition, fast.

The functions `distill`, `evaluate`, `pretrain`, `search` and `tune` bear the names of the modules they live in and
stand before them: what else those modules hold is imported from them by name, as in
`from td3_fast.distill import Distiller`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from td3_fast import data, ops
    from td3_fast.data import Interactions, generate_interactions, leave_one_out, load_interactions
    from td3_fast.distill import distill
    from td3_fast.distill_config import DistillConfig
    from td3_fast.evaluate import EvaluateConfig, evaluate, learner_for
    from td3_fast.learners import (
        NARM,
        BERT4Rec,
        BERT4RecConfig,
        GRU4Rec,
        GRU4RecConfig,
        Learner,
        NARMConfig,
        SASRec,
        SASRecConfig,
        register_learner,
    )
    from td3_fast.memory import MemoryPlan, plan_memory
    from td3_fast.pretrain import PretrainConfig, pretrain
    from td3_fast.recipes import RECIPES, Recipe, recipe_named
    from td3_fast.search import Candidate, SearchConfig, search
    from td3_fast.summary import FarziSummary, SummaryError, TuckerSummary, load_summary
    from td3_fast.training import FitConfig, Pretrained
    from td3_fast.tune import TuneConfig, tune
    from td3_fast.unroll import fit_on_summary

__all__ = [
    "NARM",
    "RECIPES",
    "BERT4Rec",
    "BERT4RecConfig",
    "Candidate",
    "DistillConfig",
    "EvaluateConfig",
    "FarziSummary",
    "FitConfig",
    "GRU4Rec",
    "GRU4RecConfig",
    "Interactions",
    "Learner",
    "MemoryPlan",
    "NARMConfig",
    "PretrainConfig",
    "Pretrained",
    "Recipe",
    "SASRec",
    "SASRecConfig",
    "SearchConfig",
    "SummaryError",
    "TuckerSummary",
    "TuneConfig",
    "data",
    "distill",
    "evaluate",
    "fit_on_summary",
    "generate_interactions",
    "learner_for",
    "leave_one_out",
    "load_interactions",
    "load_summary",
    "ops",
    "plan_memory",
    "pretrain",
    "recipe_named",
    "register_learner",
    "search",
    "tune",
]

_NAMES = {
    "data": ("Interactions", "generate_interactions", "leave_one_out", "load_interactions"),
    "distill": ("distill",),
    "distill_config": ("DistillConfig",),
    "evaluate": ("EvaluateConfig", "evaluate", "learner_for"),
    "learners": (
        "BERT4Rec",
        "BERT4RecConfig",
        "GRU4Rec",
        "GRU4RecConfig",
        "Learner",
        "NARM",
        "NARMConfig",
        "SASRec",
        "SASRecConfig",
        "register_learner",
    ),
    "memory": ("MemoryPlan", "plan_memory"),
    "pretrain": ("PretrainConfig", "pretrain"),
    "recipes": ("RECIPES", "Recipe", "recipe_named"),
    "search": ("Candidate", "SearchConfig", "search"),
    "summary": ("FarziSummary", "SummaryError", "TuckerSummary", "load_summary"),
    "training": ("FitConfig", "Pretrained"),
    "tune": ("TuneConfig", "tune"),
    "unroll": ("fit_on_summary",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


class _Package(ModuleType):
    """Imports what a public name needs on its first use, so that the command line can start without torch."""

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return importlib.metadata.version("td3-fast")
        if name in ("data", "ops"):
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Python binds a submodule to its package on import; a function of the same name takes its place.
        if isinstance(value, ModuleType) and _MODULE_OF.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
