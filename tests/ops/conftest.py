import pytest
import torch
from op_checks import LOSSES

from td3_fast import ops


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that has fused kernels here."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if not ops.has_fused(name):
        pytest.skip("no fused kernels are built")
    return torch.device(name)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=LOSSES, ids=lambda loss: loss.__name__.removesuffix("_loss"))
def loss(request: pytest.FixtureRequest):
    """A loss of one op, with inputs of the shapes LOSSES[loss]."""
    return request.param
