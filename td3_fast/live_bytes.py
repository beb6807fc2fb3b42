"""The bytes of the tensors that a piece of code has alive at one time."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While entered, follows every tensor that an operator returns until its storage is freed.

    `now` counts those alive and `peak` the most that were; tensors from before do not count, nor does what operators
    need inside. Derivatives are followed as well: on the CPU they run in the thread that asks for them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}  # storage -> bytes; 0 for those from before

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # PyTorch would wrap what follows for its compiler, and for that import the whole of it
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            self._follow(value, count=False)
        results = func(*args, **kwargs)
        for value in tree_leaves(results):
            self._follow(value, count=True)
        self.peak = max(self.peak, self.now)
        return results

    def _follow(self, value: Any, *, count: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes() if count else 0
            self.now += self._sizes[key]
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
