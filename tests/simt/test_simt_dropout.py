"""The CUDA kernel of random words, run on the host, against the reference."""

import pytest
import torch

from td3_fast.ops import random_words


@pytest.mark.parametrize("count", [0, 1, 8, 13, 2048, 5001])
def test_words_match_the_reference(simt, count):
    for seed in (0, 2**63 - 1, -5):
        words = [random_words(torch.tensor(seed), 3, count, backend=b) for b in ("fused", "reference")]
        assert torch.equal(*words)
