"""The compiled library: whether it is here, and which devices it serves."""

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch

Backend = Literal["fused", "reference"]


class FusedUnavailableWarning(UserWarning):
    """The fused kernels were asked for where none are built; the dense reference ran in their place."""


def _load() -> ModuleType | None:
    # Importing the module registers torch.ops.td3_fast.
    try:
        return importlib.import_module("td3_fast._kernels")
    except ModuleNotFoundError as error:
        if error.name != "td3_fast._kernels":
            raise
        return None
    except ImportError as error:
        raise ImportError(
            f"the kernels of td3_fast do not load beside torch {torch.__version__}; they were probably built "
            "for another version: install td3_fast anew"
        ) from error


_kernels = _load()
# looked up once: torch.compile cannot trace a call of the library
_built_for_cuda = _kernels is not None and bool(_kernels.build_facts()["cuda_architectures"])
_warned: set[str] = set()


def build_facts() -> dict[str, Any] | None:
    """Compiler, flags, versions and GPU architectures of the compiled library; None where it is absent."""
    return None if _kernels is None else dict(_kernels.build_facts())


def has_fused(device: torch.device | str = "cpu") -> bool:
    """Whether fused kernels are built for the type of ``device``."""
    if _kernels is None:
        return False
    kind = (device if isinstance(device, torch.device) else torch.device(device)).type
    return kind != "cuda" or _built_for_cuda


def use_fused(backend: Backend, device: torch.device) -> bool:
    """Whether a call that asked for ``backend`` on ``device`` runs the fused kernels.

    A request for kernels that are not built is granted the reference, with one
    `FusedUnavailableWarning` per device type.

    Raises:
        ValueError: ``backend`` is neither "fused" nor "reference".
    """
    if backend == "fused":
        if has_fused(device):
            return True
        if device.type not in _warned:
            _warned.add(device.type)
            warnings.warn(
                f"td3_fast was built without fused kernels for {device.type}; its ops run the reference, "
                "which is slower and forms tensors of rows x items",
                FusedUnavailableWarning,
                stacklevel=3,
            )
        return False
    if backend != "reference":
        raise ValueError(f'backend must be "fused" or "reference", got {backend!r}')
    return False


Fake = TypeVar("Fake", bound=Callable[..., object])


def register_fake(name: str) -> Callable[[Fake], Fake]:
    """`torch.library.register_fake`, where the operator exists."""
    if _kernels is None:
        return lambda fake: fake
    return torch.library.register_fake(name)


def registered(name: str) -> torch._ops.OpOverload | None:
    """``torch.ops.td3_fast.<name>``, or None where the compiled library is absent."""
    return None if _kernels is None else getattr(torch.ops.td3_fast, name).default


def require_fused(device: torch.device) -> None:
    """Raise RuntimeError where no fused kernels are built for the type of ``device``."""
    if not has_fused(device):
        raise RuntimeError(f"td3_fast was built without fused kernels for {device.type}")
