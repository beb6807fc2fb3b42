from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """No picture of every single run: they take longer than the runs."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("td3_fast.run_folder.draw_report", lambda *args, **options: None)
        yield


@pytest.fixture(autouse=True)
def _fixed_randomness() -> None:
    torch.manual_seed(0)
