"""Work done in a process of its own, so that its memory can be told from that of all else, or beside other work."""

from __future__ import annotations

import multiprocessing
import pickle
import queue
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

import torch

from td3_fast.run_folder import Stopped, Watcher

Result = TypeVar("Result")
SECONDS_BETWEEN_MESSAGES = 0.1
SECONDS_TO_END = 5.0


def in_own_process(work: Callable[[Watcher], Result], watcher: Watcher) -> Result:
    """What `work` returns, called in a new process with as many threads of torch, as `OwnProcess.call` does."""
    with OwnProcess(threads=torch.get_num_threads()) as process:
        return process.call(work, watcher)


class OwnProcess:
    """A new process that does one piece of work after another; a context, at whose end it ends.

    An interruption of the whole group of processes is the first process's to act on; a SIGTERM stops the work.
    """

    def __init__(self, *, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._requests, self._messages, self._stop = context.Queue(), context.Queue(), context.Event()
        self._process = context.Process(
            target=_serve, args=(threads, self._requests, self._messages, self._stop), daemon=True
        )
        # until it can say itself that an interruption is not for it
        with _SignalsHeld():
            self._process.start()

    def call(self, work: Callable[[Watcher], Result], watcher: Watcher) -> Result:
        """What `work`, which has to be picklable, returns; the watcher that it is called with hands on to `watcher`.

        Raises:
            RuntimeError: the process ended without an answer.
            Exception: whatever `work` raised, `Stopped` included.
        """
        self._requests.put(work)
        while True:
            if watcher.stop():
                self._stop.set()
            ended = not self._process.is_alive()  # before looking, so that nothing it said goes unheard
            try:
                kind, content = self._messages.get(timeout=SECONDS_BETWEEN_MESSAGES)
            except queue.Empty:
                if ended and self._stop.is_set():
                    raise Stopped from None
                if ended:
                    raise RuntimeError(
                        f"the process of a step ended with exit code {self._process.exitcode} and no answer; was it "
                        "killed, or short of memory?"
                    ) from None
                continue
            if kind == "result":
                return content
            if kind == "error":
                raise content
            if kind == "progress":
                watcher.progress(*content)
            else:
                watcher.say(content)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def __enter__(self) -> OwnProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._requests.cancel_join_thread()  # nobody may be left to read what it still holds
        self._process.join(SECONDS_TO_END)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class _SignalsHeld:
    """While entered, this thread and what process it starts hear of no SIGINT or SIGTERM, where systems can do so."""

    def __enter__(self) -> None:
        if hasattr(signal, "pthread_sigmask"):
            self._before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))

    def __exit__(self, *error: object) -> None:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_SETMASK, self._before)


def _serve(threads: int, requests: Any, messages: Any, stop: Any) -> None:
    terminated = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: terminated.append(number))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    torch.set_num_threads(threads)
    told = 0.0

    def progress(stage: str, done: int, total: int, values: Mapping[str, float]) -> None:
        nonlocal told
        now = time.monotonic()
        if done == total or now >= told + SECONDS_BETWEEN_MESSAGES:
            told = now
            messages.put(("progress", (stage, done, total, dict(values))))

    def stopped() -> bool:
        # one that was killed cannot ask for it, and whoever goes on must not find this process still writing
        first = multiprocessing.parent_process()
        return bool(terminated or stop.is_set()) or (first is not None and not first.is_alive())

    watcher = Watcher(progress=progress, say=lambda text: messages.put(("say", text)), stop=stopped)
    while not stopped():
        try:
            work: Callable[[Watcher], Any] = requests.get(timeout=SECONDS_BETWEEN_MESSAGES)
        except queue.Empty:
            continue
        try:
            messages.put(("result", work(watcher)))
        except Exception as error:
            # whatever it is: the first process raises it again, and without an answer would wait for ever
            messages.put(("error", _sendable(error)))


def _sendable(error: Exception) -> Exception:
    """The error, with where it came from as a note, or what it says where it does not survive a pickle."""
    if hasattr(error, "add_note"):
        error.add_note(f"in a process of its own:\n{traceback.format_exc()}")
    try:
        return error if type(pickle.loads(pickle.dumps(error))) is type(error) else RuntimeError(str(error))
    except Exception:  # a pickle runs the code of the error's class, which may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
