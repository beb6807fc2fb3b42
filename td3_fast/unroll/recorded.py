"""The inner loop for a GPU: each kind of step recorded once and replayed, with nothing for the host to decide.

A step of the paper's size is ten to two hundred launches of a few microseconds' work, so that launching takes most of
the time. A CUDA graph launches them at once, but with the arguments that they were captured with. Here whatever differs
from step to step lies in tensors that stay where they are, and counters on the device say which rows of them are meant.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from td3_fast.ops import for_inner_gradient
from td3_fast.progress import Progress, silent
from td3_fast.unroll.adam import AdamState, adam_step_
from td3_fast.unroll.inner import InnerLoop
from td3_fast.unroll.mixture import ItemMixture, pinned
from td3_fast.unroll.window import StepInputs, WindowStep

# Turns a step, which takes and returns nothing, into what does the same when it is called.
Recorder = Callable[[Callable[[], None]], Callable[[], None]]

# of a step before it is captured: in the first ones libraries choose their kernels and allocate
WARM_UP_CALLS = 3
# Recorded together, so that fewer graphs are launched.
STEPS_IN_A_GRAPH = 8
# that are called before and while they are recorded, at most
STEPS_TO_RECORD = (WARM_UP_CALLS + 1) * STEPS_IN_A_GRAPH
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
    window keeps states and no graphs, so that its steps are evaluated once more on the way back, unless their
    gradient is enough for that, and that one that is cut short is gone through to its end, adding zeros. States
    that are returned are overwritten by the next call. No tensor is read on the host.

    loop: one of the loops; parameters, items: as those of a state, and the table where it holds none; mixture: of the
    kind and size of all that follow; steps, window: the most that a loop takes, and that are kept; losses: whether
    `run` returns those of its steps.
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
        losses: bool = True,
    ) -> None:
        self._loop = loop
        self._flat = loop.flat_parameters
        # whether a step is pulled back by the gradient that it was taken with, which is kept then
        self._keeps_gradients = loop.gradient_is_enough(self._flat, parameters, items)
        self._items = for_inner_gradient(items) if self._keeps_gradients else items
        self._mixture = mixture.twin()
        self._record = record
        self._recorded: dict[tuple[str, int], Callable[[], None]] = {}
        self.limits = (steps, window)
        self._count = len(parameters)

        # each parameter and its two moments in one tensor, which is kept at once
        self._states = [p.new_zeros(3, *p.shape) for p in parameters]
        self._now = [state[i] for i in range(3) for state in self._states]
        self._inputs = loop.first_inputs(steps)
        self._row_shapes = [
            tensor.shape[1:] for tensor in (self._inputs.users, self._inputs.targets, self._inputs.seeds)
        ]
        # steps are called to be recorded, and count rows even where there are fewer
        self._table = self._packed(self._inputs, rows=max(steps, STEPS_TO_RECORD)).to(items.device, copy=True)
        self._losses = parameters[0].new_zeros(len(self._table))
        self._notes_losses = losses
        # of the steps taken, and of those kept
        self._counters = torch.zeros(2, dtype=torch.int64, device=items.device)
        self._step, self._at = self._counters[:1], self._counters[1:]
        self._kept: list[Tensor] = []

    def _hold_window(self) -> None:
        """Make what a window needs, where it is not there yet."""
        if self._kept:
            return
        window, items = max(self.limits[1], STEPS_TO_RECORD), self._items
        self._kept = [state.new_zeros(window, *state.shape) for state in self._states]
        self._kept_gradients = self._now[0].new_zeros(window if self._keeps_gradients else 0, self._flat.size)
        self._adjoint = [torch.zeros_like(tensor) for tensor in self._now]
        # what X has as cotangents in each kept step, and the tables beside them
        theta, last = self._now[0], self._kept[-1][:, 0]
        embeds = (window, self._inputs.users.shape[1], self._loop.num_positions, items.shape[1])
        self._cotangents = [theta.new_zeros(embeds) for _ in range(self._count)]
        self._beside = [last] if self._count == 1 else [torch.zeros_like(last), last]
        self._limit = theta.new_zeros(())  # of the norm of what is pulled back
        self._within = torch.ones((), dtype=torch.bool, device=items.device)
        self._pulled_back = torch.zeros((), dtype=torch.float64, device=items.device)

    def _packed(self, inputs: StepInputs, *, rows: int) -> Tensor:
        """The inputs of all steps, a row each, so that a step reads them at once: (rows, ...) int64, on the host.

        Of the size of the optimiser's step the bits.
        """
        sizes = torch.as_tensor(inputs.size, dtype=self._now[0].dtype).unsqueeze(1)
        bits = sizes.view(torch.int64 if sizes.dtype == torch.float64 else torch.int32)
        table = torch.cat(
            [inputs.users, inputs.targets.flatten(1), inputs.seeds, bits.to(torch.int64)], dim=1
        )
        return torch.cat([table, table[-1:].expand(rows - len(table), -1)])

    def _row(self) -> StepInputs:
        """The inputs of the step that is next, as `_packed` laid them out."""
        row = self._table.index_select(0, self._step).squeeze(0)
        users, targets, seeds, bits = row.split([*map(math.prod, self._row_shapes), 1])
        size = bits.view(self._now[0].dtype)[0]  # of four bytes the lower ones
        return StepInputs(users, targets.view(self._row_shapes[1]), seeds, size)

    def begin(self, loop: InnerLoop, mixture: ItemMixture) -> RecordedLoop:
        """The same, about to take the steps of another loop, on another summary."""
        alike = replace(loop, seed=self._loop.seed, restart_batches_at=self._loop.restart_batches_at)
        if alike != self._loop:
            raise ValueError("recorded steps are of loops that differ in seed and restart_batches_at only")
        self._inputs = loop.first_inputs(self.limits[0])
        rows = self._packed(self._inputs, rows=len(self._table))
        self._table.copy_(pinned(rows) if self._table.is_cuda else rows, non_blocking=True)
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
        self._record_steps(self._take)
        self._load(state)
        for taken in self._repeat(self._take, until - first):
            progress("fit", taken, until - first, {})
        losses = self._losses[first:until] if self._notes_losses else self._losses[:0]
        return self._state(until), losses.clone()

    def run_window(
        self, state: AdamState, items: Tensor, mixture: ItemMixture, *, until: int, kept_limit: int = 0
    ) -> tuple[AdamState, RecordedWindow]:
        """`InnerLoop.run_window`; the states of all steps are kept, whatever the limit."""
        first = state.step
        self._check(until, kept=until - first)
        self._hold_window()
        self._record_steps(self._keep_and_take)
        self._load(state)
        for _ in self._repeat(self._keep_and_take, until - first):
            pass
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
        back = self._pull_back if growth_limit is None else self._pull_back_within_limit
        self._record_steps(back)
        for own in self._adjoint[self._count :]:
            own.zero_()
        for own, given in zip(self._adjoint, cotangents, strict=False):
            own.copy_(given)
        if growth_limit is not None:
            self._limit.copy_(growth_limit * torch.linalg.vector_norm(cotangents[0]))
            self._within.fill_(True)
            self._pulled_back.zero_()
        self._step.fill_(window.first + window.length - 1)
        self._at.fill_(window.length - 1)
        for _ in self._repeat(back, window.length):
            pass
        users = self._inputs.users[window.first : window.first + window.length]
        for to_embeds, tables in zip(self._cotangents, self._beside, strict=True):
            mixture.note_steps(users, to_embeds[: window.length], tables[: window.length])
        window.pulled_back = window.length if growth_limit is None else self._pulled_back.clone()
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

    def _record_steps(self, step: Callable[[], None]) -> None:
        """Record a step, and a few at once, where they are not yet; what is overwritten by that is put back."""
        for count in (1, STEPS_IN_A_GRAPH):
            if (step.__name__, count) in self._recorded:
                continue
            overwritten = [*self._states, self._losses]
            kept = [tensor.clone() for tensor in overwritten]
            self._counters.fill_(STEPS_TO_RECORD - 1 if step in self._backwards else 0)

            def steps(count: int = count) -> None:
                for _ in range(count):
                    step()

            self._recorded[step.__name__, count] = self._record(steps)
            for own, before in zip(overwritten, kept, strict=True):
                own.copy_(before)

    def _repeat(self, step: Callable[[], None], count: int) -> Iterator[int]:
        """Replay so many recorded steps; says how many they are so far after each few."""
        done = 0
        while done < count:
            at_once = STEPS_IN_A_GRAPH if count - done >= STEPS_IN_A_GRAPH else 1
            self._recorded[step.__name__, at_once]()
            done += at_once
            yield done

    @property
    def _backwards(self) -> tuple[Callable[[], None], ...]:
        return (self._pull_back, self._pull_back_within_limit)

    # What follows is recorded.

    def _take(self) -> None:
        loss, _ = self._taken()
        if self._notes_losses:
            self._losses.index_copy_(0, self._step, loss.view(1))
        self._counters.add_(1)

    def _taken(self) -> tuple[Tensor, Tensor]:
        """Take a step; returns its loss and the gradient of the parameters."""
        inputs, state = self._row(), self._state(0)
        evaluated = self._loop.evaluate(
            self._flat, state.parameters, self._items, self._mixture, inputs, create_graph=False
        )
        adam_step_(state, evaluated.gradients, self._loop.adam, inputs.size)
        return evaluated.loss, evaluated.gradients[0]

    def _keep_and_take(self) -> None:
        for table, state in zip(self._kept, self._states, strict=True):
            table.index_copy_(0, self._at, state.unsqueeze(0))
        loss, gradient = self._taken()
        if self._keeps_gradients:
            self._kept_gradients.index_copy_(0, self._at, gradient.unsqueeze(0))
        self._losses.index_copy_(0, self._step, loss.view(1))
        self._counters.add_(1)

    def _pull_back(self) -> None:
        for table, counted in self._pulled_back_step():
            table.index_copy_(0, self._at, counted.unsqueeze(0))
        self._counters.sub_(1)

    def _pull_back_within_limit(self) -> None:
        for table, cotangent in self._pulled_back_step():
            counted = torch.where(self._within, cotangent, 0.0)  # 0 times what has overflown would not be 0
            table.index_copy_(0, self._at, counted.unsqueeze(0))
        self._pulled_back.add_(self._within)
        self._within.logical_and_(torch.linalg.vector_norm(self._adjoint[0]) <= self._limit)
        self._counters.sub_(1)

    def _pulled_back_step(self) -> list[tuple[Tensor, Tensor]]:
        """The adjoint before the kept step that is next; returns tables, and what belongs into their rows of it."""
        rows = [table.index_select(0, self._at).squeeze(0) for table in self._kept]
        p, m, v = (tuple(row[i] for row in rows) for i in range(3))
        state = AdamState(p, m, v, 0)
        gradient = None
        if self._keeps_gradients:
            gradient = self._kept_gradients.index_select(0, self._at).squeeze(0)
        evaluated = self._loop.evaluate(
            self._flat,
            state.parameters,
            self._items,
            self._mixture,
            self._row(),
            create_graph=True,
            gradient=gradient,
        )
        n = self._count
        adjoint = list(zip(self._adjoint[:n], self._adjoint[n : 2 * n], self._adjoint[2 * n :], strict=True))
        notes = _Notes(self._mixture)
        self._loop.pull_back_step(WindowStep(state, evaluated), adjoint, notes)
        cotangents = [cotangent for cotangent, _ in notes.noted]
        # the last note is of the parameters, which are kept already
        beside = [tensor for _, tensor in notes.noted[:-1]]
        return [*zip(self._cotangents, cotangents, strict=True), *zip(self._beside[:-1], beside, strict=True)]


class _Notes:
    """A mixture whose notes are kept as they are."""

    def __init__(self, mixture: ItemMixture) -> None:
        self._mixture = mixture
        self.whole = mixture.whole
        self.noted: list[tuple[Tensor, Tensor]] = []

    def embed(self, users: Tensor, items: Tensor) -> Tensor:
        return self._mixture.embed(users, items)

    def embed_transposed(self, users: Tensor, cotangent: Tensor) -> Tensor:
        return self._mixture.embed_transposed(users, cotangent)

    def note(self, users: Tensor, cotangent: Tensor, items: Tensor) -> None:
        self.noted.append((cotangent, items))
