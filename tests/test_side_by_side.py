"""Steps in processes of their own: their order, how they are waited for, and how errors and stops end them."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest

from td3_fast.run_folder import Stopped, Watcher
from td3_fast.side_by_side import Ahead, Step


def leave(folder: Path, watcher: Watcher, *, others: tuple[Path, ...] = ()) -> None:
    """Notes which of `others` are there already."""
    watcher.progress("work", 1, 1, {})
    folder.mkdir()
    (folder / "found").write_text(" ".join(other.name for other in others if (other / "found").exists()))


def refuse(watcher: Watcher) -> None:
    raise ValueError("no such size")


def linger(watcher: Watcher) -> None:
    while True:
        watcher.interruptible("work", 0, 1, {})
        time.sleep(0.01)


def step(folder: Path, work: object = None, **options: object) -> Step:
    return Step(label=folder.name, folder=folder, work=work or partial(leave, folder), **options)  # type: ignore[arg-type]


def test_steps_wait_for_those_that_they_need_and_no_folder_is_filled_twice(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    said: list[str] = []
    stages: set[str] = set()
    watcher = Watcher(progress=lambda stage, *rest: stages.add(stage), say=said.append)
    steps = [
        step(second, partial(leave, second, others=(first, third)), after=first),
        step(first),
        step(third, partial(leave, third, others=(second,)), after=second),
        step(first, refuse),
    ]
    with Ahead(steps, processes=2, threads=1, watcher=watcher) as ahead:
        ahead.wait(tmp_path / "of no step")
        ahead.wait(third)
        assert (third / "found").read_text() == "second"
        assert (second / "found").read_text() == "first"
    assert stages <= {"process 1, work", "process 2, work"}
    assert [line.split(": ")[1].split(",")[0] for line in said if "has done" in line] == [
        "first",
        "second",
        "third",
    ]


def test_what_one_step_raises_comes_out_and_nothing_else_is_begun(tmp_path: Path) -> None:
    last = tmp_path / "last"
    steps = [step(tmp_path / "bad", refuse), step(last, after=tmp_path / "bad")]
    with Ahead(steps, processes=1, threads=1, watcher=Watcher()) as ahead:
        with pytest.raises(ValueError, match="no such size"):
            ahead.wait(last)
        with pytest.raises(ValueError, match="no such size"):
            ahead.wait(last)
    assert not last.exists()


def test_a_stop_reaches_every_process(tmp_path: Path) -> None:
    working: set[str] = set()
    watcher = Watcher(progress=lambda stage, *rest: working.add(stage), stop=lambda: len(working) == 2)
    steps = [step(tmp_path / name, linger) for name in ("one", "other")]
    with Ahead(steps, processes=2, threads=1, watcher=watcher) as ahead, pytest.raises(Stopped):
        ahead.wait(tmp_path / "one")


def test_who_leaves_early_waits_for_no_step(tmp_path: Path) -> None:
    with Ahead([step(tmp_path / "endless", linger)], processes=1, threads=1, watcher=Watcher()):
        pass
