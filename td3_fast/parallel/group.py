"""Processes that work together: who is there, what each takes, and what they tell each other."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# pretraining, which one process does for all, may take long; a process that dies is noticed at once all the same
PATIENCE = timedelta(days=7)


class LostRank(ConnectionError):
    """Another process of the run is gone, or cannot be reached."""


@dataclass(frozen=True)
class Group:
    """Some processes, numbered from 0; this one is number `rank`. All call the same methods in the same order.

    Without a `handle` the process is alone, and every method is the identity.
    """

    rank: int = 0
    size: int = 1
    handle: ProcessGroup | None = None
    device: str = "cpu"  # of the tensors that it can exchange

    def rows(self, count: int) -> slice:
        """The rows of this process, of a table of `count` rows that is split evenly and in order."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def turns(self, count: int) -> range:
        """Which of `count` tasks this process takes, where they are dealt out in turn."""
        return range(self.rank, count, self.size)

    def stack(self, tensor: Tensor) -> Tensor:
        """Every process's `tensor`, in the order of their ranks: (size, *shape). Not differentiable."""
        tensor = tensor.detach().contiguous()
        if self.handle is None:
            return tensor.unsqueeze(0)
        import torch.distributed as dist

        stacked = tensor.new_empty(self.size, *tensor.shape)
        with self._noticing():
            dist.all_gather(list(stacked.unbind(0)), tensor, group=self.handle)
        return stacked

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of every process's `tensor` in the order of their ranks: the same bits everywhere."""
        return tensor if self.handle is None else self.stack(tensor).sum(0)

    def common(self, tensor: Tensor) -> Tensor:
        """Process 0's `tensor`: where all have the same but for rounding, the same bits everywhere."""
        return tensor if self.handle is None else self.stack(tensor)[0]

    def in_order(self, own: Sequence[tuple[Tensor, ...]], count: int) -> list[tuple[Tensor, ...]]:
        """What each of `count` tasks has given, from what those of `turns(count)` have: tensors alike in shape.

        Every process has at least one task.
        """
        given: list[tuple[Tensor, ...]] = []
        for turn in range(-(-count // self.size)):
            # in the last turn some have none left, and hand in one that nobody takes
            stacked = [self.stack(tensor) for tensor in own[min(turn, len(own) - 1)]]
            given += zip(*(tensors.unbind(0) for tensors in stacked), strict=True)
        return given[:count]

    def first_of(self, values: Mapping[str, float]) -> dict[str, float]:
        """What process 0 has for `values`; all name the same."""
        own = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        return dict(zip(values, self.stack(own)[0].tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in some process."""
        return bool(self.stack(torch.tensor(flag, device=self.device)).any())

    @contextmanager
    def _noticing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # a transport's own words, without the place in its source and its advice
            reason = re.sub(r"^\[[^\]]*\] ", "", str(error).strip().splitlines()[-1]).partition(". ")[0]
            raise LostRank(
                f"process {self.rank} of {self.size} lost the others, one of them has probably died ({reason})"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes of a run as a grid: those of `items` hold one item table among them, each its rows; those of
    `work` hold the same rows, and share out the trajectories of an outer step, or its real examples."""

    everyone: Group = field(default_factory=Group)
    items: Group = field(default_factory=Group)
    work: Group = field(default_factory=Group)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.everyone.rank == 0


ALONE = Ranks()


def is_launched(environment: Mapping[str, str]) -> bool:
    """Whether the variables are those of a process that torchrun started beside others."""
    return int(environment.get("WORLD_SIZE", "1")) > 1


@contextmanager
def join(
    *, item_shards: int = 1, device: str = "cpu", init_method: str = "env://", rank: int = -1, size: int = -1
) -> Iterator[Ranks]:
    """The grid of all processes, connected while the block runs: by gloo on CPUs, by nccl on GPUs.

    item_shards: over how many processes an item table is split; it divides their number. By default torchrun's
    variables say where to meet and who this is.

    Raises:
        ValueError: `item_shards` does not divide the number of processes.
    """
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous(init_method, rank, size, timeout=PATIENCE))
    # torchrun keeps one store from restart to restart, and in it the addresses of processes that are gone
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if torch.device(device).type == "cuda" else "gloo",
        store=dist.PrefixStore(f"attempt {attempt}", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
    )
    try:
        yield grid(item_shards, device=device)
    finally:
        dist.destroy_process_group()


def grid(item_shards: int = 1, *, device: str = "cpu") -> Ranks:
    """The processes that `join` has connected, with item tables split over `item_shards` of them.

    Raises:
        ValueError: that does not divide their number.
    """
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    if item_shards < 1 or size % item_shards:
        raise ValueError(
            f"{size} processes cannot split an item table over {item_shards}: choose a divisor of {size}"
        )

    def own(groups: list[list[int]]) -> Group:
        # every process takes part in making every group
        handles = [dist.new_group(members, timeout=PATIENCE) for members in groups]
        for members, handle in zip(groups, handles, strict=True):
            if rank in members:
                alone = len(members) == 1
                return Group(members.index(rank), len(members), None if alone else handle, device)
        raise AssertionError(f"rank {rank} is in none of {groups}")

    starts = range(0, size, item_shards)
    return Ranks(
        everyone=own([list(range(size))]),
        items=own([list(range(start, start + item_shards)) for start in starts]),
        work=own([list(range(column, size, item_shards)) for column in range(item_shards)]),
    )
