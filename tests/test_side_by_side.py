"""Steps in processes of their own: their order, how they are waited for, and how errors and stops end them."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from td3_fast.run_folder import Stopped, Watcher
from td3_fast.side_by_side import Ahead, Step


def leave(folder: Path, watcher: Watcher, *, others: tuple[Path, ...] = ()) -> list[str]:
    """Which of `others` are there already."""
    watcher.progress("work", 1, 1, {})
    watcher.say("at work")
    folder.mkdir()
    return [other.name for other in others if other.exists()]


def refuse(watcher: Watcher) -> None:
    raise ValueError("no such size")


def linger(watcher: Watcher) -> None:
    while True:
        watcher.interruptible("work", 0, 1, {})
        time.sleep(0.01)


def sleep(watcher: Watcher) -> None:
    watcher.progress("work", 0, 1, {})
    time.sleep(60)


def step(folder: Path, work: Callable[..., object] | None = None, **options: Any) -> Step:
    return Step(label=folder.name, folder=folder, work=work or partial(leave, folder), **options)


def test_steps_keep_their_order_but_for_what_they_need_and_none_is_done_twice(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    said: list[str] = []
    stages: list[str] = []
    watcher = Watcher(progress=lambda stage, *rest: stages.append(stage), say=said.append)
    steps = [
        step(second, partial(leave, second, others=(first, third)), after=first),
        step(first, partial(leave, first, others=(third,))),
        step(third, partial(leave, third, others=(first, second))),
        step(first, refuse),
    ]
    with Ahead(steps, processes=1, threads=1, watcher=watcher) as ahead:
        assert [ahead.result(one) for one in steps] == [["first"], [], ["first", "second"], []]
    assert stages == ["process 1, work", "process 1, done"] * 3
    assert [line.split(", in ")[0] for line in said if "begins" not in line] == [
        line
        for name in ("first", "second", "third")
        for line in ("process 1: at work", f"process 1 has done: {name}")
    ]


def test_what_one_step_raises_comes_out_and_nothing_else_is_begun(tmp_path: Path) -> None:
    said: list[str] = []
    last = step(tmp_path / "last", after=tmp_path / "bad")
    steps = [step(tmp_path / "bad", refuse), last]
    with Ahead(steps, processes=2, threads=1, watcher=Watcher(say=said.append)) as ahead:
        for _ in range(2):
            with pytest.raises(ValueError, match="no such size"):
                ahead.result(last)
    assert not last.folder.exists()
    assert any(re.fullmatch(r"process \d has failed: bad", line) for line in said)


def test_whoever_cannot_be_told_is_not_waited_for(tmp_path: Path) -> None:
    def break_off(text: str) -> None:
        raise SystemExit(1)

    steps = [step(tmp_path / "one")]
    watcher = Watcher(say=break_off)
    with Ahead(steps, processes=1, threads=1, watcher=watcher) as ahead, pytest.raises(SystemExit):
        ahead.result(steps[0])


def test_a_stop_reaches_every_process(tmp_path: Path) -> None:
    working: set[str] = set()
    watcher = Watcher(progress=lambda stage, *rest: working.add(stage), stop=lambda: len(working) == 2)
    steps = [step(tmp_path / name, linger) for name in ("one", "other")]
    with Ahead(steps, processes=2, threads=1, watcher=watcher) as ahead, pytest.raises(Stopped):
        ahead.result(steps[0])


def begin_and_interrupt(folder: Path, seconds: list[float]) -> None:
    begun = threading.Event()
    watcher = Watcher(progress=lambda *progress: begun.set())
    with Ahead([step(folder, sleep)], processes=1, threads=1, watcher=watcher):
        assert begun.wait(60)
        seconds.append(time.monotonic())
        raise KeyboardInterrupt


def test_who_interrupts_waits_for_no_step(tmp_path: Path) -> None:
    seconds: list[float] = []
    with pytest.raises(KeyboardInterrupt):
        begin_and_interrupt(tmp_path / "long", seconds)
    assert time.monotonic() - seconds[0] < 5
