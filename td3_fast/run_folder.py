"""The folder of a run: its files, its picture, and who watches what is done in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from td3_fast.progress import Progress, silent
from td3_fast.report import draw_report, read_json_lines, read_results, versions

SUMMARY = "summary.safetensors"
PRETRAINED = "pretrained.safetensors"
RESULTS = "results.json"
LOG = "log.jsonl"
REPORT = "report.png"
CHECKPOINT = "checkpoint.safetensors"
RUNS = "evaluation.jsonl"  # finished runs of evaluations
TUNING = "tuning.jsonl"  # finished trials of how to train on the summary
EPOCHS = "epochs.safetensors"  # the summary's factors after each epoch, where they are kept


class RunError(ValueError):
    """A run cannot begin; the message says why and what to do."""


RUN_FILES = (SUMMARY, RESULTS, LOG, REPORT, CHECKPOINT, RUNS, TUNING, EPOCHS)


class Stopped(Exception):
    """A run was asked to stop, and what it had done is on the disk."""


@dataclass(frozen=True, kw_only=True)
class Watcher:
    """Whom a run tells how it goes, and asks whether to stop."""

    progress: Progress = silent
    say: Callable[[str], None] = lambda text: None
    stop: Callable[[], bool] = lambda: False

    def interruptible(self, stage: str, done: int, total: int, values: Mapping[str, float]) -> None:
        """`progress` for work that may be dropped at any moment."""
        self.progress(stage, done, total, values)
        if self.stop():
            raise Stopped


def check_free(folder: Path, *, resume: bool, overwrite: bool) -> list[str]:
    """The files of a run in `folder`; RunError where there are some and nobody said what to do with them."""
    present = [name for name in RUN_FILES if (folder / name).exists()]
    if (folder / LOG).exists() and not (folder / LOG).stat().st_size:
        present.remove(LOG)  # of a run that was refused before its first step
    if present and not resume and not overwrite:
        raise RunError(
            f"{folder} holds a run already ({', '.join(present)}): go on with it by --resume, replace it by "
            "--overwrite, or choose another folder"
        )
    return present


def clear(folder: Path) -> None:
    """Remove the files of a run and its pretrained learner, and no others."""
    for name in (*RUN_FILES, PRETRAINED):
        (folder / name).unlink(missing_ok=True)


def draw(folder: Path, watcher: Watcher) -> None:
    """The folder's `report.png` from its results and its log."""
    results = read_results(folder / RESULTS)
    settings, distillation = results["settings"], results.get("distillation")
    users, _, positions = settings["size"].partition("x")
    past: dict[str, Any] = {}
    if distillation is not None:
        past = {
            "steps": [entry for entry in read_json_lines(folder / LOG) if entry.get("event") == "step"],
            "epochs": distillation["history"],
            "best_epoch": distillation["best_epoch"],
            "max_norm": distillation["settings"]["distill"]["max_norm"],
        }
    title = f"{settings['data_name']}: summary of {users} users by {positions} positions"
    if "learner" in settings:
        title += f", {settings['learner']}"
    try:
        draw_report(folder / REPORT, title=title, rows=results["rows"], **past)
    except ImportError:
        watcher.say(f"{REPORT} is left out: matplotlib, the extra `plot` of td3-fast, is not installed")


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """What bits may depend on besides settings; device: that computes, the CPU if it is left out."""
    found = {"torch": versions()["torch"], "threads": torch.get_num_threads()}
    if device is not None and device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
    return found


def peak_memory_mib() -> float | None:
    """The largest resident size of this process so far; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        # `getrusage` would count what the process that started this one had
        found = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if found:
            return round(int(found[0].split()[1]) / 2**10, 1)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
