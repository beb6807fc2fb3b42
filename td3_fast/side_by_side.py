"""Steps done in processes of their own, some at a time, ahead of whoever asks for them one by one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from td3_fast.own_process import in_own_process
from td3_fast.run_folder import Watcher


@dataclass(frozen=True, kw_only=True)
class Step:
    """Work whose results are in a folder, by which it is known; done once more it finds them there."""

    label: str  # in words
    folder: Path
    work: Callable[[Watcher], Any]  # picklable where it is to be done ahead
    after: Path | None = None  # the folder of the step whose results it needs


class Ahead:
    """Does steps in `processes` processes, in their order but for those that wait for another; a context.

    Of steps with one folder the first is done. threads: of each process. An error or a stop ends it all, and comes
    out of the next `wait`.
    """

    def __init__(self, steps: Iterable[Step], *, processes: int, threads: int, watcher: Watcher) -> None:
        self._steps = {step.folder: step for step in reversed(list(steps))}
        self._waiting = list(reversed(self._steps.values()))
        self._threads = threads
        self._watcher = watcher
        self._done: set[Path] = set()
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._ended = False
        self._said = threading.Lock()
        self._workers = [
            threading.Thread(target=self._serve, args=(number,), daemon=True)
            for number in range(1, processes + 1)
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
        for worker in self._workers:
            worker.join()

    def wait(self, folder: Path) -> None:
        """Return once the step with this folder is done, at once where there is none.

        Raises:
            Exception: what a step raised, this one or another, `Stopped` included.
        """
        with self._changed:
            while folder in self._steps and folder not in self._done and self._error is None:
                self._changed.wait()
            if self._error is not None:
                raise self._error

    def _serve(self, number: int) -> None:
        while (step := self._next()) is not None:
            self._say(f"process {number} begins: {step.label}")
            begun = time.monotonic()
            try:
                in_own_process(_Only(step.work), self._watcher_of(number), threads=self._threads)
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
                    self._ended = True
                    self._changed.notify_all()
                return
            self._say(f"process {number} has done: {step.label}, in {time.monotonic() - begun:.0f} s")
            with self._changed:
                self._done.add(step.folder)
                self._changed.notify_all()

    def _next(self) -> Step | None:
        """The first step that waits for no other one; None once there is nothing more to do."""
        with self._changed:
            while self._waiting and not self._ended:
                for step in self._waiting:
                    if step.after is None or step.after not in self._steps or step.after in self._done:
                        self._waiting.remove(step)
                        return step
                self._changed.wait()
            return None

    def _say(self, text: str) -> None:
        with self._said:
            self._watcher.say(text)

    def _watcher_of(self, number: int) -> Watcher:
        def progress(stage: str, done: int, total: int, values: Mapping[str, float]) -> None:
            with self._said:
                self._watcher.progress(f"process {number}, {stage}", done, total, values)

        return Watcher(
            progress=progress, say=lambda text: None, stop=lambda: self._ended or self._watcher.stop()
        )


class _Only:
    """A step's work without what it returns, which the folder holds as well."""

    def __init__(self, work: Callable[[Watcher], object]) -> None:
        self._work = work

    def __call__(self, watcher: Watcher) -> None:
        self._work(watcher)
