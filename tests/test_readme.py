"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from td3_fast.cli import app

README = Path(__file__).parents[1] / "README.md"
COMMANDS = ("distill", "evaluate", "baselines", "fit", "export", "search", "reproduce", "demo")
TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_python_snippets_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) >= 2
    names: dict[str, Any] = {"__name__": "readme"}
    for snippet in blocks("python"):
        exec(compile(snippet, str(README), "exec"), names)


def test_every_command_and_option_exists() -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("td3-fast ")]
    commands += re.findall(r"`(td3-fast [^`]*)`", TEXT)
    assert len(commands) >= 5
    for command in commands:
        name = shlex.split(command)[1]
        if name == "COMMAND":
            continue
        shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert shown.exit_code == 0, command
        for option in re.findall(r"--[a-z-]+", command):
            assert option in shown.stdout, command
    shown = "".join(
        CliRunner().invoke(app, [*name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
        for name in ([], *([name] for name in COMMANDS))
    )
    for option in set(re.findall(r"`(--[a-z-]+)", TEXT)):
        assert option in shown
