"""Inner loops that run beside one another on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

# The steps of a small learner leave most of a GPU idle.
MOST_LANES = 16
LANES_LIMIT = 4 * 2**30  # bytes that they may hold in all


class Lanes:
    """`count` streams of a GPU for as many trajectories at a time; elsewhere the trajectories follow one another.

    Between `with lanes.side_by_side()` and its end, `with lanes.lane(i)` puts work on stream i. All of them start after
    what was asked of the current stream before, which in turn waits for them at the end. So tensors of the current
    stream that they read must live until then; those that they make may be used by the current stream afterwards.
    """

    def __init__(self, device: torch.device, count: int, *, bytes_each: int = 0) -> None:
        """bytes_each: what a lane holds; there are no more lanes than `LANES_LIMIT` is enough for."""
        self.count = max(min(count, MOST_LANES, LANES_LIMIT // max(bytes_each, 1)), 1)
        self._streams: list[torch.cuda.Stream] = []
        if device.type == "cuda" and self.count > 1:
            self._streams = [torch.cuda.Stream(device) for _ in range(self.count)]

    @contextlib.contextmanager
    def side_by_side(self) -> Iterator[Lanes]:
        """Work on the lanes starts after what was asked for before, and ends before what is asked for next."""
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        try:
            yield self
        finally:
            for stream in self._streams:
                torch.cuda.current_stream(stream.device).wait_stream(stream)

    @contextlib.contextmanager
    def lane(self, index: int) -> Iterator[int]:
        """The lane of a trajectory, by its index."""
        lane = index % self.count
        with torch.cuda.stream(self._streams[lane]) if self._streams else contextlib.nullcontext():
            yield lane
