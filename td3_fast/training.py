"""Training a learner on real examples with early stopping, and ranking with a trained one."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from td3_fast.checks import check_choices, check_not_negative, check_positive, check_sizes
from td3_fast.data import Batch, Examples, Split, cut_batch, history_csr, sample_negatives, shuffled
from td3_fast.ensemble import Ensemble
from td3_fast.heap import HeapTrimmer
from td3_fast.learners import FlatParameters, Learner, all_hyperparameters, build_learner
from td3_fast.metrics import metrics_from_ranks
from td3_fast.ops import DropoutStream, derive_seed, full_precision
from td3_fast.parallel import WHOLE, ItemTables
from td3_fast.progress import Progress, silent
from td3_fast.sampled_softmax import Negatives, NegativeSampler, Proposal, sampled_cross_entropy
from td3_fast.unroll import AdamConfig, AdamState, adam_step_, initial_state, lazy_adam_step_

Protocol = Literal["full", "uni100"]
PROTOCOLS: tuple[Protocol, ...] = ("full", "uni100")
NUM_NEGATIVES = 100
RANKED_AT_ONCE = 4096  # examples
SELECTION_METRIC = "MRR@10"


def check_examples(split: Split) -> None:
    """ValueError where there is nothing to train on, or nothing to rank."""
    _check_training(split.train)
    _check_ranked(split.validation)


def _check_training(train: Examples) -> None:
    if len(train) == 0:
        raise ValueError("there is no training example: every training sequence has fewer than 2 items")


def _check_ranked(examples: Examples) -> None:
    if len(examples) == 0:
        raise ValueError(
            "there is no example to rank: no user has 3 or more interactions, "
            "so nothing was left out for validation and test"
        )


class Ranker:
    """Ranks the targets of fixed examples, under both protocols, for one learner after another.

    The 100 negatives of `uni100` are drawn once from `seed`. Memory: examples × 101 ids and the batch's scores.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        seed: int,
        protocols: tuple[Protocol, ...] = PROTOCOLS,
        tables: ItemTables = WHOLE,
    ) -> None:
        _check_ranked(examples)
        self.examples = examples
        self.protocols = protocols
        self._tables = tables
        self._seed = seed
        self._targets = torch.from_numpy(examples.targets)
        self._candidates = self._draw(seed) if "uni100" in protocols else None
        self._history = history_csr(examples) if "full" in protocols else None

    def _draw(self, seed: int) -> Tensor:
        negatives = sample_negatives(self.examples, NUM_NEGATIVES, seed=derive_seed(seed, "negatives"))
        return torch.from_numpy(np.ascontiguousarray(negatives)).long()

    def redraw_negatives(self, draw: int) -> None:
        """Replace the negatives, as the authors' program does at each evaluation."""
        self._candidates = self._draw(derive_seed(self._seed, "redraw", draw))

    @torch.no_grad()
    @full_precision()
    def ranks(
        self,
        learner: Learner,
        protocol: Protocol,
        *,
        batch_size: int = RANKED_AT_ONCE,
        dropout_seed: int | None = None,
    ) -> Tensor:
        """The rank of each example's target: (examples,) int64, 1 the best; ties count against the model."""
        items = learner.item_embeddings
        ranks = torch.empty(len(self.examples), dtype=torch.int64, device="cpu")
        for rows, hidden in self._encoded(learner, batch_size, dropout_seed):
            ranks[rows] = self._rank(hidden, items, rows, protocol).cpu()
        return ranks

    @torch.no_grad()
    @full_precision()
    def cross_entropy(
        self, learner: Learner, *, batch_size: int = RANKED_AT_ONCE, dropout_seed: int | None = None
    ) -> float:
        """The mean cross-entropy of the examples' targets among all items, in nats.

        It moves far less from learner to learner than a metric of ranks does, where examples are few.
        """
        items = learner.item_embeddings
        total = 0.0
        for rows, hidden in self._encoded(learner, batch_size, dropout_seed):
            targets = self._targets[rows].to(items.device)
            total += float(self._tables.item_cross_entropy(hidden, items, targets).sum())
        return total / len(self.examples)

    def _encoded(
        self, learner: Learner, batch_size: int, dropout_seed: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(rows (b,), what the learner makes of their histories (b, d)) of all examples, shortest histories first."""
        items = learner.item_embeddings
        by_length = np.argsort(self.examples.lengths, kind="stable")
        for first in range(0, len(by_length), batch_size):
            index = by_length[first : first + batch_size]
            histories, lengths, _ = (
                t.to(items.device) for t in cut_batch(self.examples, index, learner.max_len)
            )
            dropout = None if dropout_seed is None else DropoutStream(derive_seed(dropout_seed, first))
            embeds = self._tables.look_up(histories, items)
            hidden = learner.encode(embeds, (lengths - 1).unsqueeze(1), dropout=dropout).squeeze(1)
            yield torch.from_numpy(index), hidden

    def _rank(self, hidden: Tensor, items: Tensor, rows: Tensor, protocol: Protocol) -> Tensor:
        targets = self._targets[rows].to(items.device)
        if protocol == "uni100":
            assert self._candidates is not None
            candidates = self._candidates[rows].to(items.device)
            return self._tables.target_rank(hidden, items, targets, candidates=candidates)
        assert self._history is not None
        offsets, seen = select_rows(self._history, rows)
        excluded = (offsets.to(items.device), seen.to(items.device))
        return self._tables.target_rank(hidden, items, targets, excluded=excluded)

    def score_items(self, scores: Tensor) -> dict[Protocol, dict[str, float]]:
        """Metrics of one score per item (n,), the same for every example."""
        rows = torch.arange(len(self.examples), device="cpu")
        same = scores.new_ones(len(rows), 1)
        return {p: metrics_from_ranks(self._rank(same, scores.unsqueeze(1), rows, p)) for p in self.protocols}

    def metrics(
        self, learner: Learner, *, batch_size: int = RANKED_AT_ONCE, dropout_seed: int | None = None
    ) -> dict[Protocol, dict[str, float]]:
        """HR, NDCG and MRR at 5, 10 and 20 under each protocol."""
        return {
            protocol: metrics_from_ranks(
                self.ranks(learner, protocol, batch_size=batch_size, dropout_seed=dropout_seed)
            )
            for protocol in self.protocols
        }


def select_rows(csr: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """The asked rows of (offsets (r + 1,), items (nnz,)), in the same form."""
    offsets, items = csr
    counts = (offsets[1:] - offsets[:-1])[rows]
    new_offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    shift = torch.repeat_interleave(offsets[rows] - new_offsets[:-1], counts)
    return new_offsets, items[torch.arange(len(shift), device=shift.device) + shift]


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Training on real examples: Adam on the loss of the learner, stopped by validation MRR@10.

    With very many items the loss can be estimated from `num_sampled` of them a batch, and the optimiser can leave alone
    the rows of the item table that a batch did not meet; neither is the paper's method.
    """

    learning_rate: float = 1e-3
    batch_size: int = 2048
    max_epochs: int = 200
    patience: int = 10
    selection: Protocol = "uni100"
    weight_decay: float = 0.0
    loss: Literal["full", "sampled"] = "full"
    num_sampled: int = 2048  # items a batch, where the loss is sampled
    proposal: Proposal = "unigram"  # what they are drawn from, as `NegativeSampler` says
    optimiser: Literal["adam", "lazy-adam"] = "adam"

    def __post_init__(self) -> None:
        check_choices(self)
        check_sizes(self, "batch_size", "max_epochs", "patience", "num_sampled")
        check_positive(self, "learning_rate")
        check_not_negative(self, "weight_decay")
        if self.optimiser == "lazy-adam" and self.loss == "full":
            raise ValueError(
                'FitConfig.optimiser="lazy-adam" needs loss="sampled": the full softmax has a gradient for every item'
            )


@dataclass(kw_only=True)
class FitState:
    """Where training stands after `epoch` epochs and `batch` batches; enough to go on with the same bits."""

    optimiser: AdamState
    best: tuple[Tensor, ...]
    epoch: int = 0
    batch: int = 0  # taken of the epoch in progress
    loss_sum: float = 0.0  # over the examples of those batches
    best_epoch: int = 0
    best_score: float = float("-inf")
    history: list[dict[str, float]] = field(default_factory=list)

    def to(self, device: torch.device) -> FitState:
        """The same with every tensor on a device."""
        best = tuple(t.to(device) for t in self.best)
        return replace(self, optimiser=self.optimiser.to(device), best=best)


class FitStep:
    """One optimiser step on a batch of real examples, by the loss and the optimiser of a `FitConfig`.

    ensemble: what else its targets come from; not with a sampled loss.
    """

    def __init__(
        self, learner: Learner, train: Examples, config: FitConfig, *, ensemble: Ensemble | None = None
    ) -> None:
        if ensemble is not None and config.loss == "sampled":
            raise ValueError('an ensemble teaches all items: choose FitConfig.loss="full", or leave it out')
        self._ensemble = ensemble
        self._flat = FlatParameters(learner)
        self._adam = AdamConfig(learning_rate=config.learning_rate, weight_decay=config.weight_decay)
        self._lazy = config.optimiser == "lazy-adam"
        self._sampler: NegativeSampler | None = None
        if config.loss == "sampled":
            counts = torch.from_numpy(train.item_counts)
            self._sampler = NegativeSampler(counts, num_sampled=config.num_sampled, proposal=config.proposal)

    def __call__(
        self, state: AdamState, batch: Batch, *, dropout: DropoutStream, seed: int
    ) -> tuple[AdamState, float]:
        """The state after the step, in the tensors of `state`, and the loss before it; `seed` draws negatives."""
        if self._sampler is not None:
            return self._with_sampled_loss(state, batch, dropout, self._sampler, seed)
        theta, items = state.parameters
        loss, gradients = self._flat.loss_gradient(
            theta,
            items,
            batch.histories,
            batch.lengths,
            batch.targets,
            dropout=dropout,
            cross_entropy=None if self._ensemble is None else self._ensemble.loss_of(batch),
        )
        return adam_step_(state, gradients, self._adam), float(loss)

    def _with_sampled_loss(
        self, state: AdamState, batch: Batch, dropout: DropoutStream, sampler: NegativeSampler, seed: int
    ) -> tuple[AdamState, float]:
        theta, items = state.parameters
        negatives = sampler.draw(seed=seed)
        # the loss as a function of the rows that the batch meets, numbered anew; the padding item stays item 0
        met = (
            batch.histories.new_zeros(1),
            batch.histories.flatten(),
            batch.targets,
            negatives.items.to(items.device),
        )
        rows, numbers = torch.unique(torch.cat(met), return_inverse=True)
        _, histories, targets, drawn = numbers.split([len(part) for part in met])
        theta, table = theta.detach().requires_grad_(), items[rows].requires_grad_()
        loss = self._flat.loss(
            theta,
            table,
            histories.view_as(batch.histories),
            batch.lengths,
            targets,
            dropout=dropout,
            cross_entropy=functools.partial(
                sampled_cross_entropy,
                negatives=Negatives(drawn, negatives.log_expected.to(items.device, items.dtype)),
            ),
        )
        to_theta, to_rows = torch.autograd.grad(loss, (theta, table))
        if self._lazy:
            state = lazy_adam_step_(state, (to_theta, to_rows), rows, self._adam)
        else:
            to_items = torch.zeros_like(items).index_copy_(0, rows, to_rows)
            state = adam_step_(state, (to_theta, to_items), self._adam)
        return state, float(loss.detach())


@full_precision()
def fit_examples(
    learner: Learner,
    train: Examples,
    validation: Ranker,
    config: FitConfig,
    *,
    seed: int,
    state: FitState | None = None,
    ensemble: Ensemble | None = None,
    on_step: Callable[[FitState], None] | None = None,
    progress: Progress = silent,
) -> FitState:
    """Train `learner` in place until validation stops improving, and leave the best epoch's parameters in it.

    ensemble: trained learners whose predictions are part of its targets. `state` continues an interrupted run;
    `on_step` sees the state after every batch, an epoch's last one after its validation.
    """
    _check_training(train)
    flat = FlatParameters(learner)
    if state is None:
        start = (flat.gather(learner.state_dict()), learner.item_embeddings.detach())
        state = FitState(optimiser=initial_state(start), best=tuple(t.clone() for t in start))
    take_step = FitStep(learner, train, config, ensemble=ensemble)
    num_batches = -(-len(train) // config.batch_size)
    trim = HeapTrimmer()
    while state.epoch < config.max_epochs and state.epoch - state.best_epoch < config.patience:
        order = shuffled(len(train), seed=derive_seed(seed, "order", state.epoch))
        for batch_index in range(state.batch, num_batches):
            index = order[batch_index * config.batch_size : (batch_index + 1) * config.batch_size]
            dropout = DropoutStream(derive_seed(seed, "dropout", state.epoch, batch_index))
            device = state.optimiser.parameters[0].device
            batch = Batch(*(t.to(device) for t in cut_batch(train, index, learner.max_len)))
            negatives_seed = derive_seed(seed, "negatives", state.epoch, batch_index)
            state.optimiser, loss = take_step(state.optimiser, batch, dropout=dropout, seed=negatives_seed)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of batch {batch_index + 1} of epoch {state.epoch + 1} is not finite: lower the learning "
                    f"rate ({config.learning_rate:g})"
                )
            state.loss_sum += loss * len(index)
            state.batch = batch_index + 1
            trim()
            if state.batch < num_batches:
                mean = state.loss_sum / (state.batch * config.batch_size)
                done = state.epoch * num_batches + state.batch
                progress("train", done, config.max_epochs * num_batches, {"loss": mean})
                if on_step is not None:
                    on_step(state)
        flat.write(learner, *state.optimiser.parameters)
        metrics = validation.metrics(learner)[config.selection]
        state.epoch += 1
        state.history.append({"epoch": state.epoch, "loss": state.loss_sum / len(train), **metrics})
        state.batch, state.loss_sum = 0, 0.0
        if metrics[SELECTION_METRIC] > state.best_score:
            state.best_score, state.best_epoch = metrics[SELECTION_METRIC], state.epoch
            state.best = tuple(p.clone() for p in state.optimiser.parameters)
        progress("train", state.epoch * num_batches, config.max_epochs * num_batches, state.history[-1])
        if on_step is not None:
            on_step(state)
    flat.write(learner, *state.best)
    return state


@dataclass(kw_only=True)
class Pretrained:
    """The best checkpoint and the pool, as state dicts of the learner `learner_name`."""

    learner_name: str
    learner_config: dict[str, Any]
    best: dict[str, Tensor]
    pool: list[dict[str, Tensor]]
    history: list[dict[str, float]]
    best_epoch: int

    def __post_init__(self) -> None:
        # defaults may become others, and a file has to say what its learner is
        self.learner_config = all_hyperparameters(self.learner_name, self.learner_config)

    @property
    def dtype(self) -> torch.dtype:
        """That of all but the item table, which may be kept in fewer digits."""
        return next(value.dtype for name, value in self.best.items() if name != "item_embeddings")

    def learner(self, *, share_items: bool = False) -> Learner:
        """The best checkpoint as a learner.

        share_items: its item table is that of `best` instead of a copy, for one that is not going to be trained.
        """
        rest = {name: value for name, value in self.best.items() if name != "item_embeddings"}
        learner = build_learner(self.learner_name, self.learner_config, seed=0)
        example = next(iter(rest.values()))
        learner.to(example.device, example.dtype)
        table = self.best["item_embeddings"].detach()
        if table.shape != learner.item_embeddings.shape:
            raise ValueError(
                f"the item table should have the shape {tuple(learner.item_embeddings.shape)}, got {tuple(table.shape)}"
            )
        learner.item_embeddings = nn.Parameter(table if share_items else table.clone())
        missing, unexpected = learner.load_state_dict(rest, strict=False)
        if missing != ["item_embeddings"] or unexpected:
            wrong = [name for name in (*missing, *unexpected) if name != "item_embeddings"]
            raise ValueError(f"the best checkpoint has not the parameters of a {self.learner_name}: {wrong}")
        return learner

    def to(self, device: torch.device) -> Pretrained:
        """The same with every tensor on a device; a table that several share is still shared."""
        moved: dict[int, Tensor] = {}

        def to(state: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: moved.setdefault(id(t), t.to(device)) for name, t in state.items()}

        best = to(self.best)
        return replace(self, best=best, pool=[best if e is self.best else to(e) for e in self.pool])

    def for_frozen_items(self, dtype: torch.dtype) -> Pretrained:
        """The same with the item table in `dtype` and none in the pool, for uses that train no table."""
        pool = [{name: t for name, t in entry.items() if name != "item_embeddings"} for entry in self.pool]
        best = {**self.best, "item_embeddings": self.best["item_embeddings"].to(dtype)}
        return replace(self, best=best, pool=pool)

    def cut(self, rows: slice) -> Pretrained:
        """The same with copies of only these rows of the item tables, as if there were no other items."""

        def cut(state: dict[str, Tensor]) -> dict[str, Tensor]:
            items = state.get("item_embeddings")
            return state if items is None else {**state, "item_embeddings": items[rows].clone()}

        best = cut(self.best)
        return replace(
            self,
            learner_config={**self.learner_config, "num_items": len(best["item_embeddings"])},
            best=best,
            # a pool without checkpoints of its own is the best one, which then is kept once
            pool=[best if entry is self.best else cut(entry) for entry in self.pool],
        )


def fresh_like(
    learner: Learner, *, seed: int, share_items: bool = False, draw_positions: bool = False
) -> Learner:
    """A learner with the item and position embeddings of `learner` and an encoder drawn anew from `seed`.

    share_items: its item table is that of `learner` instead of a copy, for one whose table is not going to be trained.
    draw_positions: position embeddings are drawn as well, for those of `learner` are nobody's.
    """
    table = learner.item_embeddings
    if draw_positions:
        fresh = build_learner(type(learner).__name__, learner.hyperparameters(), seed=seed)
        fresh.to(table.device, next(p.dtype for n, p in learner.named_parameters() if n != "item_embeddings"))
        fresh.item_embeddings = table if share_items else nn.Parameter(table.detach().clone())
        return fresh
    fresh = copy.deepcopy(learner, {id(table): table} if share_items else {})
    fresh.reset_encoder(seed=seed)
    return fresh
