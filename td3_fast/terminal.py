"""What commands show at a terminal, how they fail, and how long work is asked to stop."""

from __future__ import annotations

import functools
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, NoReturn, TextIO, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Result = TypeVar("Result")
INTERRUPTED = 130
SECONDS_BETWEEN_LINES = 10.0
# stage of a `td3_fast.progress.Progress`, "distill" or "process 1, distill" -> what it is called, and its unit
STAGES = {
    "train": ("training on real data, at most", "batches"),
    "fit": ("training on the summary", "steps"),
    "distill": ("distilling", "outer steps"),
    "evaluate": ("evaluating", "runs"),
    "search": ("searching", "runs"),
    "tune": ("choosing how to train", "runs"),
    "export": ("choosing items", "positions"),
}
# stages that others run inside of; "done" ends them all
AROUND = ("evaluate", "distill", "search", "tune", "done")
FIGURES = {
    "loss": "loss",
    "cross_entropy": "cross-entropy",
    "alignment": "alignment",
    "inner": "inner loss",
    "gradient_norm": "gradient norm",
    "NDCG@10": "validation NDCG@10",
    "MRR@10": "MRR@10",
    "validation_cross_entropy": "validation cross-entropy",
}


# where nobody looks through a window, tables are as wide as they need; what lies between colons may be a line number
console = Console(emoji=False) if sys.stdout.isatty() else Console(width=110, emoji=False)
_errors = Console(stderr=True, emoji=False)


@dataclass
class _Settings:
    tracebacks: bool = False  # of errors that the user can mend


settings = _Settings()


class Interrupted(Exception):
    """The user stopped a command; the text says how to go on."""


def say(text: str = "") -> None:
    """Print a line as it is."""
    _print(console, text)


def _print(to: Console, text: str) -> None:
    """As it is, but for characters that the terminal does not have: a name of a file may hold any bytes."""
    text = text.encode(to.encoding, errors="backslashreplace").decode(to.encoding)
    to.print(text, highlight=False, markup=False, soft_wrap=True)


def guarded(command: Callable[..., Result]) -> Callable[..., Result]:
    """One clear sentence and exit code 2 for what the user can mend, 130 for an interruption.

    Errors that the user cannot mend come through as they are; all do where `settings.tracebacks` is set.
    """

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> Result:
        in_main_thread = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, signal.default_int_handler) if in_main_thread else None
        shown, warnings.showwarning = warnings.showwarning, _show_warning
        try:
            return command(*arguments, **options)
        except Interrupted as stop:
            fail(str(stop), INTERRUPTED)
        except KeyboardInterrupt:
            fail("stopped", INTERRUPTED)
        except (ValueError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
            if settings.tracebacks or not _is_for_users(error):
                raise
            fail(f"error: {error}", 1 if isinstance(error, ArithmeticError) else 2)
        finally:
            warnings.showwarning = shown
            if before is not None:
                signal.signal(signal.SIGTERM, before)

    return run


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """In a sentence, without the line of code that it came from."""
    _print(_errors, f"warning: {message}")


def _is_for_users(error: Exception) -> bool:
    from td3_fast.data import FetchError

    if isinstance(error, ImportError):
        return error.__cause__ is not None  # one that says what to install
    return isinstance(error, ValueError | OSError | FetchError | FloatingPointError)


def fail(text: str, code: int) -> NoReturn:
    """End the command with a sentence and an exit code."""
    _print(_errors, text)
    raise typer.Exit(code)


def _who_and_kind(stage: str) -> tuple[str, str]:
    """("process 1", "distill") of "process 1, distill"."""
    who, _, kind = stage.rpartition(", ")
    return who, kind


def _words_for(stage: str) -> tuple[str, str]:
    """What a stage is called, and its unit."""
    who, kind = _who_and_kind(stage)
    name, unit = STAGES.get(kind, (kind, ""))
    return f"{who}: {name}" if who else name, unit


class Display:
    """Progress as bars where `console` is a terminal, else as a line every ten seconds at most.

    A stage inside another one (a training run of an evaluation) has a bar, or a part of the line, of its own, and so
    have the stages of each process where several work; time left is an upper bound where training may stop early.
    Several threads may call it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[
            str, tuple[float, int]
        ] = {}  # stage -> when it was first heard of, and at what count
        self._latest: dict[str, tuple[int, int]] = {}  # stage -> done, total
        self._figures: dict[str, dict[str, float]] = {}
        self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        self._lock = threading.Lock()  # not for `say`, which a signal may call in the middle of all else

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("left"),
                TimeRemainingColumn(compact=True),
                TextColumn("[dim]{task.fields[figures]}"),
                console=self._console,
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        """Print a line, above the bars."""
        _print(self._console, text)

    def progress(self, stage: str, done: int, total: int, values: Mapping[str, float]) -> None:
        """A `td3_fast.progress.Progress`."""
        with self._lock:
            self._take(stage, done, total, values)

    def _take(self, stage: str, done: int, total: int, values: Mapping[str, float]) -> None:
        if stage not in self._latest or done < self._latest[stage][0]:
            self._started[stage] = time.monotonic(), done
            self._figures[stage] = {}
            self._remove_bar(stage)
        self._latest[stage] = done, total
        who, kind = _who_and_kind(stage)
        for other, (reached, end) in list(self._latest.items()):
            # what ran inside is over, and so is what has come to its end
            if other != stage and _who_and_kind(other)[0] == who and (kind in AROUND or reached >= end):
                del self._latest[other]
                self._remove_bar(other)
        if kind == "done":
            del self._latest[stage]
            return
        self._figures[stage] |= {name: value for name, value in values.items() if name in FIGURES}
        if self._bars is not None:
            self._draw(self._bars, stage, done, total)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            self.say("; ".join(map(self._words, self._latest)))

    def _remove_bar(self, stage: str) -> None:
        if stage in self._tasks and self._bars is not None:
            self._bars.remove_task(self._tasks.pop(stage))

    def _draw(self, bars: Progress, stage: str, done: int, total: int) -> None:
        figures = self._shown(stage)
        if stage not in self._tasks:
            name, _ = _words_for(stage)
            self._tasks[stage] = bars.add_task(name, total=total, completed=done, figures=figures)
        bars.update(self._tasks[stage], completed=done, total=total, figures=figures)

    def _shown(self, stage: str) -> str:
        found = self._figures[stage]
        return ", ".join(f"{label} {found[name]:.4g}" for name, label in FIGURES.items() if name in found)

    def _words(self, stage: str) -> str:
        name, unit = _words_for(stage)
        done, total = self._latest[stage]
        begun, first = self._started[stage]
        words = [f"{name} {done:,}/{total:,} {unit}".rstrip()]
        if figures := self._shown(stage):
            words.append(figures)
        if done > first:
            words.append(f"{duration((total - done) * (time.monotonic() - begun) / (done - first))} left")
        return ", ".join(words)


class Interrupts:
    """While entered, the first SIGINT or SIGTERM sets `requested`, and the second raises KeyboardInterrupt.

    on_request: called at the first. Outside of Python's main thread, signals are left alone.
    """

    def __init__(self, on_request: Callable[[], None]) -> None:
        self.requested = False
        self._on_request = on_request
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._on_request()


def duration(seconds: float) -> str:
    """Seconds in words: "4.2 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
