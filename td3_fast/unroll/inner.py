"""Training a learner on a summary, and the derivative of what comes out with respect to the summary.

The inner loop touches the summary only through its soft embeddings X, and the item table only through log-sum-exps,
so nothing of size positions × items takes part in it. The adjoint of a window of steps is taken one step at a time,
last to first: one step's graph is alive at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from td3_fast.learners import FlatParameters, Learner
from td3_fast.ops import DropoutStream, derive_seed, item_cross_entropy, seeded_generator
from td3_fast.progress import Progress, silent
from td3_fast.unroll.adam import AdamConfig, AdamState, adam_adjoint, adam_step_
from td3_fast.unroll.mixture import ItemMixture

ItemEmbedding = Literal["frozen", "trained"]
FIRST_MIDDLE_POSITION = 5


@dataclass(frozen=True, kw_only=True)
class InnerLoop:
    """The inner problem of one outer step, and of training on a finished summary.

    Step `t` (0-based) takes the synthetic users `batch(t)` and minimises the mean over them and over the target
    positions of `lse(h Eᵀ) − h·x`: the KL divergence from the summary's distribution, up to a constant of the summary.
    An `AdamState` holds the flat parameters (size,) of the learner and, where the item table is trained, the table.
    """

    learner: Learner
    num_users: int
    num_positions: int
    batch_size: int
    adam: AdamConfig
    seed: int
    augmentation: bool = True  # ALT: a middle position beside the last one
    separate_passes: bool = False  # an encoder pass with its own dropout for each of the two, as the authors do
    dropout: bool = True
    restart_batches_at: int | None = None  # the step at which the cycle of users starts over

    def __post_init__(self) -> None:
        if self.num_positions < 2:
            raise ValueError(f"a summary needs at least 2 positions to predict one, got {self.num_positions}")
        if self.num_positions - 1 > self.learner.max_len:
            raise ValueError(
                f"a summary of {self.num_positions} positions needs a learner with max_len >= "
                f"{self.num_positions - 1}, got {self.learner.max_len}"
            )

    def batch(self, step: int) -> Tensor:
        """The synthetic users of a step, cyclic and in order: (b,) int64."""
        size = min(self.batch_size, self.num_users)
        if self.restart_batches_at is not None and step >= self.restart_batches_at:
            step -= self.restart_batches_at
        return torch.arange(step * size, (step + 1) * size) % self.num_users

    def targets(self, step: int) -> Tensor:
        """The target positions of a step: (b, 1 or 2) int64, the last one first."""
        users = min(self.batch_size, self.num_users)
        last = torch.full((users, 1), self.num_positions - 1)
        if not self.augmentation:
            return last
        high = max(self.num_positions - 1, 2)
        low = min(FIRST_MIDDLE_POSITION, high - 1)
        middle = torch.randint(low, high, (users, 1), generator=seeded_generator(self.seed, "middle", step))
        return torch.cat([last, middle], dim=1)

    def passes(self, step: int) -> list[tuple[Tensor, DropoutStream | None]]:
        """The encoder passes of a step: their target positions (b, k), and their dropout."""
        targets = self.targets(step)
        parts = targets.split(1, dim=1) if self.separate_passes else (targets,)
        return [
            (part, DropoutStream(derive_seed(self.seed, "dropout", step, index)) if self.dropout else None)
            for index, part in enumerate(parts)
        ]

    def loss(self, flat: FlatParameters, theta: Tensor, items: Tensor, embeds: Tensor, step: int) -> Tensor:
        """The inner loss of a step.

        theta: (flat.size,); items: (n, d); embeds: (b, ζ, d), the soft embeddings of `batch(step)`. Differentiable
        twice in all three.
        """
        inputs = embeds[:, :-1]
        passes = self.passes(step)
        hidden = [flat.encode(theta, inputs, targets - 1, dropout=dropout) for targets, dropout in passes]
        targets = torch.cat([targets for targets, _ in passes], dim=1)
        rows = embeds.gather(1, targets.unsqueeze(-1).expand(-1, -1, embeds.shape[-1]))
        return item_cross_entropy(torch.cat(hidden, dim=1).flatten(0, 1), items, rows.flatten(0, 1)).mean()

    def run(
        self,
        state: AdamState,
        items: Tensor,
        mixture: ItemMixture,
        *,
        until: int,
        kept: list[AdamState] | None = None,
        progress: Progress = silent,
    ) -> tuple[AdamState, list[float]]:
        """Take optimiser steps, overwriting the tensors of `state`, until `until` steps are taken in all.

        items: (n, d), the table where `state` holds none. Appends to `kept` a copy of the state before each step.
        Returns the last state and the loss of each step.
        """
        flat = FlatParameters(self.learner)
        losses: list[float] = []
        first = state.step
        for step in range(first, until):
            if kept is not None:
                kept.append(state.clone())
            users = self.batch(step)
            leaves = [p.detach().requires_grad_() for p in state.parameters]
            table = leaves[1] if len(leaves) > 1 else items
            embeds = mixture.embed(users, table.detach())
            sources = [*leaves, embeds.requires_grad_()] if len(leaves) > 1 else leaves
            loss = self.loss(flat, leaves[0], table, embeds, step)
            gradients = torch.autograd.grad(loss, sources)
            if len(leaves) > 1:
                gradients = (gradients[0], gradients[1] + mixture.embed_transposed(users, gradients[2]))
            state = adam_step_(state, gradients, self.adam)
            losses.append(float(loss.detach()))
            progress("fit", step + 1 - first, until - first, {"loss": losses[-1]})
        return state, losses

    def pull_back(
        self, states: list[AdamState], cotangents: tuple[Tensor, ...], items: Tensor, mixture: ItemMixture
    ) -> Tensor:
        """The gradient of the tensor that `mixture` was made from, pulled back through a window of steps.

        states: before each step of the window, as `run` keeps them; cotangents: of the parameters after the last one.
        """
        flat = FlatParameters(self.learner)
        to_p = list(cotangents)
        to_m = [torch.zeros_like(c) for c in cotangents]
        to_v = [torch.zeros_like(c) for c in cotangents]
        for state in reversed(states):
            users = self.batch(state.step)
            leaves = [p.detach().requires_grad_() for p in state.parameters]
            trained = len(leaves) > 1
            table = leaves[1] if trained else items
            embeds = mixture.embed(users, table.detach()).requires_grad_()
            loss = self.loss(flat, leaves[0], table, embeds, state.step)
            first = torch.autograd.grad(loss, [*leaves, embeds] if trained else leaves, create_graph=True)
            gradients = [g.detach() for g in first[: len(leaves)]]
            if trained:
                gradients[1] = gradients[1] + mixture.embed_transposed(users, first[2].detach())
            for i, (p, m, v) in enumerate(zip(*state[:3], strict=True)):
                to_p[i], to_m[i], to_v[i], gradients[i] = adam_adjoint(
                    (p, m, v), gradients[i], (to_p[i], to_m[i], to_v[i]), state.step + 1, self.adam
                )
            # gradients now holds the cotangents of the step's gradients; X feeds the table's one as well
            if trained:
                mixture.note(users, first[2].detach(), gradients[1])
                gradients.append(mixture.embed(users, gradients[1]))
            second = torch.autograd.grad(first, [*leaves, embeds], gradients)
            mixture.note(users, second[-1], table.detach())
            to_p = [p + h for p, h in zip(to_p, second, strict=False)]
            if trained:
                to_p[1] += mixture.embed_transposed(users, second[-1])
        return mixture.gradient()
