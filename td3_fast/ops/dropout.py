"""Dropout whose masks are a function of a seed, so that a step recomputed later draws the same ones."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from td3_fast.ops.library import Backend, register_fake, use_fused


def derive_seed(seed: int, *path: int | str) -> int:
    """A 63-bit seed for one named use of `seed`, independent of those of every other `path`.

    All randomness of the package descends from one seed through this function, so a run can be continued,
    or one of its steps repeated, without the state of any generator.
    """
    return derive_seeds(seed, [seed_path(*path)])[0]


def seed_path(*path: int | str) -> bytes:
    """What follows the seed in the text that another is derived from, as `derive_seeds` takes it."""
    return "".join(f"/{part}" for part in path).encode()


def derive_seeds(seed: int, paths: Iterable[bytes]) -> list[int]:
    """`derive_seed` for many paths, in a third of the time: those that are asked for again need no text made anew."""
    begun = hashlib.blake2b(str(seed).encode(), digest_size=8)
    seeds = []
    for path in paths:
        whole = begun.copy()
        whole.update(path)
        seeds.append(int.from_bytes(whole.digest(), "little") >> 1)
    return seeds


def seeded_generator(seed: int, *path: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded with `derive_seed(seed, *path)`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *path))


class DropoutStream:
    """Inverted dropout: call `i` of a stream made from `seed` always draws the same mask for the same shape.

    The masks are those of `random_words`, on every device the same. A seed that is a tensor, one int64 on the device of
    the inputs, is read when a mask is drawn: a captured CUDA graph draws by what lies there when it is replayed.

    A mask needs 16 random bits an element, so a rate is rounded to a multiple of 2**-16; survivors are scaled by
    the inverse of the rounded rate, which keeps the expectation exact. Differentiable to any order in `inputs`.
    """

    def __init__(self, seed: int | Tensor) -> None:
        self._seed = torch.tensor(seed, device="cpu") if isinstance(seed, int) else seed
        self._sites = 0

    def __call__(self, inputs: Tensor, rate: float) -> Tensor:
        """`inputs` with elements zeroed at `rate` and the rest scaled up; the same shape and dtype."""
        if dropped_of(rate) == 0:  # as the kernels have it, which are told no more
            return inputs
        return inputs * self.mask(inputs.shape, rate, dtype=inputs.dtype, device=inputs.device)

    def mask(self, shape: torch.Size, rate: float, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The next mask: 0 at `rate`, else the inverse of the share that survives."""
        dropped = dropped_of(rate)
        lanes = self.words(shape.numel(), device=device).view(shape)
        return (lanes >= dropped - 32768).to(dtype).mul_(65536 / (65536 - dropped))

    def words(self, count: int, *, device: torch.device) -> Tensor:
        """The random words of the next mask, (count,) int16; an element survives where its word is high."""
        return random_words(self._seed_on(device), self._next_sites(1), count)

    def words_of_masks(self, counts: Sequence[int], *, device: torch.device) -> list[Tensor]:
        """The random words of the next masks, as `words` gives them one by one, in one pass."""
        return random_words_of_sites(self._seed_on(device), self._next_sites(len(counts)), counts)

    def _seed_on(self, device: torch.device) -> Tensor:
        if self._seed.device != device:
            self._seed = self._seed.to(device, non_blocking=True)
        return self._seed

    def _next_sites(self, count: int) -> int:
        """The first of so many sites, which are taken."""
        first, self._sites = self._sites, self._sites + count
        return first


def random_words(seed: Tensor, site: int, count: int, *, backend: Backend = "fused") -> Tensor:
    """Uniform 16-bit words as a function of a seed and a place: words 8i to 8i + 7 are block i of Philox4x32-10.

    The key is the seed, the counter the number of the block (64 bits) and the site (32 bits), so that any part can be
    drawn again anywhere, and no state is kept between calls.

    Args:
        seed: one int64, on the device that draws.
        site: which of the independent sequences of the seed, in [0, 2**32).
        count: how many words.

    Returns:
        (count,) int16, the same bits by either backend on every device.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    if use_fused(backend, seed.device):
        words: Tensor = torch.ops.td3_fast.random_words(seed, site, count)
        return words
    return _reference(seed, site, count)


def random_words_of_sites(
    seed: Tensor, first_site: int, counts: Sequence[int], *, backend: Backend = "fused"
) -> list[Tensor]:
    """`random_words` of as many sites in a row as there are counts, on a GPU by one kernel for up to 25 of them.

    Args:
        seed: one int64, on the device that draws.
        first_site: that of the first count.
        counts: how many words of each site.

    Returns:
        For each count (count,) int16; the fused ones are parts of one tensor, each of which starts at 16 bytes.
    """
    if use_fused(backend, seed.device):
        words: Tensor = torch.ops.td3_fast.random_words_of_sites(seed, first_site, counts)
        return list(torch.split_with_sizes(words, _with_gaps(tuple(counts)))[::2])
    return [_reference(seed, first_site + i, count) for i, count in enumerate(counts)]


WORDS_PER_BLOCK = 8


@functools.lru_cache(maxsize=64)
def _with_gaps(counts: tuple[int, ...]) -> tuple[int, ...]:
    """Each count and what is left of its last block: whole blocks are drawn."""
    return tuple(size for count in counts for size in (count, -count % WORDS_PER_BLOCK))


MASK = 2**32 - 1
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def _reference(seed: Tensor, site: int, count: int) -> Tensor:
    # unsigned 32-bit numbers in int64, whose products wrap around as those of unsigned 64 bits do
    block = torch.arange((count + WORDS_PER_BLOCK - 1) // WORDS_PER_BLOCK, device=seed.device)
    x = [block & MASK, block >> 32, torch.full_like(block, site), torch.zeros_like(block)]
    keys = [seed & MASK, (seed >> 32) & MASK]
    for _ in range(10):
        first, second = (x[2 * i] * MULTIPLIERS[i] for i in (0, 1))
        high = [(product >> 32) & MASK for product in (first, second)]
        x = [high[1] ^ x[1] ^ keys[0], second & MASK, high[0] ^ x[3] ^ keys[1], first & MASK]
        keys = [(key + step) & MASK for key, step in zip(keys, WEYL, strict=True)]
    return torch.stack(x, dim=1).to(torch.int32).view(torch.int16).view(-1)[:count]


@register_fake("td3_fast::random_words")
def _(seed: Tensor, site: int, count: int) -> Tensor:
    return seed.new_empty(count, dtype=torch.int16)


@register_fake("td3_fast::random_words_of_sites")
def _(seed: Tensor, first_site: int, counts: Sequence[int]) -> Tensor:
    return seed.new_empty(sum(count + -count % WORDS_PER_BLOCK for count in counts), dtype=torch.int16)


def dropped_of(rate: float) -> int:
    """A dropout rate in 65536ths."""
    dropped = round(rate * 65536)
    if not 0 <= dropped < 65536:
        raise ValueError(f"dropout rate must lie in [0, 1), got {rate}")
    return dropped
