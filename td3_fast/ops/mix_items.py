"""Products of kept probabilities with item tables that are much narrower than the catalogue is long."""

import torch
from torch import Tensor

from td3_fast.ops.library import has_fused, register_fake


def mix_items(probabilities: Tensor, items: Tensor) -> Tensor:
    """``probabilities @ items``: (rows, n), (n, d) -> (rows, d). Not differentiable.

    General matrix products run at half their rate or less where d is a few dozen; the CPU kernel reads the
    probabilities once, in place, in any slice of rows.
    """
    if _fused(probabilities, items):
        mixed: Tensor = torch.ops.td3_fast.mix_items(probabilities, items)
        return mixed
    return probabilities @ items


def mix_items_transposed(probabilities: Tensor, cotangent: Tensor) -> Tensor:
    """``probabilities.T @ cotangent``: (rows, n), (rows, d) -> (n, d), as `mix_items`."""
    if _fused(probabilities, cotangent):
        mixed: Tensor = torch.ops.td3_fast.mix_items_transposed(probabilities, cotangent)
        return mixed
    return probabilities.T @ cotangent


def _fused(probabilities: Tensor, other: Tensor) -> bool:
    if torch.is_grad_enabled() and (probabilities.requires_grad or other.requires_grad):
        raise RuntimeError("mix_items has no derivative: detach its inputs, or use soft_embedding")
    return probabilities.device.type == "cpu" and has_fused("cpu")


@register_fake("td3_fast::mix_items")
def _(probabilities: Tensor, items: Tensor) -> Tensor:
    return items.new_empty(probabilities.shape[0], items.shape[1])


@register_fake("td3_fast::mix_items_transposed")
def _(probabilities: Tensor, cotangent: Tensor) -> Tensor:
    return cotangent.new_empty(probabilities.shape[1], cotangent.shape[1])
