"""Work in a process of its own: what comes back, and how it ends."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

import pytest
import torch

from td3_fast.own_process import OwnProcess, in_own_process
from td3_fast.run_folder import Stopped, Watcher


def report(watcher: Watcher) -> tuple[int, int]:
    watcher.say("begun")
    watcher.progress("work", 1, 1, {"loss": 2.0})
    return os.getpid(), torch.get_num_threads()


def refuse(watcher: Watcher) -> None:
    raise ValueError("a size is USERSxPOSITIONS")


def vanish(watcher: Watcher) -> None:
    os._exit(3)


def wait(watcher: Watcher) -> None:
    while True:
        watcher.interruptible("work", 0, 1, {})
        time.sleep(0.01)


@dataclass
class Heard:
    said: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    stop: bool = False

    def watcher(self) -> Watcher:
        def progress(stage: str, *rest: object) -> None:
            self.stages.append(stage)
            self.stop = stage == "work"

        return Watcher(progress=progress, say=self.said.append, stop=lambda: self.stop)


def test_the_result_comes_back_and_the_watcher_hears_of_it() -> None:
    heard = Heard()
    process, threads = in_own_process(report, heard.watcher())
    assert process != os.getpid()
    assert threads == torch.get_num_threads()
    assert heard.said == ["begun"]
    assert heard.stages == ["work"]


def test_an_error_is_raised_here() -> None:
    with pytest.raises(ValueError, match="USERSxPOSITIONS"):
        in_own_process(refuse, Watcher())


def test_a_stop_reaches_the_work() -> None:
    with pytest.raises(Stopped):
        in_own_process(wait, Heard().watcher())


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="exit code 3"):
        in_own_process(vanish, Watcher())


class Awkward(Exception):
    """One that a pickle cannot make again."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def raise_awkward(watcher: Watcher) -> None:
    raise Awkward("no", "luck")


def test_an_error_that_cannot_be_sent_still_says_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="Awkward: no luck"):
        in_own_process(raise_awkward, Watcher())


def test_one_process_does_one_piece_of_work_after_another() -> None:
    with OwnProcess(threads=3) as process:
        first, second = (process.call(report, Watcher()) for _ in range(2))
    assert first == second == (first[0], 3)
