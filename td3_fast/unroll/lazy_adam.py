"""Lazy Adam: Adam that leaves the rows of a table alone for which a step has no gradient."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from td3_fast.unroll.adam import AdamConfig, AdamState, adam_step_


def lazy_adam_step_(
    state: AdamState,
    gradients: Sequence[Tensor],
    rows: Tensor,  # (k,) int64, different ones
    config: AdamConfig,
) -> AdamState:
    """One step on `state`, whose last parameter is a table (n, d), overwriting its tensors.

    gradients: of every parameter but the last one in full, of the last one for its `rows`, (k, d). This is not Adam:
    the other rows neither move nor lose momentum nor decay, where Adam would go on moving them by what they remember.
    A row that has a gradient takes the step of Adam, the bias corrected by the number of steps in all. Time and memory
    beside the state grow with k and not with n.
    """
    p, m, v = state[:3]
    dense = AdamState(p[:-1], m[:-1], v[:-1], state.step)
    picked = AdamState((p[-1][rows],), (m[-1][rows],), (v[-1][rows],), state.step)
    adam_step_(dense, gradients[:-1], config)
    adam_step_(picked, gradients[-1:], config)
    for whole, moved in zip((p, m, v), picked[:3], strict=True):
        whole[-1].index_copy_(0, rows, moved[0])
    return state._replace(step=state.step + 1)
