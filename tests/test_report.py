"""Logs that survive a crash, results, tables, pictures."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from td3_fast.evaluate import ROWS, Row
from td3_fast.report import (
    JsonLines,
    draw_report,
    read_json_lines,
    read_results,
    results_tables,
    write_results,
)

NAMES = ("HR@10", "NDCG@10", "MRR@10")


def row(name: str, protocol: Any, mean: float, recovery: float | None = 0.5) -> Row:
    metrics = {metric: {"mean": mean, "sd": 0.01} for metric in NAMES}
    return Row(name=name, protocol=protocol, metrics=metrics, recovery=dict.fromkeys(NAMES, recovery))


def both(name: str, mean: float) -> list[Row]:
    return [row(name, "full", mean / 4), row(name, "uni100", mean)]


def rendered(rows: list[Row], width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        for table in results_tables(rows):
            console.print(table)
        return console.export_text()


def test_lines_are_appended_across_openings(tmp_path: Path) -> None:
    for number in (1, 2):
        with JsonLines(tmp_path / "log") as log:
            log.write({"step": number})
            assert read_json_lines(tmp_path / "log")[-1] == {"step": number}
    assert [entry["step"] for entry in read_json_lines(tmp_path / "log")] == [1, 2]


def test_a_line_cut_short_goes_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    with JsonLines(path) as log:
        log.write({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_lines_after_the_checkpoint_are_taken_out(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(5)))
    with JsonLines(path, keep=lambda entry: entry["step"] < 3) as log:
        assert [entry["step"] for entry in log.entries] == [0, 1, 2]
    assert len(read_json_lines(path)) == 3


def test_results_have_the_form_that_is_promised(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, both("summary", 0.6), settings={"seed": 0})
    content = json.loads(path.read_text())
    assert set(content) == {"rows", "settings", "versions"}
    assert set(content["rows"][0]) == {"name", "protocol", "metrics", "recovery", "runs"}
    assert content["rows"][1]["metrics"]["HR@10"] == {"mean": 0.6, "sd": 0.01}
    assert content["versions"]["torch"]
    assert read_results(path)["rows"] == both("summary", 0.6)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": [{"name": 1}]}', '{"rows": 3}'])
def test_other_json_is_no_results(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match="holds no results of td3-fast"):
        read_results(tmp_path / "results.json")


def test_tables_fit_80_columns_and_show_percent() -> None:
    text = rendered([r for place, name in enumerate(ROWS) for r in both(name, 0.7 - place / 20)])
    assert "70.00 ± 1.00" in text
    assert "17.50 ± 1.00" in text
    assert "longest+embeddings" in text
    assert "50 / 50 / 50" in text
    assert "…" not in text


def test_a_recovery_without_meaning_is_shown_as_such() -> None:
    assert "? / ? / ?" in rendered([row("summary", "full", 0.1, None)])


def test_a_picture_is_drawn_of_whatever_there_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    steps = [
        {"step": k + 1, "cross_entropy": 5.0, "alignment": 0.1, "gradient_norm": 0.5 if k else 0.0}
        for k in range(60)
    ]
    epochs = [{"epoch": 1, "HR@10": 0.5, "NDCG@10": 0.3, "MRR@10": 0.2}]
    rows = both("summary", 0.6) + both("full", 0.7) + both("zero-step", 0.3)
    for name, parts in {
        "run": {"steps": steps, "epochs": epochs, "best_epoch": 1, "max_norm": 1.0},
        "first steps": {"steps": steps[:1], "epochs": []},
        "rows": {"rows": rows},
        "all": {"steps": steps, "epochs": epochs, "best_epoch": 1, "max_norm": 1.0, "rows": rows},
    }.items():
        path = tmp_path / f"{name}.png"
        draw_report(path, title="a$b_$", **parts)  # type: ignore[arg-type]
        assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_caller_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def none(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr("importlib.import_module", none)
    with pytest.raises(ImportError):
        draw_report(tmp_path / "r.png", title="t", rows=both("summary", 0.5))
    assert not (tmp_path / "r.png").exists()
