"""Probabilities that are kept, their products with narrow tables, and those that they weigh."""

import pytest
import torch

from td3_fast import ops
from td3_fast.ops import item_probabilities, mix_items, mix_items_transposed, weigh_products

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
@pytest.mark.parametrize("spread", [0.1, 30.0])
@pytest.mark.parametrize(("rows", "n", "rank"), [*SIZES, (30, 20_000, 5), (5, 16, 16), (5, 17, 16)])
def test_probabilities(rows: int, n: int, rank: int, spread: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = spread * torch.randn(rank, rows, generator=generator, dtype=dtype).T
    keys = torch.randn(n, rank, generator=generator, dtype=dtype)
    made = item_probabilities(queries, keys)
    assert (made.shape, made.dtype) == ((rows, n), dtype)
    scores = queries.double() @ keys.double().T
    expected = scores.softmax(-1)
    # of scores that were rounded, its own and the row's largest, and of the exponential, which ends at the least normal
    # number
    added = queries.double().abs() @ keys.double().abs().T
    largest = added.max(-1, keepdim=True).values if n else added
    bound = expected * (8 * largest + 16) * torch.finfo(dtype).eps + 2 * torch.finfo(dtype).tiny
    assert bool(((made - expected).abs() <= bound).all())


def test_probabilities_of_what_is_not_finite() -> None:
    queries, keys = torch.randn(4, 3), torch.randn(40, 3)
    queries[1] = torch.nan
    queries[2, 0] = torch.inf
    made = item_probabilities(queries, keys)
    assert bool(made[1:3].isnan().all())
    assert bool(made[[0, 3]].isfinite().all())


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pairs", [1, 3, 70])
@pytest.mark.parametrize(
    ("rank", "with_queries"), [(0, True), (16, False), (31, True), (32, True), (50, True)]
)
@pytest.mark.parametrize(("rows", "n", "d"), SIZES)
def test_weighed_products(
    rows: int, n: int, d: int, rank: int, with_queries: bool, pairs: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(rows + 2, n, generator=generator, dtype=dtype)[1:-1]
    cotangents, tables = (
        [torch.randn(d, of, generator=generator, dtype=dtype).T for _ in range(pairs)] for of in (rows, n)
    )
    # a pair of another width, which is none of the vectors'
    cotangents.append(torch.randn(rows, 3, generator=generator, dtype=dtype))
    tables.append(torch.randn(n, 3, generator=generator, dtype=dtype))
    keys, queries = (torch.randn(rank, of, generator=generator, dtype=dtype).T for of in (n, rows))
    made = weigh_products(probabilities, cotangents, tables, keys, queries if with_queries else None)
    left, right = (torch.cat(matrices, dim=1).double() for matrices in (cotangents, tables))
    weighted = probabilities.double() * (left @ right.T)
    added = probabilities.double() * (left.abs() @ right.abs().T)
    expected = [weighted @ keys.double(), weighted.sum(-1, keepdim=True)]
    bounds = [added @ keys.double().abs(), added.sum(-1, keepdim=True)]
    if with_queries:
        expected.append(weighted.T @ queries.double())
        bounds.append(added.T @ queries.double().abs())
    else:
        assert made[2] is None
    for sums, of_doubles, bound in zip(made, expected, bounds, strict=False):
        assert sums is not None
        assert (sums.shape, sums.dtype) == (of_doubles.shape, dtype)
        assert bool(((sums - of_doubles).abs() <= 8 * torch.finfo(dtype).eps * bound).all())


@pytest.mark.skipif(not ops.has_fused("cpu"), reason="needs the compiled kernels")
def test_equal_bits_on_any_number_of_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(500, 1001, generator=generator)
    items, cotangent = (torch.randn(rows, 20, generator=generator) for rows in (1001, 500))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                (
                    mix_items(probabilities, items),
                    mix_items_transposed(probabilities, cotangent),
                    item_probabilities(cotangent, items),
                    *weigh_products(
                        probabilities,
                        [cotangent, -cotangent[:, :3]],
                        [items, items[:, :3]],
                        items[:, :7],
                        cotangent[:, :7],
                    ),
                )
            )
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
    torch.library.opcheck(torch.ops.td3_fast.item_probabilities.default, (torch.randn(4, 3), items))
    pairs = ([torch.randn(4, 3), torch.randn(4, 2)], [items, torch.randn(6, 2)])
    keys, queries = torch.randn(6, 2), torch.randn(4, 2)
    for others in ((keys,), (keys, queries)):
        torch.library.opcheck(torch.ops.td3_fast.weigh_products.default, (probabilities, *pairs, *others))
    with pytest.raises(RuntimeError, match="no derivative"):
        mix_items(probabilities, items.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="no derivative"):
        weigh_products(probabilities, [torch.randn(4, 3)], [items.clone().requires_grad_()], keys)
    with pytest.raises(RuntimeError, match="no derivative"):
        item_probabilities(torch.randn(4, 3), items.clone().requires_grad_())
    with pytest.raises(ValueError, match="queries"):
        item_probabilities(torch.randn(4, 2), items)
    for cotangents, tables, match in (
        ([], [], "one at least"),
        ([torch.randn(4, 3)], [items, items], "as many cotangents"),
        ([torch.randn(4, 2)], [items], "as wide as its table"),
        ([torch.randn(5, 3)], [items], "of rows rows"),
        ([torch.randn(4, 3)], [items[:5]], "of n rows"),
    ):
        with pytest.raises(ValueError, match=match):
            weigh_products(probabilities, cotangents, tables, keys)
    for others, match in (
        ((keys[:5],), "of n rows"),
        ((keys, queries[:3]), "of rows rows"),
        ((keys, torch.randn(4, 3)), "as wide as the keys"),
    ):
        with pytest.raises(ValueError, match=match):
            weigh_products(probabilities, *pairs, *others)
    with pytest.raises(NotImplementedError, match="mix_items"):
        torch.func.jvp(lambda table: mix_items(probabilities, table), (items,), (items,))
    with pytest.raises(ValueError, match="probabilities"):
        mix_items(probabilities, items[:5])
    with pytest.raises(ValueError, match="probabilities"):
        mix_items_transposed(probabilities.double(), items)
