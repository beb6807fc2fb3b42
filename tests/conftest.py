import pytest
import torch


@pytest.fixture(autouse=True)
def _fixed_randomness() -> None:
    torch.manual_seed(0)
