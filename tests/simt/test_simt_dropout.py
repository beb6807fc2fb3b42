"""The CUDA kernel of random words, run on the host, against the reference."""

import pytest
import torch

from td3_fast.ops import random_words, random_words_of_sites


@pytest.mark.parametrize("count", [0, 1, 8, 13, 2048, 5001])
def test_words_match_the_reference(simt, count):
    for seed in (0, 2**63 - 1, -5):
        words = [random_words(torch.tensor(seed), 3, count, backend=b) for b in ("fused", "reference")]
        assert torch.equal(*words)


@pytest.mark.parametrize("counts", [[], [0, 0], [13], [5001, 0, 8, 1], [9] * 30], ids=str)
def test_words_of_sites_match_the_reference(simt, counts):
    seed = torch.tensor(-5)
    words, expected = (
        random_words_of_sites(seed, 2**32 - 40, counts, backend=b) for b in ("fused", "reference")
    )
    assert all(torch.equal(a, b) for a, b in zip(words, expected, strict=True))
