"""Steps done in processes of their own, some at a time, ahead of whoever asks for their results one by one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from td3_fast.own_process import OwnProcess
from td3_fast.run_folder import Stopped, Watcher


@dataclass(frozen=True, kw_only=True)
class Step:
    """Work that leaves what it made in a folder, by which it is known, and returns what of it is asked for."""

    label: str  # in words
    folder: Path
    work: Callable[[Watcher], Any]  # picklable, and what it returns too, where it is to be done ahead
    after: Path | None = None  # the folder of the step whose results it needs


class Ahead:
    """Does steps in `processes` processes, in their order but for those that wait for another; a context.

    Of steps with one folder the first is done. threads: of each process. An error or a stop ends it all, and comes
    out of the next `result`.
    """

    def __init__(self, steps: Iterable[Step], *, processes: int, threads: int, watcher: Watcher) -> None:
        self._steps: dict[Path, Step] = {}
        for step in steps:
            self._steps.setdefault(step.folder, step)
        self._waiting = list(self._steps.values())
        self._threads = threads
        self._watcher = watcher
        self._results: dict[Path, Any] = {}
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._ended = False
        self._processes: list[OwnProcess] = []
        self._workers = [
            threading.Thread(target=self._serve, args=(number,), daemon=True)
            for number in range(1, min(processes, len(self._steps)) + 1)
        ]

    def __enter__(self) -> Ahead:
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
            if isinstance(error, KeyboardInterrupt):  # who asks twice does not wait
                for process in self._processes:
                    process.kill()
        for worker in self._workers:
            worker.join()

    def result(self, step: Step) -> Any:
        """What the step with this folder returned, once it is done.

        Raises:
            Exception: what a step raised, this one or another, `Stopped` included.
        """
        with self._changed:
            while step.folder not in self._results and self._error is None:
                self._changed.wait()
            if self._error is not None:
                raise self._error
            return self._results[step.folder]

    def _serve(self, number: int) -> None:
        """A thread that has one process do one step after another."""
        label = ""
        try:
            with OwnProcess(threads=self._threads) as process:
                with self._changed:
                    self._processes.append(process)
                while (step := self._next()) is not None:
                    label = step.label
                    self._watcher.say(f"process {number} begins: {label}")
                    begun = time.monotonic()
                    result = process.call(step.work, self._watcher_of(number))
                    self._watcher.progress(f"process {number}, done", 1, 1, {})
                    self._watcher.say(
                        f"process {number} has done: {label}, in {time.monotonic() - begun:.0f} s"
                    )
                    with self._changed:
                        self._results[step.folder] = result
                        self._changed.notify_all()
        except BaseException as error:  # the thread that asks for results raises it
            with self._changed:
                first = self._error is None
                self._error = self._error or error
                self._ended = True
                self._changed.notify_all()
            if first and isinstance(error, Exception) and not isinstance(error, Stopped):
                with contextlib.suppress(Exception):  # it may be this that cannot be done
                    self._watcher.say(f"process {number} has failed: {label}")

    def _next(self) -> Step | None:
        """The first step that waits for no other one; None once there is nothing more to do."""
        with self._changed:
            while self._waiting and not self._ended:
                if self._watcher.stop():
                    raise Stopped
                for step in self._waiting:
                    if step.after is None or step.after not in self._steps or step.after in self._results:
                        self._waiting.remove(step)
                        return step
                self._changed.wait()
            return None

    def _watcher_of(self, number: int) -> Watcher:
        def progress(stage: str, done: int, total: int, values: Mapping[str, float]) -> None:
            self._watcher.progress(f"process {number}, {stage}", done, total, values)

        return Watcher(
            progress=progress,
            say=lambda text: self._watcher.say(f"process {number}: {text}"),
            stop=lambda: self._ended or self._watcher.stop(),
        )
