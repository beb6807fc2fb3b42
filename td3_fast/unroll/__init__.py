"""The inner loop on a summary, its optimiser, and the adjoint of its last steps."""

from td3_fast.unroll.adam import AdamConfig, AdamState, adam_adjoint_, adam_step_, initial_state
from td3_fast.unroll.fit import CACHED_PROBABILITIES_LIMIT, fit_on_summary, make_mixture
from td3_fast.unroll.fused import FusedLoop, may_be_fused
from td3_fast.unroll.higher import pull_back_with_higher
from td3_fast.unroll.inner import InnerLoop, ItemEmbedding, middle_places
from td3_fast.unroll.lanes import Lanes
from td3_fast.unroll.lazy_adam import lazy_adam_step_
from td3_fast.unroll.mixture import (
    NOTED_LIMIT,
    CachedMixture,
    FixedEmbeddings,
    ItemMixture,
    LinearMixture,
    StreamedMixture,
    beside,
    flat_pair,
)
from td3_fast.unroll.recorded import (
    CudaGraphs,
    GraphsUnavailableWarning,
    RecordedLoop,
    RecordedWindow,
    Recorder,
    called,
    may_be_recorded,
)
from td3_fast.unroll.window import KEPT_STATES_LIMIT, TENSORS_PER_STEP, stride_of

__all__ = [
    "CACHED_PROBABILITIES_LIMIT",
    "KEPT_STATES_LIMIT",
    "NOTED_LIMIT",
    "TENSORS_PER_STEP",
    "AdamConfig",
    "AdamState",
    "CachedMixture",
    "CudaGraphs",
    "FixedEmbeddings",
    "FusedLoop",
    "GraphsUnavailableWarning",
    "InnerLoop",
    "ItemEmbedding",
    "ItemMixture",
    "Lanes",
    "LinearMixture",
    "RecordedLoop",
    "RecordedWindow",
    "Recorder",
    "StreamedMixture",
    "adam_adjoint_",
    "adam_step_",
    "beside",
    "called",
    "fit_on_summary",
    "flat_pair",
    "initial_state",
    "lazy_adam_step_",
    "make_mixture",
    "may_be_fused",
    "may_be_recorded",
    "middle_places",
    "pull_back_with_higher",
    "stride_of",
]
