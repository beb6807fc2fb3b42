from collections.abc import Iterator

import pytest
import torch
from op_checks import LOSSES

from td3_fast import ops


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every device that has fused kernels here."""
    name: str = request.param
    if not ops.has_fused(name):
        pytest.skip("no fused kernels are built")
    # On the CPU, PyTorch then fills what is allocated and not initialised with NaN.
    torch.use_deterministic_algorithms(name == "cpu")
    yield torch.device(name)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=LOSSES, ids=lambda loss: loss.__name__.removesuffix("_loss"))
def loss(request: pytest.FixtureRequest):
    """A loss of one op, with inputs of the shapes LOSSES[loss]."""
    return request.param
