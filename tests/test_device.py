"""Devices other than the CPU, as far as they can be tested without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from td3_fast.cli_options import device_named


def test_the_loop_on_a_device_that_only_has_shapes() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "on_shapes.py"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    if "passed" not in done.stdout:
        pytest.skip("this PyTorch has no devices made in Python")


def test_the_cpu_is_always_there() -> None:
    assert device_named("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x", ""])
def test_a_name_that_is_no_device_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cpu, cuda or cuda:N"):
        device_named(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="sees no GPU here"):
        device_named("cuda")
