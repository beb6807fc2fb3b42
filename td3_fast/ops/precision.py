"""Autocast leaves alone what meets all items, and what is differentiated twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """Half precision in float32 under autocast, which made it so: as PyTorch takes softmax and losses. Else itself."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.float() if half and torch.is_autocast_enabled(tensor.device.type) else tensor


def autocast_off(like: Tensor) -> AbstractContextManager[Any]:
    """No autocast on the device of a tensor."""
    kind = like.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


@contextmanager
def full_precision() -> Iterator[None]:
    """No autocast on any device: what trains or ranks here has the precision of its parameters throughout."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
