"""What an outer step minimises: how a learner that was trained on the summary does on real examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from td3_fast.data import Batch, Examples, ExamplesOnDevice, cut_batch
from td3_fast.distill_config import DistillConfig
from td3_fast.learners import FlatParameters, Learner
from td3_fast.ops import (
    DropoutStream,
    derive_seed,
    encode_histories,
    has_next_item_gradient,
    next_item_gradient,
)
from td3_fast.parallel import WHOLE, Group, ItemTables
from td3_fast.unroll import beside

EXAMPLES_IN_A_CALL = 2**15  # at most, where a GPU looks the items up as it encodes


class TeacherFeatures:
    """What the pretrained learner makes of real examples, which the outputs of others are aligned with."""

    def __init__(self, teacher: Learner, flat: FlatParameters, *, tables: ItemTables = WHOLE) -> None:
        self._flat = flat
        self._parameters = flat.gather(teacher.state_dict())
        self._items = teacher.item_embeddings.detach()
        self._tables = tables

    @torch.no_grad()
    def __call__(self, batch: Batch, *, dropout: DropoutStream | None = None) -> Tensor:
        """(batch, d), after the last item of each history."""
        shape = self._flat.fused_shape(self._parameters)
        if shape is not None and self._tables is WHOLE and self._items.dtype == self._parameters.dtype:
            return encode_histories(
                self._parameters, self._items, batch.histories, batch.lengths, shape, dropout=dropout
            )
        known = self._tables.look_up(batch.histories, self._items)
        positions = (batch.lengths - 1).unsqueeze(1)
        return self._flat.encode(self._parameters, known, positions, dropout=dropout).squeeze(1)


class OuterObjective:
    """Cross-entropy of the next item plus alignment of features, on one batch of real examples.

    Of a group of processes each takes its share of the micro-batches: losses and gradients add up to those of all.

    learner: of the class that is judged, with a frozen table its own; features: of the pretrained learner, which may be
    of another class and a column wider or narrower, for a bias of items: the columns that both have are aligned.

    there: the same examples where the item table is, if they are to be cut there, with the same results up to rounding;
    not where dropout is drawn for them, whose masks depend on the width of micro-batches.
    """

    def __init__(
        self,
        config: DistillConfig,
        learner: Learner,
        flat: FlatParameters,
        examples: Examples,
        index: np.ndarray,
        *,
        features: TeacherFeatures,
        seed: int,
        micro_batch: int,
        tables: ItemTables = WHOLE,
        sharing: Group | None = None,
        there: ExamplesOnDevice | None = None,
    ) -> None:
        self._config = config
        self._tables = tables
        self._teacher_features = features
        self._count = len(index)
        sharing = sharing or Group()
        size = micro_batch
        theta, items = flat.gather(learner.state_dict()), learner.item_embeddings.detach()
        fused = (
            flat.fused_shape(theta) is not None
            and tables is WHOLE
            and config.engine == "native"
            and has_next_item_gradient(items, theta)
        )
        # no tensor of their embeddings is made then; smaller parts were asked for where memory is short
        if there is not None and fused and config.item_embedding == "frozen" and size >= config.micro_batch:
            size = max(size, EXAMPLES_IN_A_CALL)
        # masks are drawn by micro-batch, so where there are some, micro-batches stay as they are in one process
        if not config.semantics.masks_real_examples:
            size = min(size, -(-len(index) // sharing.size))
        rows = [slice(first, first + size) for first in range(0, len(index), size)]
        own = list(enumerate(rows))[sharing.rank :: sharing.size]
        if there is None:
            by_length = index[np.argsort(examples.lengths[index], kind="stable")]
            self.parts = [(i, cut_batch(examples, by_length[part], learner.max_len)) for i, part in own]
        else:
            order = there.shortest_first(beside(torch.from_numpy(index), items))
            whole = there.cut(order)
            self.parts = [(i, Batch(*(tensor[part] for tensor in whole))) for i, part in own]
        self._seed = seed

    def _dropout(self, switch: bool, *path: int | str) -> DropoutStream | None:
        return DropoutStream(derive_seed(self._seed, *path)) if switch else None

    def losses(self, encode: Callable[..., Tensor], items: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each micro-batch of this process its share of the cross-entropy and of the alignment."""
        for i, part in self.parts:
            batch = self._on(items.device, part)
            positions = (batch.lengths - 1).unsqueeze(1)
            embeds = self._tables.look_up(batch.histories, items)
            hidden = encode(embeds, positions, dropout=self._outer_dropout(i)).squeeze(1)
            share = len(batch.targets) / self._count
            fit = self._tables.item_cross_entropy(hidden, items, batch.targets).mean() * share
            aligned = hidden.new_zeros(())
            features = self._features(i, batch)
            if features is not None:
                both = min(hidden.shape[1], features.shape[1])
                aligned = F.mse_loss(hidden[:, :both], features[:, :both])
                aligned = aligned * (share * self._config.alignment)
            yield fit, aligned

    @staticmethod
    def _on(device: torch.device, part: Batch) -> Batch:
        return Batch(*(t.to(device, non_blocking=True) for t in part))

    def _outer_dropout(self, i: int) -> DropoutStream | None:
        return self._dropout(self._config.semantics.outer_dropout, "outer", i)

    def _features(self, i: int, batch: Batch) -> Tensor | None:
        """What the teacher makes of a micro-batch, if that is asked for: (batch, d)."""
        if not self._config.alignment:
            return None
        dropout = self._dropout(self._config.semantics.alignment_dropout, "teacher", i)
        return self._teacher_features(batch, dropout=dropout)

    def _gradients(
        self, flat: FlatParameters, parameters: tuple[Tensor, ...], items: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, ...]]]:
        """`losses`, with the gradient of their sum with respect to the parameters."""
        theta = parameters[0]
        trained = len(parameters) > 1
        table = parameters[1] if trained else items
        shape = flat.fused_shape(theta)
        if shape is not None and self._tables is WHOLE and has_next_item_gradient(table, theta):
            for i, cut in self.parts:
                part = self._on(table.device, cut)
                share = len(part.targets) / self._count
                features = self._features(i, part)
                if features is not None:
                    features = features[
                        :, : table.shape[1]
                    ].contiguous()  # a teacher's bias of items has no match here
                made = next_item_gradient(
                    theta,
                    table,
                    *part,
                    shape,
                    dropout=self._outer_dropout(i),
                    features=features,
                    alignment=self._config.alignment,
                    trained=trained,
                )
                gradients = (made.parameters,) if made.items is None else (made.parameters, made.items)
                yield made.loss * share, made.aligned * share, tuple(g * share for g in gradients)
            return
        leaves = [p.detach().requires_grad_() for p in parameters]

        def encode(embeds: Tensor, positions: Tensor, *, dropout: DropoutStream | None) -> Tensor:
            return flat.encode(leaves[0], embeds, positions, dropout=dropout)

        for fit, aligned in self.losses(encode, leaves[1] if trained else items):
            yield fit.detach(), aligned.detach(), torch.autograd.grad(fit + aligned, leaves)

    def gradient(
        self, flat: FlatParameters, parameters: tuple[Tensor, ...], items: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Cross-entropy and alignment (), and the gradient of their sum with respect to the parameters."""
        total = [torch.zeros_like(p) for p in parameters]
        fit, aligned = (torch.zeros((), dtype=torch.float64, device=items.device) for _ in range(2))
        for part_fit, part_aligned, gradients in self._gradients(flat, parameters, items):
            for sum_, gradient in zip(total, gradients, strict=True):
                sum_ += gradient
            fit += part_fit
            aligned += part_aligned
        return fit, aligned, tuple(total)
