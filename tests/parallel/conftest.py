from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Processes


@pytest.fixture(scope="session", params=[2, 4], ids=["2 processes", "4 processes"])
def processes(request: pytest.FixtureRequest) -> Iterator[Processes]:
    with tempfile.TemporaryDirectory() as folder:
        pool = Processes(request.param, Path(folder))
        yield pool
        pool.stop()
