"""`distill` under torchrun: one folder as from one process, interruptions, and a process that dies in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from td3_fast.checkpoint import load_checkpoint
from td3_fast.cli import app
from td3_fast.data import generate_interactions, write_interactions
from td3_fast.distill_state import DistillState
from td3_fast.report import read_json_lines
from td3_fast.summary import TuckerSummary

TINY = [
    "--recipe", "synthetic", "--size", "6x6", "--rank", "3", "--epochs", "2", "--inner-steps", "12", "--window", "6",
    "--batch-size", "40", "--max-epochs", "2",
]  # fmt: skip
SECONDS = 600
# "trajectories" shares these out, "items" splits the item table, which is trained; test_distill_over_ranks.py has more
MODES = {
    "trajectories": ["--item-embedding", "frozen", "--trajectories", "3"],
    "items": ["--item-embedding", "trained", "--item-shards", "2"],
}


@pytest.fixture(scope="module", autouse=True)
def undrawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No pictures, in processes of their own neither: test_cli.py has them, and they are half of so short a run."""
    folder = tmp_path_factory.mktemp("no-matplotlib")
    (folder / "matplotlib.py").write_text("raise ImportError\n")
    with pytest.MonkeyPatch.context() as patches:
        patches.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        patches.setattr("td3_fast.run_folder.draw_report", lambda *args, **options: None)
        yield


def alone(*words: str | Path) -> Result:
    """`distill` in this process, on one thread as those of torchrun."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return CliRunner().invoke(app, ["distill", *map(str, words)])
    finally:
        torch.set_num_threads(threads)


def torchrun(*words: str | Path, restarts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "-m", "td3_fast.cli", "distill", *map(str, words)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes too
        process.communicate()
        raise
    return process.returncode, out, err


def process_of_rank(launcher: int, rank: int) -> int:
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"torchrun has no child of rank {rank}")


def wait_for(process: subprocess.Popen[str], log: Path, *, step: int) -> None:
    """Return once `step` outer steps are in the log."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until and process.poll() is None:
        if log.exists() and f'"step": {step},' in log.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


def state_at(folder: Path) -> DistillState:
    """What a run that was stopped goes on from."""
    state = load_checkpoint(folder / "checkpoint.safetensors").state
    assert isinstance(state, DistillState)
    return state


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tiny.inter"
    write_interactions(generate_interactions(num_users=40, num_items=26, mean_length=9, seed=3), path)
    return path


@pytest.fixture(scope="module", params=MODES)
def unbroken(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, str]:
    """Of each mode a run of two processes: (mode, folder, what it printed)."""
    folder = tmp_path_factory.mktemp(request.param)
    code, out, err = finish(torchrun(data, *TINY, *MODES[request.param], "--out", folder))
    assert code == 0, err
    return request.param, folder, out


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def assert_same_run(folder: Path, other: Path) -> None:
    for name in ("summary.safetensors", "pretrained.safetensors"):
        assert (folder / name).read_bytes() == (other / name).read_bytes()
    assert results(folder)["rows"] == results(other)["rows"]
    assert results(folder)["distillation"]["history"] == results(other)["distillation"]["history"]


def test_two_processes_leave_what_one_leaves(
    unbroken: tuple[str, Path, str], data: Path, tmp_path: Path
) -> None:
    mode, folder, out = unbroken
    single = [word for word in MODES[mode] if word not in ("--item-shards", "2")]
    result = alone(data, *TINY, *single, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    two, one = (TuckerSummary.load(place / "summary.safetensors") for place in (folder, tmp_path))
    assert two.metadata is not None
    assert one.metadata is not None
    assert torch.equal(two.item_factors, one.item_factors)
    assert two.metadata.training == one.metadata.training
    assert (folder / "pretrained.safetensors").read_bytes() == (
        tmp_path / "pretrained.safetensors"
    ).read_bytes()
    # float32: the first steps agree to rounding, which the later ones amplify
    ours, theirs = (read_json_lines(place / "log.jsonl") for place in (folder, tmp_path))
    assert [entry["event"] for entry in ours] == [entry["event"] for entry in theirs]
    for mine, other in list(zip(ours, theirs, strict=True))[:6]:
        assert mine.get("loss") == pytest.approx(other.get("loss"), rel=1e-4)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in tmp_path.iterdir())
    assert out.count("pretrained in") == 1
    assert out.count("is the summary") == 1
    environment = results(folder)["distillation"]["environment"]
    assert environment["processes"] == 2
    assert environment["item_shards"] == (2 if mode == "items" else 1)


@pytest.mark.parametrize("unbroken", ["items"], indirect=True)
def test_a_run_that_is_interrupted_and_then_loses_a_process_goes_on_with_the_same_bits(
    unbroken: tuple[str, Path, str], data: Path, tmp_path: Path
) -> None:
    mode, folder, _ = unbroken
    words = [data, *TINY, *MODES[mode], "--out", tmp_path]
    log = tmp_path / "log.jsonl"

    process = torchrun(*words)
    wait_for(process, log, step=3)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code != 0
    assert "lost" not in err
    steps = [entry["step"] for entry in read_json_lines(log) if entry["event"] == "step"]
    assert state_at(tmp_path).step == steps[-1] >= 3  # all stopped after the same one

    process = torchrun(*words, "--resume")
    wait_for(process, log, step=9)
    os.kill(process_of_rank(process.pid, 1), signal.SIGKILL)
    code, out, err = finish(process)
    assert code != 0
    assert "nothing to resume" not in out
    assert "process 0 of 2 lost the others, one of them has probably died" in err
    assert "Go on with:\n  torchrun --nproc-per-node 2 -m td3_fast.cli distill" in err
    assert state_at(tmp_path).step >= 9  # the process that writes has seen it, and nothing is lost

    code, out, err = finish(torchrun(*words, "--resume"))
    assert code == 0, err
    assert "nothing to resume" not in out
    assert_same_run(tmp_path, folder)


@pytest.mark.parametrize("unbroken", ["trajectories"], indirect=True)
def test_torchrun_restarts_a_run_by_itself(
    unbroken: tuple[str, Path, str], data: Path, tmp_path: Path
) -> None:
    mode, folder, _ = unbroken
    process = torchrun(data, *TINY, *MODES[mode], "--out", tmp_path, restarts=1)
    wait_for(process, tmp_path / "log.jsonl", step=4)
    os.kill(process_of_rank(process.pid, 1), signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, err
    assert "pretrained already" in out
    assert_same_run(tmp_path, folder)


def test_shards_without_processes_are_refused(data: Path, tmp_path: Path) -> None:
    result = alone(data, *TINY, "--item-shards", "2", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "torchrun --nproc-per-node 2" in result.stderr
