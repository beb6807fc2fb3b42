"""Adam with coupled weight decay, and its vector-Jacobian product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam with coupled weight decay: `weight_decay * parameter` is added to the gradient."""

    learning_rate: float
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


class AdamState(NamedTuple):
    """Parameters and moments after `step` steps; the tensors of a field are alike in shape."""

    parameters: tuple[Tensor, ...]
    first_moments: tuple[Tensor, ...]
    second_moments: tuple[Tensor, ...]
    step: int

    def clone(self) -> AdamState:
        """The same state in tensors of its own."""
        p, m, v = (tuple(t.clone() for t in field) for field in self[:3])
        return AdamState(p, m, v, self.step)


def initial_state(parameters: Sequence[Tensor]) -> AdamState:
    """A fresh optimiser on copies of `parameters`."""
    copies = tuple(p.detach().clone() for p in parameters)
    zeros = tuple(torch.zeros_like(p) for p in copies)
    return AdamState(copies, zeros, tuple(torch.zeros_like(p) for p in copies), 0)


def adam_step_(state: AdamState, gradients: Sequence[Tensor], config: AdamConfig) -> AdamState:
    """One Adam step, overwriting the tensors of `state`. The epsilon stands as in `higher`: sqrt(v) + eps."""
    step = state.step + 1
    size = config.learning_rate * math.sqrt(1 - config.beta2**step) / (1 - config.beta1**step)
    for p, m, v, g in zip(*state[:3], gradients, strict=True):
        if config.weight_decay:
            g = g.add(p, alpha=config.weight_decay)
        m.lerp_(g, 1 - config.beta1)
        v.mul_(config.beta2).addcmul_(g, g, value=1 - config.beta2)
        p.addcdiv_(m, v.sqrt().add_(config.eps), value=-size)
    return state._replace(step=step)


class AdamAdjoint(NamedTuple):
    """Cotangents of one tensor on the way from after an Adam step to before it."""

    parameter: Tensor
    first_moment: Tensor
    second_moment: Tensor
    gradient: Tensor


def adam_adjoint(
    before: tuple[Tensor, Tensor, Tensor],  # parameter, first and second moment
    gradient: Tensor,
    cotangents: tuple[Tensor, Tensor, Tensor],  # of the same three after the step
    step: int,  # counting the step in question, from 1
    config: AdamConfig,
) -> AdamAdjoint:
    """Vector-Jacobian product of one Adam step, the gradient taken as an independent input.

    Where the second moment is exactly 0, its square root has an infinite slope; no derivative flows there, as in
    `higher`. What comes back for `parameter` leaves out the path through the gradient.
    """
    p, m, v = before
    to_p, to_m, to_v = cotangents
    if config.weight_decay:
        gradient = gradient.add(p, alpha=config.weight_decay)
    size = config.learning_rate * math.sqrt(1 - config.beta2**step) / (1 - config.beta1**step)
    new_m = torch.lerp(m, gradient, 1 - config.beta1)
    new_v = (v * config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
    root = new_v.sqrt()
    scaled = to_p / (root + config.eps)
    to_new_m = to_m.add(scaled, alpha=-size)
    slope = (scaled * new_m).div_(root + config.eps).div_(root).mul_(size / 2)
    to_new_v = torch.where(new_v == 0, 0.0, slope.add_(to_v))
    to_g = (to_new_m * (1 - config.beta1)).addcmul_(gradient, to_new_v, value=2 * (1 - config.beta2))
    to_parameter = to_p.add(to_g, alpha=config.weight_decay) if config.weight_decay else to_p
    return AdamAdjoint(to_parameter, to_new_m * config.beta1, to_new_v * config.beta2, to_g)
