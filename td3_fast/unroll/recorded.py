"""The inner loop for a GPU: each kind of step recorded once and replayed, with nothing for the host to decide.

A step of the paper's size is some two hundred launches of a few microseconds' work, so that launching takes all of the
time. A CUDA graph launches them at once, but with the arguments that they were captured with. Here whatever differs
from step to step lies in tensors that stay where they are, and counters on the device say which rows of them are meant.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from td3_fast.learners import FlatParameters
from td3_fast.progress import Progress, silent
from td3_fast.unroll.adam import AdamState, adam_step_
from td3_fast.unroll.inner import InnerLoop
from td3_fast.unroll.mixture import ItemMixture, pinned
from td3_fast.unroll.window import StepInputs, WindowStep

# Turns a step, which takes and returns nothing, into what does the same when it is called.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]

# of a step before it is captured: in the first ones libraries choose their kernels and allocate
WARM_UP_CALLS = 3
# Of parameters, in bytes. Beyond, kernels take longer than launches, and several times as much would be held.
RECORDED_LIMIT = 2**27


class GraphsUnavailableWarning(UserWarning):
    """A step could not be captured as a CUDA graph; it is launched kernel by kernel instead, with the same bits."""


@functools.cache
def _capture_stream(device: torch.device, use: str) -> torch.cuda.Stream:
    """One for all captures of a use on a device: libraries keep a workspace for each stream that they have worked on.

    Graphs that may be replayed at the same time must not share one, nor may those that outlive others: the workspace of
    a stream is given up when a graph that was captured on it is. So graphs of a lane are captured on its own stream.
    """
    return torch.cuda.Stream(device)


class CudaGraphs:
    """Records the steps of one `RecordedLoop` as CUDA graphs, which share a memory pool.

    They may: what a step leaves for the next lies in tensors that are older than the graphs.

    use: loops of the same are never there at the same time, unless each has a stream of its own for the current one.
    """

    def __init__(self, device: torch.device, *, use: str) -> None:
        self._device = device
        self._use = use
        self._pool: Any = None

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            recorded = self._capture(step)

        def replay() -> None:
            with torch.cuda.device(self._device):
                recorded()

        return replay

    def _capture(self, step: Callable[[], None]) -> Callable[[], None]:
        stream = torch.cuda.current_stream()
        if stream == torch.cuda.default_stream():
            stream = _capture_stream(self._device, self._use)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # a capture that fails may leave its stream the current one
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self._pool, stream=stream),
            ):
                step()
        except RuntimeError as error:
            warnings.warn(
                f"a step cannot be captured as a CUDA graph, so its kernels are launched one by one: {error}",
                GraphsUnavailableWarning,
                stacklevel=2,
            )
            return step
        self._pool = graph.pool()
        return graph.replay


def may_be_recorded(parameters: tuple[Tensor, ...]) -> bool:
    """Whether recording the steps of such parameters is worth what it holds."""
    return sum(p.nbytes for p in parameters) <= RECORDED_LIMIT


def called(step: Callable[[], None]) -> Callable[[], None]:
    """The recorder that records nothing: the step itself."""
    return step


@dataclass(kw_only=True)
class RecordedWindow:
    """What `RecordedLoop.pull_back` needs to know of the steps that it has kept."""

    first: int
    length: int
    loss: Tensor  # () of the last step
    pulled_back: Tensor | int = 0  # steps, so far


class RecordedLoop:
    """`InnerLoop` on tensors that stay where they are, for loops that differ in their seeds and in their summary.

    `begin` says whose steps are next; `run`, `run_window` and `pull_back` are those of `InnerLoop`, except that a
    window keeps states and no graphs, so that its steps are evaluated once more on the way back, and that one that is
    cut short is gone through to its end, adding zeros. States that are returned are overwritten by the next call. No
    tensor is read on the host.

    loop: one of the loops; parameters, items: as those of a state, and the table where it holds none; mixture: of the
    kind and size of all that follow; steps, window: the most that a loop takes, and that are kept.
    """

    def __init__(
        self,
        loop: InnerLoop,
        parameters: tuple[Tensor, ...],
        items: Tensor,
        mixture: ItemMixture,
        *,
        steps: int,
        window: int,
        record: Recorder,
    ) -> None:
        self._loop = loop
        self._flat = FlatParameters(loop.learner)
        self._items = items
        self._mixture = mixture.twin()
        self._record = record
        self._recorded: dict[str, Callable[[], None]] = {}
        self.limits = (steps, window)
        self._count = len(parameters)

        self._now = [torch.zeros_like(p) for _ in range(3) for p in parameters]  # they and their two moments
        self._inputs = self._inputs_of(loop)
        self._tables = [table.to(items.device, copy=True) for table in self._inputs]
        self._losses = parameters[0].new_zeros(steps)
        # counters: of the steps taken, and of those kept
        self._step, self._at = (torch.zeros(1, dtype=torch.int64, device=items.device) for _ in range(2))
        self._kept: list[Tensor] = []

    def _hold_window(self) -> None:
        """Make what a window needs, where it is not there yet."""
        if self._kept:
            return
        window, items = self.limits[1], self._items
        self._kept = [tensor.new_zeros(window, *tensor.shape) for tensor in self._now]
        self._adjoint = [torch.zeros_like(tensor) for tensor in self._now]
        # what X has as cotangents in each kept step, and the tables beside them
        theta, last = self._now[0], self._kept[self._count - 1]
        embeds = (window, self._inputs[0].shape[1], self._loop.num_positions, items.shape[1])
        self._cotangents = [theta.new_zeros(embeds) for _ in range(self._count)]
        self._beside = [last] if self._count == 1 else [torch.zeros_like(last), last]
        self._limit = theta.new_zeros(())  # of the norm of what is pulled back
        self._within = torch.ones((), dtype=torch.bool, device=items.device)
        self._pulled_back = torch.zeros((), dtype=torch.float64, device=items.device)

    def _inputs_of(self, loop: InnerLoop) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The inputs of all steps of a loop, a row each, on the host."""
        users, targets, seeds, sizes = loop.first_inputs(self.limits[0])
        return users, targets, seeds, torch.as_tensor(sizes, dtype=self._now[0].dtype)

    def begin(self, loop: InnerLoop, mixture: ItemMixture) -> RecordedLoop:
        """The same, about to take the steps of another loop, on another summary."""
        alike = replace(loop, seed=self._loop.seed, restart_batches_at=self._loop.restart_batches_at)
        if alike != self._loop:
            raise ValueError("recorded steps are of loops that differ in seed and restart_batches_at only")
        self._inputs = self._inputs_of(loop)
        for table, rows in zip(self._tables, self._inputs, strict=True):
            table.copy_(pinned(rows) if table.is_cuda else rows, non_blocking=True)
        self._mixture.assign(mixture)
        return self

    def run(
        self,
        state: AdamState,
        items: Tensor,
        mixture: ItemMixture,
        *,
        until: int,
        progress: Progress = silent,
    ) -> tuple[AdamState, Tensor]:
        """`InnerLoop.run`; no progress says a loss, which would have to be waited for."""
        first = state.step
        self._check(until)
        take = self._ready(self._take)
        self._load(state)
        for step in range(first, until):
            take()
            progress("fit", step + 1 - first, until - first, {})
        return self._state(until), self._losses[first:until].clone()

    def run_window(
        self, state: AdamState, items: Tensor, mixture: ItemMixture, *, until: int, kept_limit: int = 0
    ) -> tuple[AdamState, RecordedWindow]:
        """`InnerLoop.run_window`; the states of all steps are kept, whatever the limit."""
        first = state.step
        self._check(until, kept=until - first)
        self._hold_window()
        take = self._ready(self._keep_and_take)
        self._load(state)
        for _ in range(first, until):
            take()
        loss = self._losses[until - 1].clone()
        return self._state(until), RecordedWindow(first=first, length=until - first, loss=loss)

    def pull_back(
        self,
        window: RecordedWindow,
        cotangents: tuple[Tensor, ...],
        mixture: ItemMixture,
        *,
        growth_limit: float | None = None,
    ) -> Tensor:
        """`InnerLoop.pull_back`; the cotangents are left as they are."""
        back = self._ready(self._pull_back)
        for own in self._adjoint[self._count :]:
            own.zero_()
        for own, given in zip(self._adjoint, cotangents, strict=False):
            own.copy_(given)
        self._limit.fill_(math.inf)
        if growth_limit is not None:
            self._limit.copy_(growth_limit * torch.linalg.vector_norm(cotangents[0]))
        self._within.fill_(True)
        self._pulled_back.zero_()
        self._step.fill_(window.first + window.length - 1)
        self._at.fill_(window.length - 1)
        for _ in range(window.length):
            back()
        users = self._inputs[0][window.first : window.first + window.length]
        for to_embeds, tables in zip(self._cotangents, self._beside, strict=True):
            mixture.note_steps(users, to_embeds[: window.length], tables[: window.length])
        window.pulled_back = self._pulled_back.clone()
        return mixture.gradient()

    def _check(self, until: int, *, kept: int = 0) -> None:
        """ValueError unless so many steps in all, and so many kept ones, are provided for."""
        steps, window = self.limits
        if until > steps or kept > window:
            raise ValueError(
                f"recorded for {steps} steps of which {window} are kept, asked for {until} of which {kept} are"
            )

    def _state(self, step: int) -> AdamState:
        p, m, v = (tuple(self._now[i * self._count : (i + 1) * self._count]) for i in range(3))
        return AdamState(p, m, v, step)

    def _load(self, state: AdamState) -> None:
        for own, given in zip(self._now, (t for part in state[:3] for t in part), strict=True):
            if own is not given:
                own.copy_(given)
        self._step.fill_(state.step)
        self._at.zero_()

    def _ready(self, step: Callable[[], None]) -> Callable[[], None]:
        """The recorded step; it is recorded the first time, and what it overwrites by that is put back."""
        name = step.__name__
        if name not in self._recorded:
            overwritten = [*self._now, self._losses]
            kept = [tensor.clone() for tensor in overwritten]
            self._step.zero_()
            self._at.zero_()
            self._recorded[name] = self._record(step)
            for own, before in zip(overwritten, kept, strict=True):
                own.copy_(before)
        return self._recorded[name]

    # What follows is recorded. Counters stay within their tables, for steps that are called to be recorded.

    def _row(self) -> StepInputs:
        users, targets, seeds, size = (table.index_select(0, self._step).squeeze(0) for table in self._tables)
        return StepInputs(users, targets, seeds, size)

    def _take(self) -> None:
        inputs, state = self._row(), self._state(0)
        evaluated = self._loop.evaluate(
            self._flat, state.parameters, self._items, self._mixture, inputs, create_graph=False
        )
        adam_step_(state, evaluated.gradients, self._loop.adam, inputs.size)
        self._losses.index_copy_(0, self._step, evaluated.loss.view(1))
        self._step.add_(1).clamp_(max=self.limits[0] - 1)

    def _keep_and_take(self) -> None:
        for table, tensor in zip(self._kept, self._now, strict=True):
            table.index_copy_(0, self._at, tensor.unsqueeze(0))
        self._at.add_(1).clamp_(max=self.limits[1] - 1)
        self._take()

    def _pull_back(self) -> None:
        rows = tuple(table.index_select(0, self._at).squeeze(0) for table in self._kept)
        n = self._count
        state = AdamState(rows[:n], rows[n : 2 * n], rows[2 * n :], 0)
        evaluated = self._loop.evaluate(
            self._flat, state.parameters, self._items, self._mixture, self._row(), create_graph=True
        )
        adjoint = list(zip(self._adjoint[:n], self._adjoint[n : 2 * n], self._adjoint[2 * n :], strict=True))
        notes = _Notes(self._mixture)
        self._loop.pull_back_step(WindowStep(state, evaluated), adjoint, notes)
        for table, (cotangent, _) in zip(self._cotangents, notes.noted, strict=True):
            counted = torch.where(self._within, cotangent, 0.0)
            table.index_copy_(0, self._at, counted.unsqueeze(0))
        # the last note is of the parameters, which are kept already
        for table, (_, beside) in zip(self._beside[:-1], notes.noted, strict=False):
            counted = torch.where(self._within, beside, 0.0)  # 0 times what has overflown would not be 0
            table.index_copy_(0, self._at, counted.unsqueeze(0))
        self._pulled_back.add_(self._within)
        norm = torch.linalg.vector_norm(self._adjoint[0])
        self._within.logical_and_((norm <= self._limit) | self._limit.isinf())
        self._step.sub_(1).clamp_(min=0)
        self._at.sub_(1).clamp_(min=0)


class _Notes:
    """A mixture whose notes are kept as they are."""

    def __init__(self, mixture: ItemMixture) -> None:
        self._mixture = mixture
        self.noted: list[tuple[Tensor, Tensor]] = []

    def embed(self, users: Tensor, items: Tensor) -> Tensor:
        return self._mixture.embed(users, items)

    def embed_transposed(self, users: Tensor, cotangent: Tensor) -> Tensor:
        return self._mixture.embed_transposed(users, cotangent)

    def note(self, users: Tensor, cotangent: Tensor, items: Tensor) -> None:
        self.noted.append((cotangent, items))
