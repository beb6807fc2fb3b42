"""The paper's scheme, as an oracle: every inner step forms S, and `higher` keeps the whole window's graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from td3_fast.learners import Learner
from td3_fast.ops import DropoutStream
from td3_fast.unroll.inner import InnerLoop

# (encode, item table) -> outer loss
Encode = Callable[[Tensor, Tensor, DropoutStream | None], Tensor]
OuterLoss = Callable[[Encode, Tensor], Tensor]
# (users (b,), sources) -> S (b, ζ, n)
Probabilities = Callable[[Tensor, Sequence[Tensor]], Tensor]


class Encoder(nn.Module):
    """A learner whose forward pass is `encode`."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, inputs_embeds: Tensor, positions: Tensor, dropout: DropoutStream | None) -> Tensor:
        return self.learner.encode(inputs_embeds, positions, dropout=dropout)


def dense_inner_loss(
    loop: InnerLoop,
    encode: Encode,
    items: Tensor,  # (n, d)
    rows: Tensor,  # (b, ζ, n), S of the step's users
    step: int,
) -> Tensor:
    """The inner loss of a step, entropy of the summary included, by the paper's formula."""
    inputs = rows[:, :-1] @ items
    losses = []
    for targets, dropout in loop.passes(loop.inputs(step).to(items.device)):
        hidden = encode(inputs, targets - 1, dropout)
        truth = rows.gather(1, targets.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
        predicted = torch.log_softmax(hidden @ items.T, dim=-1)
        losses.append((truth * (truth.log() - predicted)).sum(-1))
    return torch.cat(losses, dim=1).mean()


def pull_back_with_higher(
    loop: InnerLoop,
    learner: Learner,
    probabilities: Probabilities,
    outer_loss: OuterLoss,
    sources: list[Tensor],
    *,
    warm_up: int,
    window: int,
    trained: bool,
) -> tuple[float, tuple[Tensor, ...]]:
    """Outer loss after `warm_up + window` inner steps from `learner`, and its gradients through the last `window`.

    probabilities: differentiable in `sources`; trained: whether the item table moves.
    Memory grows with window × batch × positions × items. Needs the package `higher`.
    """
    import higher  # an extra of the package; it carries no types

    encoder = Encoder(copy.deepcopy(learner))
    encoder.learner.item_embeddings.requires_grad_(trained)
    adam = loop.adam
    optimiser = torch.optim.Adam(
        [p for p in encoder.parameters() if p.requires_grad],
        lr=adam.learning_rate,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        weight_decay=adam.weight_decay,
    )

    def inner_loss(model: Encoder, step: int) -> Tensor:
        rows = probabilities(loop.batch(step), sources)
        return dense_inner_loss(loop, model, model.learner.item_embeddings, rows, step)

    with higher.innerloop_ctx(encoder, optimiser, track_higher_grads=False) as (model, differentiable):
        for step in range(warm_up):
            differentiable.step(inner_loss(model, step))
        encoder.load_state_dict(model.state_dict())
        moments = [
            {i: {k: _detached(v) for k, v in state.items()} for i, state in group.items()}
            for group in differentiable.state
        ]
    with higher.innerloop_ctx(encoder, optimiser) as (model, differentiable):
        if warm_up:
            for group, kept in zip(differentiable.state, moments, strict=True):
                group.update(kept)
        for step in range(warm_up, warm_up + window):
            differentiable.step(inner_loss(model, step))
        loss = outer_loss(model, model.learner.item_embeddings)
        gradients = torch.autograd.grad(loss, sources)
    return float(loss.detach()), gradients


def _detached(value: Tensor | int) -> Tensor | int:
    return value.detach() if isinstance(value, Tensor) else value
