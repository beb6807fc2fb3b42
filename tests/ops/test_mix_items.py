"""Products of kept probabilities with narrow tables."""

import pytest
import torch

from td3_fast import ops
from td3_fast.ops import mix_items, mix_items_transposed

SIZES = [(1, 1, 1), (23, 95, 15), (25, 97, 17), (130, 300, 64), (64, 192, 32), (3, 5, 0), (64, 0, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "n", "d"), SIZES)
def test_equals_the_product(rows: int, n: int, d: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.rand(rows + 2, n, generator=generator, dtype=dtype)
    probabilities = whole[1:-1]  # a slice of rows, as a batch of users is
    items = torch.randn(n, d, generator=generator, dtype=dtype)
    cotangent = torch.randn(rows, d, generator=generator, dtype=dtype)
    torch.testing.assert_close(mix_items(probabilities, items), probabilities @ items)
    torch.testing.assert_close(mix_items_transposed(probabilities, cotangent), probabilities.T @ cotangent)


@pytest.mark.skipif(not ops.has_fused("cpu"), reason="needs the compiled kernels")
def test_schemas_and_refusals() -> None:
    probabilities, items = torch.rand(4, 6), torch.randn(6, 3)
    torch.library.opcheck(torch.ops.td3_fast.mix_items.default, (probabilities, items))
    torch.library.opcheck(torch.ops.td3_fast.mix_items_transposed.default, (probabilities, torch.randn(4, 3)))
    with pytest.raises(RuntimeError, match="no derivative"):
        mix_items(probabilities, items.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match="mix_items"):
        torch.func.jvp(lambda table: mix_items(probabilities, table), (items,), (items,))
    with pytest.raises(ValueError, match="probabilities"):
        mix_items(probabilities, items[:5])
    with pytest.raises(ValueError, match="probabilities"):
        mix_items_transposed(probabilities.double(), items)
