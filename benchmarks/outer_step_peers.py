"""The outer step by other means: the same inner problem, S formed at every inner step, plain PyTorch learners.

Each takes what `td3_fast.unroll.pull_back_with_higher` takes and can stand in its place.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp

from td3_fast.learners import Learner
from td3_fast.ops import DropoutStream
from td3_fast.unroll import AdamConfig, InnerLoop
from td3_fast.unroll.higher import Encoder, OuterLoss, Probabilities, dense_inner_loss

# MetaAdam's gradient is NaN where a second moment is exactly 0, unless something is added to it. At float32's precision
# this much is nothing beside any other.
EPS_ROOT = 1e-30

Gradients = tuple[float, tuple[Tensor, ...]]  # the outer loss, and its gradients by the sources


def pull_back_with_torchopt(
    loop: InnerLoop,
    learner: Learner,
    probabilities: Probabilities,
    outer_loss: OuterLoss,
    sources: list[Tensor],
    *,
    warm_up: int,
    window: int,
    trained: bool,
) -> Gradients:
    """By `torchopt.MetaAdam`, which keeps the whole window's graph.

    It adds epsilon to the root of the second moment after the bias of its start is taken out, `higher` and we before;
    so it is given another one at each step, without which the meta-gradients of early windows have little in common.
    """
    import torchopt

    encoder = Encoder(copy.deepcopy(learner))
    items = encoder.learner.item_embeddings.detach()
    if not trained:
        del encoder.learner.item_embeddings  # all parameters of the module move
    adam = loop.adam

    def options(step: int) -> dict[str, Any]:
        return {
            "lr": adam.learning_rate,
            "betas": (adam.beta1, adam.beta2),
            "eps": adam.eps / math.sqrt(1 - adam.beta2 ** (step + 1)),
            "eps_root": EPS_ROOT,
            "weight_decay": adam.weight_decay,
        }

    optimiser = torchopt.MetaAdam(encoder, **options(0))

    def table() -> Tensor:
        return encoder.learner.item_embeddings if trained else items

    for step in range(warm_up + window):
        differentiated = step >= warm_up
        with torch.set_grad_enabled(differentiated):
            rows = probabilities(loop.batch(step), sources)
        optimiser.impl = torchopt.adam(**options(step))
        optimiser.step(dense_inner_loss(loop, encoder, table(), rows, step))
        if not differentiated:
            torchopt.stop_gradient(encoder)
            torchopt.stop_gradient(optimiser)
    loss = outer_loss(encoder, table())
    return float(loss.detach()), torch.autograd.grad(loss, sources)


class _Problem(NamedTuple):
    """The inner loss of one step as a function of the learner's parameters and of the sources."""

    loss: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Tensor]
    num_parameters: int


class _InnerGradient(torch.autograd.Function):
    """The gradient of a step's loss by the parameters, of whose graph nothing is kept.

    Its vector-Jacobian product is taken forward over reverse, as the Hessian is symmetric: the derivative of the
    gradients by parameters and sources in the direction of the cotangent.
    """

    @staticmethod
    def forward(ctx: Any, problem: _Problem, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.problem = problem
        ctx.save_for_backward(*inputs)
        count = problem.num_parameters
        return grad(problem.loss)(inputs[:count], inputs[count:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        count = ctx.problem.num_parameters
        parameters, sources = ctx.saved_tensors[:count], ctx.saved_tensors[count:]

        def gradients(parameters: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            return grad(ctx.problem.loss, argnums=(0, 1))(parameters, sources)

        _, (by_parameters, by_sources) = jvp(gradients, (parameters,), (cotangents,))
        return None, *by_parameters, *by_sources


def pull_back_with_torch_func(
    loop: InnerLoop,
    learner: Learner,
    probabilities: Probabilities,
    outer_loss: OuterLoss,
    sources: list[Tensor],
    *,
    warm_up: int,
    window: int,
    trained: bool,
) -> Gradients:
    """By `torch.func`, jvp of grad for the products with the inner loss's second derivatives.

    Source of the scheme: MixFlow-MG (Kemaev et al., ICML 2025), inner gradients kept.
    """
    encoder = Encoder(learner)
    items = learner.item_embeddings.detach()
    start = {
        name: value.detach()
        for name, value in encoder.named_parameters()
        if trained or name != "learner.item_embeddings"
    }

    def named(parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(start, parameters, strict=True))

    def encode_by(parameters: Sequence[Tensor]) -> Callable[..., Tensor]:
        def encode(inputs: Tensor, positions: Tensor, dropout: DropoutStream | None) -> Tensor:
            return functional_call(encoder, named(parameters), (inputs, positions, dropout))

        return encode

    def table(parameters: Sequence[Tensor]) -> Tensor:
        return named(parameters)["learner.item_embeddings"] if trained else items

    def problem_of(step: int) -> _Problem:
        def loss(parameters: tuple[Tensor, ...], sources: tuple[Tensor, ...]) -> Tensor:
            rows = probabilities(loop.batch(step), sources)
            return dense_inner_loss(loop, encode_by(parameters), table(parameters), rows, step)

        return _Problem(loss, len(start))

    parameters = tuple(start.values())
    first = second = tuple(torch.zeros_like(p) for p in parameters)
    for step in range(warm_up + window):
        with torch.set_grad_enabled(step >= warm_up):
            gradients = _InnerGradient.apply(problem_of(step), *parameters, *sources)
            moved = [
                adam_step(*tensors, step + 1, loop.adam)
                for tensors in zip(parameters, first, second, gradients, strict=True)
            ]
            parameters, first, second = (tuple(tensors) for tensors in zip(*moved, strict=True))
    loss = outer_loss(encode_by(parameters), table(parameters))
    return float(loss.detach()), torch.autograd.grad(loss, sources)


def adam_step(
    parameter: Tensor, first: Tensor, second: Tensor, gradient: Tensor, step: int, adam: AdamConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """One Adam step, differentiable; no derivative flows through the root of a second moment that is 0."""
    gradient = gradient + adam.weight_decay * parameter
    first = torch.lerp(first, gradient, 1 - adam.beta1)
    second = adam.beta2 * second + (1 - adam.beta2) * gradient.square()
    root = torch.where(second == 0, 1.0, second).sqrt().where(second != 0, 0.0)
    size = adam.learning_rate * math.sqrt(1 - adam.beta2**step) / (1 - adam.beta1**step)
    return parameter - size * first / (root + adam.eps), first, second
