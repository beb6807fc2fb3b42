"""Dropout whose masks are a function of a seed, so that a step recomputed later draws the same ones."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive_seed(seed: int, *path: int | str) -> int:
    """A 63-bit seed for one named use of `seed`, independent of those of every other `path`.

    All randomness of the package descends from one seed through this function, so a run can be continued,
    or one of its steps repeated, without the state of any generator.
    """
    text = "/".join(map(str, (seed, *path)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seeded_generator(seed: int, *path: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded with `derive_seed(seed, *path)`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *path))


class DropoutStream:
    """Inverted dropout: call `i` of a stream made from `seed` always draws the same mask for the same shape.

    A mask needs 16 random bits an element, so a rate is rounded to a multiple of 2**-16; survivors are scaled by
    the inverse of the rounded rate, which keeps the expectation exact. Differentiable to any order in `inputs`.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None

    def __call__(self, inputs: Tensor, rate: float) -> Tensor:
        """`inputs` with elements zeroed at `rate` and the rest scaled up; the same shape and dtype."""
        if rate == 0.0:
            return inputs
        return inputs * self.mask(inputs.shape, rate, dtype=inputs.dtype, device=inputs.device)

    def mask(self, shape: torch.Size, rate: float, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The next mask: 0 at `rate`, else the inverse of the share that survives."""
        dropped = dropped_of(rate)
        lanes = self.words(shape.numel(), device=device)[: shape.numel()].view(shape)
        return (lanes >= dropped - 32768).to(dtype).mul_(65536 / (65536 - dropped))

    def words(self, count: int, *, device: torch.device) -> Tensor:
        """The random words of the next mask: int16, at least `count`; an element survives where its word is high."""
        if self._generator is None:
            self._generator = torch.Generator(device).manual_seed(self._seed)
        words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device)
        return words.random_(-(2**63), None, generator=self._generator).view(torch.int16)


def dropped_of(rate: float) -> int:
    """A dropout rate in 65536ths."""
    dropped = round(rate * 65536)
    if not 0 <= dropped < 65536:
        raise ValueError(f"dropout rate must lie in [0, 1), got {rate}")
    return dropped
