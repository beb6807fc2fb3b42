"""What an outer step minimises: how a learner that was trained on the summary does on real examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from td3_fast.data import Batch, Examples, cut_batch
from td3_fast.distill_config import DistillConfig
from td3_fast.learners import FlatParameters, Learner
from td3_fast.ops import DropoutStream, derive_seed
from td3_fast.parallel import WHOLE, Group, ItemTables


class OuterObjective:
    """Cross-entropy of the next item plus alignment of features, on one batch of real examples.

    Of a group of processes each takes its share of the micro-batches: losses and gradients add up to those of all.
    """

    def __init__(
        self,
        config: DistillConfig,
        teacher: Learner,
        flat: FlatParameters,
        examples: Examples,
        index: np.ndarray,
        *,
        seed: int,
        micro_batch: int,
        tables: ItemTables = WHOLE,
        sharing: Group | None = None,
    ) -> None:
        self._config = config
        self._tables = tables
        self._flat = flat
        self._teacher_parameters = flat.gather(teacher.state_dict())
        self._teacher_items = teacher.item_embeddings.detach()
        self._count = len(index)
        by_length = index[np.argsort(examples.lengths[index], kind="stable")]
        sharing = sharing or Group()
        size = micro_batch
        # masks are drawn by micro-batch, so where there are some, micro-batches stay as they are in one process
        if not (config.semantics.outer_dropout or config.semantics.alignment_dropout):
            size = min(size, -(-len(index) // sharing.size))
        firsts = list(enumerate(range(0, len(index), size)))
        self.parts = [
            (i, cut_batch(examples, by_length[first : first + size], teacher.max_len))
            for i, first in firsts[sharing.rank :: sharing.size]
        ]
        self._seed = seed

    def _dropout(self, switch: bool, *path: int | str) -> DropoutStream | None:
        return DropoutStream(derive_seed(self._seed, *path)) if switch else None

    def losses(self, encode: Callable[..., Tensor], items: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each micro-batch of this process its share of the cross-entropy and of the alignment."""
        semantics = self._config.semantics
        for i, part in self.parts:
            batch = Batch(*(t.to(items.device, non_blocking=True) for t in part))
            positions = (batch.lengths - 1).unsqueeze(1)
            embeds = self._tables.look_up(batch.histories, items)
            hidden = encode(
                embeds, positions, dropout=self._dropout(semantics.outer_dropout, "outer", i)
            ).squeeze(1)
            share = len(batch.targets) / self._count
            fit = self._tables.item_cross_entropy(hidden, items, batch.targets).mean() * share
            aligned = hidden.new_zeros(())
            if self._config.alignment:
                with torch.no_grad():
                    dropout = self._dropout(semantics.alignment_dropout, "teacher", i)
                    known = self._tables.look_up(batch.histories, self._teacher_items)
                    features = self._flat.encode(
                        self._teacher_parameters, known, positions, dropout=dropout
                    ).squeeze(1)
                aligned = F.mse_loss(hidden, features) * (share * self._config.alignment)
            yield fit, aligned

    def gradient(
        self, flat: FlatParameters, parameters: tuple[Tensor, ...], items: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Cross-entropy and alignment (), and the gradient of their sum with respect to the parameters."""
        leaves = [p.detach().requires_grad_() for p in parameters]
        table = leaves[1] if len(leaves) > 1 else items
        total = [torch.zeros_like(p) for p in parameters]
        fit, aligned = (torch.zeros((), dtype=torch.float64, device=items.device) for _ in range(2))

        def encode(embeds: Tensor, positions: Tensor, *, dropout: DropoutStream | None) -> Tensor:
            return flat.encode(leaves[0], embeds, positions, dropout=dropout)

        for part_fit, part_aligned in self.losses(encode, table):
            for sum_, gradient in zip(
                total, torch.autograd.grad(part_fit + part_aligned, leaves), strict=True
            ):
                sum_ += gradient
            fit += part_fit.detach()
            aligned += part_aligned.detach()
        return fit, aligned, tuple(total)
