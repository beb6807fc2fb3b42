"""What the README and the pages under docs/ show runs as it stands there."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from td3_fast.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("summaries", "benchmarks/results", "td3_fast/ops")
LINKED = [
    *PAGES,
    ROOT / "CONTRIBUTING.md",
    *(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md")),
]
COMMANDS = ("distill", "evaluate", "baselines", "fit", "export", "search", "reproduce", "demo")
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@cache
def shown_help(*command: str) -> str:
    shown = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0, command
    return shown.stdout


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name
)
def test_python_snippets_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "summaries").symlink_to(ROOT / "summaries")
    names: dict[str, Any] = {"__name__": page.stem}
    for snippet in blocks(page, "python"):
        exec(compile(snippet, str(page), "exec"), names)


@each_page
def test_every_command_and_option_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    commands = [
        line for block in blocks(page, "sh") for line in block.splitlines() if line.startswith("td3-fast ")
    ]
    commands += re.findall(r"`(td3-fast [^`]*)`", text)
    for command in commands:
        name = shlex.split(command)[1]
        if name != "COMMAND":
            for option in re.findall(r"--[a-z-]+", command):
                assert option in shown_help(name), command
    every = shown_help() + "".join(map(shown_help, COMMANDS))
    for option in set(re.findall(r"`(--[a-z-]+)", text)):
        assert option in every


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), link
        if anchor:
            assert anchor in anchors(there), link


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
