"""The CUDA kernels of target_rank, run on the host, against the dense reference."""

import pytest
import torch

from td3_fast import ops


def make_inputs(rows, n, d, guarded, dtype=torch.float32):
    # Small integers: scores are exact in every dtype, and many tie.
    hidden, items = (guarded(torch.randint(-3, 4, (count, d)).to(dtype)) for count in (rows, n))
    return hidden, items, guarded(torch.randint(n, (rows,)))


def make_excluded(rows, n, guarded):
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(0, 30, (rows,)).cumsum(0)])
    return guarded(offsets), guarded(torch.randint(n, (int(offsets[-1]),)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "n", "d"), [(1, 1, 1), (5, 9, 4), (17, 127, 8), (64, 128, 33), (70, 700, 16), (0, 5, 2)]
)
def test_full_rank_matches_the_reference(simt, guarded, rows, n, d, dtype):
    hidden, items, target = make_inputs(rows, n, d, guarded, dtype)
    excluded = make_excluded(rows, n, guarded)
    for options in ({}, {"exclude_padding": False}, {"excluded": excluded}):
        ranks = [ops.target_rank(hidden, items, target, backend=b, **options) for b in ("fused", "reference")]
        assert torch.equal(*ranks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rank_among_candidates_matches_the_reference(simt, guarded, dtype):
    hidden, items, target = make_inputs(10, 500, 24, guarded, dtype)
    candidates = torch.randint(500, (10, 30))
    candidates[:, 3] = target
    candidates = guarded(candidates)
    ranks = [
        ops.target_rank(hidden, items, target, candidates=candidates, backend=b)
        for b in ("fused", "reference")
    ]
    assert torch.equal(*ranks)


def test_equal_embeddings_tie(simt, guarded):
    hidden, row = guarded(torch.randn(4, 37)), torch.randn(1, 37)
    items = guarded(row.expand(300, 37).contiguous())
    target = torch.tensor([1, 150, 297, 299])
    assert ops.target_rank(hidden, items, target).tolist() == [299] * 4
    candidates = torch.arange(1, 101).expand(4, 100)
    ranks = ops.target_rank(hidden, items, target, candidates=candidates)
    assert ranks.tolist() == [100, 101, 101, 101]


def test_scores_that_are_not_numbers_count_against_the_model(simt, guarded):
    hidden, items, target = make_inputs(3, 20, 4, guarded)
    hidden[:] = torch.nan
    assert ops.target_rank(hidden, items, target.clamp(min=1)).tolist() == [19] * 3


def test_an_id_that_is_no_item_ends_the_kernel(simt, guarded):
    hidden, items, target = make_inputs(3, 20, 4, guarded)
    with pytest.raises(RuntimeError, match="trap"):
        ops.target_rank(hidden, items, torch.full_like(target, 20))
    with pytest.raises(RuntimeError, match="trap"):
        ops.target_rank(hidden, items, target, candidates=torch.full((3, 2), -1))
