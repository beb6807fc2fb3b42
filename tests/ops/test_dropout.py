from __future__ import annotations

import pytest
import torch

from td3_fast.ops import DropoutStream, derive_seed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_depend_on_seed_site_and_shape_alone(dtype: torch.dtype) -> None:
    inputs = torch.ones(3, 5, 7, dtype=dtype)
    first, again = DropoutStream(4), DropoutStream(4)
    one, two = first(inputs, 0.3), first(inputs, 0.3)
    assert torch.equal(one, again(inputs, 0.3))
    assert torch.equal(two, again(inputs, 0.3))
    assert not torch.equal(one, two)


def test_precision_does_not_change_a_mask() -> None:
    single = DropoutStream(4)(torch.ones(100), 0.5)
    double = DropoutStream(4)(torch.ones(100, dtype=torch.float64), 0.5)
    assert torch.equal(single.double(), double)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_rate_and_expectation(rate: float) -> None:
    outputs = DropoutStream(1)(torch.ones(200_000), rate)
    assert float((outputs == 0).float().mean()) == pytest.approx(rate, abs=0.005)
    assert float(outputs.max()) == pytest.approx(1 / (1 - rate), rel=1e-4)


def test_rate_zero_leaves_the_inputs_alone() -> None:
    inputs = torch.randn(4)
    assert DropoutStream(1)(inputs, 0.0) is inputs


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_rate_outside_the_unit_interval_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="dropout rate"):
        DropoutStream(1)(torch.ones(2), rate)


def test_derived_seeds_differ_by_path_and_fit_a_generator() -> None:
    seeds = {
        derive_seed(0),
        derive_seed(1),
        derive_seed(0, "a"),
        derive_seed(0, "a", 1),
        derive_seed(0, "b", 1),
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
