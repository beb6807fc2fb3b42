from __future__ import annotations

import pytest
import torch

from td3_fast.ops import (
    DropoutStream,
    derive_seed,
    derive_seeds,
    has_fused,
    random_words,
    random_words_of_sites,
    seed_path,
)


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


@pytest.mark.parametrize("rate", [0.0, 1e-6])
def test_a_rate_that_rounds_to_zero_leaves_the_inputs_alone_and_takes_no_site(rate: float) -> None:
    inputs, stream = torch.ones(40), DropoutStream(1)
    assert stream(inputs, rate) is inputs
    assert torch.equal(stream(inputs, 0.5), DropoutStream(1)(inputs, 0.5))


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


def test_derived_seeds_stay_what_they_are() -> None:
    assert derive_seed(0) == 4246866556266386882
    assert derive_seed(7, "dropout", 3, 0) == 747705747343737061
    paths = [("dropout", step, index) for step in range(3) for index in range(2)]
    together = derive_seeds(2**62 + 1, [seed_path(*path) for path in paths])
    assert together == [derive_seed(2**62 + 1, *path) for path in paths]
    assert derive_seeds(5, []) == []


# counter (block, site), key, and the block, of the known answers that come with the authors' Random123; their third
# words of the counter other than the site are 0 here.
def test_words_are_those_of_philox() -> None:
    words = random_words(torch.tensor(0), 0, 8, backend="reference").view(torch.int32)
    assert [int(word) & 0xFFFFFFFF for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000, 300_001])
@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1, -3])
def test_fused_words_are_those_of_the_reference(device: torch.device, seed: int, count: int) -> None:
    for site in (0, 1, 2**32 - 1):
        expected = random_words(torch.tensor(seed), site, count, backend="reference")
        assert torch.equal(random_words(torch.tensor(seed, device=device), site, count).cpu(), expected)


@pytest.mark.parametrize("counts", [[], [0, 0], [13], [1000, 0, 7, 8, 9, 1], [9] * 30], ids=str)
def test_words_of_sites_are_those_of_each(device: torch.device, counts: list[int]) -> None:
    seed = torch.tensor(2**63 - 1, device=device)
    words = random_words_of_sites(seed, 3, counts)
    assert len(words) == len(counts)
    for i, (own, count) in enumerate(zip(words, counts, strict=True)):
        assert torch.equal(own, random_words(seed, 3 + i, count))
        assert count == 0 or own.data_ptr() % 16 == 0
    reference = random_words_of_sites(seed, 3, counts, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(words, reference, strict=True))


def test_words_of_masks_are_those_of_one_mask_after_the_other() -> None:
    together, apart, device = DropoutStream(4), DropoutStream(4), torch.device("cpu")
    for counts in ([3, 20], [], [8, 1, 1]):
        words = together.words_of_masks(counts, device=device)
        expected = [apart.words(count, device=device) for count in counts]
        assert all(torch.equal(a, b) for a, b in zip(words, expected, strict=True))
    assert torch.equal(together.words(9, device=device), apart.words(9, device=device))


@pytest.mark.skipif(not has_fused("cpu"), reason="needs the compiled kernels")
def test_schemas() -> None:
    torch.library.opcheck(torch.ops.td3_fast.random_words.default, (torch.tensor(3), 1, 9))
    for counts in ([], [9, 0, 8]):
        torch.library.opcheck(torch.ops.td3_fast.random_words_of_sites.default, (torch.tensor(3), 1, counts))


def test_any_number_of_threads_draws_the_same_words() -> None:
    threads = torch.get_num_threads()
    drawn = []
    for count in (1, 2):
        torch.set_num_threads(count)
        drawn.append(random_words(torch.tensor(3), 2, 1_000_003))
    torch.set_num_threads(threads)
    assert torch.equal(*drawn)


def test_sites_and_seeds_draw_independent_words() -> None:
    count = 100_000
    drawn = torch.stack([random_words(torch.tensor(s), i, count) for s in (0, 1) for i in (0, 1, 2)]).double()
    correlation = torch.corrcoef(drawn) - torch.eye(6)
    assert float(correlation.abs().max()) < 5 / count**0.5
    assert float((drawn.mean(1) + 0.5).abs().max()) < 5 * 2**16 / (12 * count) ** 0.5


def test_a_seed_is_read_when_the_mask_is_drawn() -> None:
    seed, inputs = torch.tensor(1), torch.ones(100)
    stream = DropoutStream(seed)
    stream(inputs, 0.5)
    seed.fill_(7)
    expected = DropoutStream(7)
    expected(inputs, 0.5)
    assert torch.equal(stream(inputs, 0.5), expected(inputs, 0.5))


@pytest.mark.parametrize("seed", [torch.tensor(1.0), torch.tensor([1, 2])])
def test_a_seed_is_one_integer(seed: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="one int64 seed"):
        random_words(seed, 0, 8)
    with pytest.raises(ValueError, match="one int64 seed"):
        random_words_of_sites(seed, 0, [8, 8])


def test_sites_have_32_bits() -> None:
    seed = torch.tensor(1)
    random_words(seed, 2**32 - 1, 8)
    for draw in (
        lambda: random_words(seed, 2**32, 8),
        lambda: random_words_of_sites(seed, 2**32 - 1, [8, 8]),
    ):
        with pytest.raises(ValueError, match="sites from 0 to"):
            draw()
