"""Adam with coupled weight decay, and its vector-Jacobian product."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from td3_fast.checks import check_not_negative, check_rates
from td3_fast.ops import has_one_pass_adam, one_pass_adam_adjoint_, one_pass_adam_step_

ELEMENTS_AT_ONCE = 2**20  # of an item table


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam with coupled weight decay: `weight_decay * parameter` is added to the gradient.

    `eps` is added to the root of the second moment before the bias of that is taken out, as the paper's more efficient
    form of the algorithm and `higher` have it; `torch.optim.Adam` adds it afterwards, where it weighs less in the first
    steps.
    """

    learning_rate: float
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_not_negative(self, "learning_rate", "weight_decay", "eps")
        check_rates(self, "beta1", "beta2")


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

    def to(self, device: torch.device) -> AdamState:
        """The same state on a device."""
        p, m, v = (tuple(t.to(device) for t in field) for field in self[:3])
        return AdamState(p, m, v, self.step)


def initial_state(parameters: Sequence[Tensor]) -> AdamState:
    """A fresh optimiser on copies of `parameters`."""
    copies = tuple(p.detach().clone() for p in parameters)
    zeros = tuple(torch.zeros_like(p) for p in copies)
    return AdamState(copies, zeros, tuple(torch.zeros_like(p) for p in copies), 0)


def adam_step_(
    state: AdamState, gradients: Sequence[Tensor], config: AdamConfig, size: float | Tensor | None = None
) -> AdamState:
    """One Adam step, overwriting the tensors of `state`. The epsilon stands as in `higher`: sqrt(v) + eps.

    size: `step_size` of the step, where it is known already or lies in a tensor ().
    """
    step = state.step + 1
    if size is None:
        size = step_size(step, config)
    for tensors in zip(*state[:3], gradients, strict=True):
        if has_one_pass_adam(*tensors, size=size):
            one_pass_adam_step_(*tensors, _rates(config), size)
            continue
        for p, m, v, g in pieces(*tensors):
            if config.weight_decay:
                g = g.add(p, alpha=config.weight_decay)
            m.lerp_(g, 1 - config.beta1)
            v.mul_(config.beta2).addcmul_(g, g, value=1 - config.beta2)
            root = v.sqrt().add_(config.eps)
            if isinstance(size, Tensor):
                p.sub_(torch.div(m, root, out=root).mul_(size))
            else:
                p.addcdiv_(m, root, value=-size)
    return state._replace(step=step)


def adam_adjoint_(
    before: tuple[Tensor, Tensor, Tensor],  # parameter, first and second moment
    gradient: Tensor,
    cotangents: tuple[Tensor, Tensor, Tensor],  # of the same three after the step
    size: float | Tensor,  # `step_size` of the step in question
    config: AdamConfig,
) -> Tensor:
    """Vector-Jacobian product of one Adam step: the cotangent of the gradient, taken as an independent input.

    Overwrites `cotangents` with those of the three before the step; that of the parameter leaves out the path through
    the gradient. Where the second moment is exactly 0, its square root has an infinite slope; no derivative flows
    there, as in `higher`.
    """
    if has_one_pass_adam(*before, gradient, *cotangents, size=size):
        return one_pass_adam_adjoint_(*before, gradient, *cotangents, _rates(config), size)
    to_gradient = torch.empty_like(gradient)
    for p, m, v, g, to_p, to_m, to_v, to_g in pieces(*before, gradient, *cotangents, to_gradient):
        if config.weight_decay:
            g = g.add(p, alpha=config.weight_decay)
        new_m = torch.lerp(m, g, 1 - config.beta1)
        new_v = (v * config.beta2).addcmul_(g, g, value=1 - config.beta2)
        root = new_v.sqrt()
        scaled = to_p / (root + config.eps)
        if isinstance(size, Tensor):
            to_m.sub_(scaled * size)
        else:
            to_m.add_(scaled, alpha=-size)
        # to_m is now of the new moment
        slope = scaled.mul_(new_m).div_(root + config.eps).div_(root).mul_(size / 2)
        to_v.copy_(torch.where(new_v == 0, 0.0, slope.add_(to_v)))
        torch.mul(to_m, 1 - config.beta1, out=to_g)
        to_g.addcmul_(g, to_v, value=2 * (1 - config.beta2))
        if config.weight_decay:
            to_p.add_(to_g, alpha=config.weight_decay)
        to_m.mul_(config.beta1)
        to_v.mul_(config.beta2)
    return to_gradient


def _rates(config: AdamConfig) -> list[float]:
    return [config.beta1, config.beta2, config.eps, config.weight_decay]


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same elements of tensors alike in shape, as many at a time as keep intermediate results small: the tensors
    themselves, or parts of them."""
    if tensors[0].numel() <= ELEMENTS_AT_ONCE:
        yield tensors
    else:
        yield from zip(*(t.view(-1).split(ELEMENTS_AT_ONCE) for t in tensors), strict=True)


def step_size(step: int, config: AdamConfig) -> float:
    """What a step, counted from 1, multiplies m / (sqrt(v) + eps) by."""
    return config.learning_rate * math.sqrt(1 - config.beta2**step) / (1 - config.beta1**step)
