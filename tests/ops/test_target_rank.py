import pytest
import torch
from op_checks import RESET_PEAK, peak_bytes

from td3_fast import ops


def make_inputs(rows, n, d, device, dtype=torch.float32):
    # Small integers: scores are exact in every dtype, and many tie.
    hidden, items = (torch.randint(-3, 4, (count, d), device=device).to(dtype) for count in (rows, n))
    return hidden, items, torch.randint(n, (rows,), device=device)


def make_excluded(rows, n, device):
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(0, 30, (rows,)).cumsum(0)])
    return offsets.to(device), torch.randint(n, (int(offsets[-1]),)).to(device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "n", "d"),
    [(1, 1, 1), (5, 9, 4), (17, 127, 8), (16, 128, 8), (300, 1025, 16), (2, 5000, 3), (0, 5, 2)],
)
def test_full_rank_matches_the_reference(rows, n, d, dtype, device):
    hidden, items, target = make_inputs(rows, n, d, device, dtype)
    excluded = make_excluded(rows, n, device)
    for options in ({}, {"exclude_padding": False}, {"excluded": excluded}):
        ranks = [ops.target_rank(hidden, items, target, backend=b, **options) for b in ("fused", "reference")]
        assert torch.equal(*ranks)


def test_non_contiguous_inputs_match_the_reference(device):
    hidden, items, target = make_inputs(40, 300, 8, device)
    hidden, items, target = hidden.T.contiguous().T, items[:, ::2].repeat(1, 2), target.repeat(2)[::2]
    options = {"candidates": torch.randint(300, (30, 40), device=device).T}
    for given in ({}, options):
        ranks = [ops.target_rank(hidden, items, target, backend=b, **given) for b in ("fused", "reference")]
        assert torch.equal(*ranks)


@pytest.mark.skipif(not RESET_PEAK.exists(), reason="peak memory is read from /proc")
def test_peak_memory_stays_below_one_tensor_of_rows_by_items(device):
    hidden, items, target = make_inputs(2048, 65536, 8, device)
    excluded = make_excluded(2048, 65536, device)
    peak = peak_bytes(device, lambda: ops.target_rank(hidden, items, target, excluded=excluded))
    assert peak < 2048 * 65536 * 4 // 8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rank_among_candidates_matches_the_reference(dtype, device):
    hidden, items, target = make_inputs(100, 500, 24, device, dtype)
    candidates = torch.randint(500, (100, 30), device=device)
    candidates[:, 3] = target
    ranks = [
        ops.target_rank(hidden, items, target, candidates=candidates, backend=b)
        for b in ("fused", "reference")
    ]
    assert torch.equal(*ranks)


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_rank_worked_by_hand(backend, device):
    items = torch.tensor([[9.0], [1.0], [2.0], [3.0], [2.0]], device=device)
    hidden, target = torch.ones(3, 1, device=device), torch.tensor([2, 3, 2], device=device)
    # Item 3 is ahead of item 2, item 4 ties with it, and the padding item 0 does not count.
    assert ops.target_rank(hidden, items, target, backend=backend).tolist() == [3, 1, 3]
    # A row leaves out item 3, nothing, and item 4 beside its own target, which stays.
    excluded = torch.tensor([0, 2, 2, 4], device=device), torch.tensor([3, 3, 2, 4], device=device)
    assert ops.target_rank(hidden, items, target, excluded=excluded, backend=backend).tolist() == [2, 1, 2]
    candidates = torch.tensor([[2, 4], [1, 2], [3, 3]], device=device)
    assert ops.target_rank(hidden, items, target, candidates=candidates, backend=backend).tolist() == [
        2,
        1,
        3,
    ]


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_equal_embeddings_tie(backend, device):
    hidden, row = torch.randn(4, 37, device=device), torch.randn(1, 37, device=device)
    items = row.expand(1000, 37).contiguous()
    target = torch.tensor([1, 500, 997, 999], device=device)
    if backend == "fused":
        assert ops.target_rank(hidden, items, target, backend=backend).tolist() == [999] * 4
    candidates = torch.arange(1, 101, device=device).expand(4, 100)
    ranks = ops.target_rank(hidden, items, target, candidates=candidates, backend=backend)
    assert ranks.tolist() == [100, 101, 101, 101]


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_scores_that_are_not_numbers_count_against_the_model(backend, device):
    hidden, items, target = make_inputs(3, 20, 4, device)
    hidden[:] = torch.nan
    assert ops.target_rank(hidden, items, target.clamp(min=1), backend=backend).tolist() == [19] * 3


def test_wrong_ids_are_refused(device):
    hidden, items, target = make_inputs(3, 20, 4, device)
    if device.type == "cpu":
        with pytest.raises(IndexError, match="target 20"):
            ops.target_rank(hidden, items, torch.full_like(target, 20))
        with pytest.raises(IndexError, match="candidate -1"):
            ops.target_rank(hidden, items, target, candidates=torch.full((3, 2), -1))
        with pytest.raises(IndexError, match="excluded item 21"):
            ops.target_rank(hidden, items, target, excluded=(torch.tensor([0, 0, 0, 1]), torch.tensor([21])))
        for offsets in ([1, 1, 1, 1], [0, 0, 0, 0]):
            with pytest.raises(ValueError, match="must rise from 0 to 1"):
                ops.target_rank(hidden, items, target, excluded=(torch.tensor(offsets), torch.tensor([2])))
    with pytest.raises(ValueError, match="int64 target"):
        ops.target_rank(hidden, items, target[:2])
    with pytest.raises(ValueError, match="full ranking"):
        ops.target_rank(hidden, items, target, candidates=target[:, None], excluded=(target, target))


def test_operators_satisfy_opcheck(device):
    hidden, items, target = make_inputs(5, 30, 4, device)
    excluded = make_excluded(5, 30, device)
    torch.library.opcheck(torch.ops.td3_fast.target_rank.default, (hidden, items, target, *excluded, True))
    candidates = torch.randint(30, (5, 6), device=device)
    torch.library.opcheck(torch.ops.td3_fast.candidate_rank.default, (hidden, items, target, candidates))
