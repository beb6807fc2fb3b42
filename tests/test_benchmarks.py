"""Benchmarks, which only `make bench` times, can be collected, and their peers do what they are timed for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_benchmarks_can_be_collected_and_their_peers_give_the_meta_gradient() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "-k",
        "peers_give",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
