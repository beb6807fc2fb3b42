"""The inner loop for a CPU: several steps in one call of a kernel, for small summaries, whose steps take less time than
the Python between the ops of one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from td3_fast.ops import (
    KeptSteps,
    StepTensors,
    has_inner_steps,
    inner_steps_,
    kept_inner_steps,
    pull_back_inner_steps_,
)
from td3_fast.progress import Progress, silent
from td3_fast.unroll.adam import AdamState
from td3_fast.unroll.inner import InnerLoop
from td3_fast.unroll.mixture import ItemMixture
from td3_fast.unroll.window import KEPT_STATES_LIMIT, stride_of

# Of a call: so that it can be interrupted in between, and what is kept is given up in parts on the way back.
MOST_STEPS, MOST_KEPT_STEPS = 64, 8
MOST_ITEMS = 2**17  # of the steps of a call together


class _Block(NamedTuple):
    """Steps that were taken in one call."""

    first: int
    steps: StepTensors
    kept: KeptSteps


@dataclass(kw_only=True)
class FusedWindow:
    """A run of steps, to be pulled back from the last one to the first; as `Window`, in blocks."""

    blocks: list[_Block]
    checkpoints: list[AdamState]
    items: Tensor
    loss: Tensor  # () of the last step
    pulled_back: int = 0


class FusedLoop:
    """`InnerLoop` with the same bits, where `may_be_fused`."""

    def __init__(self, loop: InnerLoop) -> None:
        self._loop = loop
        adam = loop.adam
        self._rates = [adam.beta1, adam.beta2, adam.eps, adam.weight_decay]

    def run(
        self,
        state: AdamState,
        items: Tensor,
        mixture: ItemMixture,
        *,
        until: int,
        progress: Progress = silent,
    ) -> tuple[AdamState, Tensor]:
        """`InnerLoop.run`."""
        losses: list[Tensor] = []
        first, count = state.step, until - state.step
        steps = self._steps(state, items, mixture, until=until)
        flat = _flattened(state)
        for begin, end in _parts(count, MOST_STEPS, items):
            losses.append(inner_steps_(flat, steps.part(begin, end)))
            if progress is not silent:
                for taken, loss in enumerate(losses[-1].tolist(), start=begin + 1):
                    progress("fit", taken, count, {"loss": loss})
        state = state._replace(step=max(first, until))
        return state, torch.cat(losses) if losses else items.new_empty(0)

    def run_window(
        self,
        state: AdamState,
        items: Tensor,
        mixture: ItemMixture,
        *,
        until: int,
        kept_limit: int = KEPT_STATES_LIMIT,
    ) -> tuple[AdamState, FusedWindow]:
        """`InnerLoop.run_window`; `state` is not overwritten, and must not be until the window is pulled back."""
        size = sum(p.nbytes for p in state.parameters)
        stride = stride_of(until - state.step, size, kept_limit)
        checkpoints: list[AdamState] = []
        while until - state.step > stride:
            checkpoints.append(state)
            state, _ = self.run(state.clone(), items, mixture, until=state.step + stride)
        state, blocks, loss = self._keep_steps(state, items, mixture, until=until)
        return state, FusedWindow(blocks=blocks, checkpoints=checkpoints, items=items, loss=loss)

    def pull_back(
        self,
        window: FusedWindow,
        cotangents: tuple[Tensor, ...],
        mixture: ItemMixture,
        *,
        growth_limit: float | None = None,
    ) -> Tensor:
        """`InnerLoop.pull_back`."""
        adjoint = [t for c in cotangents for t in (c, torch.zeros_like(c), torch.zeros_like(c))]
        limit = (
            None if growth_limit is None else growth_limit * float(torch.linalg.vector_norm(cotangents[0]))
        )
        while window.blocks:
            first = window.blocks[0].first
            while window.blocks:
                _, steps, kept = window.blocks.pop()
                cotangents_of_x, tables, beyond = pull_back_inner_steps_(adjoint, kept, steps, limit)
                window.pulled_back += len(cotangents_of_x)
                self._note(mixture, steps, kept, cotangents_of_x, tables)
                if beyond:
                    window.blocks.clear()
                    window.checkpoints.clear()
            if window.checkpoints:
                state = window.checkpoints.pop()
                _, window.blocks, _ = self._keep_steps(state, window.items, mixture, until=first)
        return mixture.gradient()

    def _keep_steps(
        self, state: AdamState, items: Tensor, mixture: ItemMixture, *, until: int
    ) -> tuple[AdamState, list[_Block], Tensor]:
        blocks: list[_Block] = []
        losses = items.new_empty(0)
        first, count = state.step, until - state.step
        steps = self._steps(state, items, mixture, until=until)
        flat = _flattened(state)
        for begin, end in _parts(count, MOST_KEPT_STEPS, items):
            part = steps.part(begin, end)
            losses, flat, kept = kept_inner_steps(flat, part)
            blocks.append(_Block(first + begin, part, kept))
        p, m, v = (tuple(flat[i::3]) for i in range(3))
        return AdamState(p, m, v, until), blocks, losses[-1]

    def _steps(self, state: AdamState, items: Tensor, mixture: ItemMixture, *, until: int) -> StepTensors:
        """The inputs of the steps from a state on."""
        trained = len(state.parameters) > 1
        source = mixture.probabilities if trained else mixture.whole
        shape = self._loop.flat_parameters.fused_shape(state.parameters[0])
        assert source is not None, "not a loop that may be fused"
        assert shape is not None, "not a loop that may be fused"
        users, targets, seeds, sizes = self._loop.first_inputs(max(until, state.step + 1))
        assert isinstance(sizes, Tensor)
        steps = StepTensors(source, items, users, targets, seeds, sizes.tolist(), self._rates, shape)
        return steps.part(state.step, until)

    @staticmethod
    def _note(
        mixture: ItemMixture,
        steps: StepTensors,
        kept: KeptSteps,
        cotangents: list[Tensor],
        tables: list[Tensor],
    ) -> None:
        count = len(steps.users)
        per_step = len(kept.states) // count
        for i, cotangent in enumerate(cotangents):
            step = count - 1 - i
            users, items = steps.users[step], steps.items
            if tables:
                mixture.note(users, kept.to_embeds[step], tables[i])
                items = kept.states[per_step * step + 3]
            mixture.note(users, cotangent, items)


def may_be_fused(
    loop: InnerLoop, parameters: tuple[Tensor, ...], items: Tensor, mixture: ItemMixture
) -> bool:
    """Whether `FusedLoop` takes the steps of a loop: on the CPU, those of an encoder that the kernels know, whose soft
    embeddings are there, or the probabilities that they are made by where the table is trained."""
    source = mixture.probabilities if len(parameters) > 1 else mixture.whole
    return (
        source is not None
        and source.dtype == parameters[0].dtype
        and has_inner_steps(items.device)
        and loop.takes_one_call
        and loop.flat_parameters.fused_shape(parameters[0]) is not None
        and all(p.is_contiguous() and p.dtype == parameters[0].dtype for p in parameters)
    )


def _flattened(state: AdamState) -> list[Tensor]:
    """A parameter and its moments, then the next."""
    return [tensor for part in zip(*state[:3], strict=True) for tensor in part]


def _parts(count: int, most: int, items: Tensor) -> list[tuple[int, int]]:
    """`count` steps in parts of nearly equal size."""
    most = max(min(most, MOST_ITEMS // max(len(items), 1)), 1)
    parts = -(-count // most)
    bounds = [count * i // parts for i in range(parts + 1)] if parts > 0 else [0]
    return list(itertools.pairwise(bounds))
