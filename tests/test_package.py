"""The names that users import."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest

import td3_fast


@pytest.mark.parametrize("name", td3_fast.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(td3_fast, name) is not None
    assert name in dir(td3_fast)


@pytest.mark.parametrize("name", ["distill", "evaluate", "pretrain"])
@pytest.mark.parametrize("first", ["import td3_fast.{0}", "from td3_fast.{0} import {0}", "td3_fast.{0}"])
def test_a_function_stands_before_the_module_of_its_name(name: str, first: str) -> None:
    code = f"import td3_fast\n{first.format(name)}\nassert callable(td3_fast.{name}), td3_fast.{name}"
    if (
        first.startswith("from") and name == "evaluate"
    ):  # one fresh interpreter is enough, they are slow to start
        assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0
    exec(code, {})
    assert isinstance(getattr(td3_fast, name), FunctionType)
    assert importlib.import_module(f"td3_fast.{name}").__name__ == f"td3_fast.{name}"


def test_other_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="no attribute 'teleport'"):
        td3_fast.teleport  # noqa: B018


def test_the_package_says_its_version_and_that_it_is_typed() -> None:
    assert td3_fast.__version__ == importlib.metadata.version("td3-fast")
    assert Path(td3_fast.ops.__file__).parents[1].joinpath("py.typed").exists()
