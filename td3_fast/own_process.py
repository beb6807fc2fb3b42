"""Work done in a process of its own, so that its memory can be told from that of all else."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from td3_fast.run_folder import Watcher

Result = TypeVar("Result")
SECONDS_BETWEEN_MESSAGES = 0.1
SECONDS_TO_END = 5.0


def in_own_process(
    work: Callable[[Watcher], Result], watcher: Watcher, *, threads: int | None = None
) -> Result:
    """What `work` returns, called in a new process with `threads` of torch, else as many; it has to be picklable.

    The watcher that it is called with hands on to `watcher`, which it may hear of a stop from.

    Raises:
        RuntimeError: the process ended without an answer.
        Exception: whatever `work` raised, `Stopped` included.
    """
    context = multiprocessing.get_context("spawn")
    messages = context.Queue()
    stop = context.Event()
    threads = torch.get_num_threads() if threads is None else threads
    process = context.Process(target=_serve, args=(work, threads, messages, stop), daemon=True)
    process.start()
    try:
        return _listen(process, messages, stop, watcher)
    finally:
        process.join(SECONDS_TO_END)
        if process.is_alive():
            process.terminate()
            process.join()


def _listen(process: Any, messages: Any, stop: Any, watcher: Watcher) -> Any:
    while True:
        if watcher.stop():
            stop.set()
        ended = not process.is_alive()  # before looking, so that nothing it said goes unheard
        try:
            kind, content = messages.get(timeout=SECONDS_BETWEEN_MESSAGES)
        except queue.Empty:
            if ended:
                raise RuntimeError(
                    f"the process of a step ended with exit code {process.exitcode} and no answer; was it killed, or "
                    "short of memory?"
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


def _serve(work: Callable[[Watcher], Any], threads: int, messages: Any, stop: Any) -> None:
    # an interruption of the whole group is the first process's to act on
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
        return bool(stop.is_set()) or (first is not None and not first.is_alive())

    watcher = Watcher(progress=progress, say=lambda text: messages.put(("say", text)), stop=stopped)
    try:
        messages.put(("result", work(watcher)))
    except Exception as error:  # whatever it is, the first process raises it again
        messages.put(("error", error))
