"""Products of kept probabilities with narrow tables."""

import pytest
import torch

from td3_fast import ops
from td3_fast.ops import mix_items, mix_items_transposed

SIZES = [
    (1, 1, 1),
    (23, 95, 15),
    (25, 97, 17),
    (130, 300, 64),
    (64, 192, 32),
    (3, 5, 0),
    (64, 0, 16),
    (0, 5, 3),
]
# panels of columns, full and not, over several parts of the depth, and more items than stay in cache
SIZES += [(130, 300, 17), (130, 300, 50), (70, 300, 24), (70, 300, 48), (70, 3000, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "n", "d"), SIZES)
def test_equals_the_product(rows: int, n: int, d: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.rand(rows + 2, n, generator=generator, dtype=dtype)
    probabilities = whole[1:-1]  # a slice of rows, as a batch of users is
    items = torch.randn(n, d, generator=generator, dtype=dtype)
    cotangent = torch.randn(rows, d, generator=generator, dtype=dtype)
    for made, left, right in (
        (mix_items(probabilities, items), probabilities, items),
        (mix_items_transposed(probabilities, cotangent), probabilities.T, cotangent),
    ):
        expected = left.double() @ right.double()
        bound = 4 * torch.finfo(dtype).eps * (left.double() @ right.double().abs())  # of what was added up
        assert (made.shape, made.dtype) == (expected.shape, dtype)
        assert bool(((made - expected).abs() <= bound).all())


@pytest.mark.skipif(not ops.has_fused("cpu"), reason="needs the compiled kernels")
def test_equal_bits_on_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(500, 1001, generator=generator)
    items, cotangent = (torch.randn(rows, 20, generator=generator) for rows in (1001, 500))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((mix_items(probabilities, items), mix_items_transposed(probabilities, cotangent)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not ops.has_fused("cpu"), reason="needs the compiled kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subnormals_count_for_nothing_and_stay_what_they_are_elsewhere(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(130, 300, generator=generator, dtype=dtype)
    probabilities[:, ::3] = tiny / 8
    items, cotangent = (torch.randn(rows, 32, generator=generator, dtype=dtype) for rows in (300, 130))
    normal = torch.where(probabilities < tiny, 0, probabilities)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            # the sums of all but the columns of subnormals have the same bits, and these are below what is normal
            assert torch.equal(mix_items(probabilities, items), mix_items(normal, items))
            of_items = mix_items_transposed(probabilities, cotangent)
            assert torch.equal(of_items[1::3], mix_items_transposed(normal, cotangent)[1::3])
            assert bool((of_items[::3].abs() < 130 * tiny).all())
            half = torch.full((100_000,), tiny, dtype=dtype) / 2
            assert bool((half > 0).all()), "the caller's treatment of subnormals is not left as it was found"
    finally:
        torch.set_num_threads(threads)


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
