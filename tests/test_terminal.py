"""Bars on a terminal, few lines elsewhere, and two kinds of stopping."""

from __future__ import annotations

import io
import signal

import pytest
import typer
from rich.console import Console

from td3_fast import terminal
from td3_fast.terminal import Display, Interrupts, duration


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(terminal, "time", clock)
    return clock


def test_what_looks_like_an_emoji_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        terminal.fail("error: ratings.csv:100:3: expected a user id", 2)
    assert "ratings.csv:100:3:" in capsys.readouterr().err


def test_elsewhere_a_line_comes_every_ten_seconds_at_most(clock: Clock) -> None:
    out = io.StringIO()
    with Display(Console(file=out)) as display:
        for step in range(1, 101):
            clock.now += 1
            display.progress("distill", step, 200, {"loss": 5.25, "gradient_norm": 0.5})
    lines = out.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[-1] == "distilling 100/200 outer steps, loss 5.25, gradient norm 0.5, 1 min 40 s left"


def test_a_resumed_stage_counts_its_time_from_where_it_began(clock: Clock) -> None:
    out = io.StringIO()
    with Display(Console(file=out)) as display:
        display.progress("distill", 100, 200, {})
        clock.now += 20
        display.progress("distill", 110, 200, {})
    assert "distilling 110/200 outer steps, 3 min 00 s left" in out.getvalue()


def test_what_runs_inside_a_stage_is_shown_beside_it_and_goes_with_it(clock: Clock) -> None:
    out = io.StringIO()
    with Display(Console(file=out, width=200)) as display:
        display.progress("evaluate", 0, 3, {})
        clock.now += 11
        display.progress("fit", 1, 200, {"loss": 4.0})
        display.progress("evaluate", 1, 3, {})
        clock.now += 11
        display.progress("evaluate", 2, 3, {})
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("evaluating 0/3 runs; training on the summary 1/200 steps, loss 4")
    assert "training" not in lines[1]


def test_a_terminal_gets_bars() -> None:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=True, width=160)) as display:
        display.progress("evaluate", 0, 2, {})
        for step in (5, 10, 1):  # the stage inside begins anew
            display.progress("train", step, 10, {"loss": 3.5, "MRR@10": 0.25, "epoch": 1})
        display.progress("evaluate", 1, 2, {})
        display.progress("other", 1, 2, {})
        display.say("a line between")
    text = out.getvalue()
    assert "evaluating" in text
    assert "a line between" in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    heard: list[bool] = []
    with Interrupts(lambda: heard.append(True)) as interrupts:
        assert not interrupts.requested
        signal.raise_signal(number)
        assert interrupts.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert heard == [True]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (4.21, "4.2 s"), (42, "42 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
