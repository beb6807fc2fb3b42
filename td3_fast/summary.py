"""A summary of synthetic users: the factors of the tensor that they stand for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from td3_fast.artefact import artefact_kind, check_keys
from td3_fast.distilled_data import (
    DistilledDataConfig,
    LearnerTrainConfig,
    read_distilled_data,
    write_distilled_data,
)
from td3_fast.farzi import FarziSummary
from td3_fast.ops import seeded_generator, tucker_queries
from td3_fast.ops.tucker import Normalize
from td3_fast.summary_base import Summary, check_floating, check_normalize, check_positions
from td3_fast.summary_file import Preprocessing, SummaryError, SummaryMetadata, TrainingRecipe

__all__ = [
    "FarziSummary",
    "Preprocessing",
    "Summary",
    "SummaryError",
    "SummaryMetadata",
    "TrainingRecipe",
    "TuckerSummary",
    "load_summary",
]

FACTOR_SD = 0.02


class TuckerSummary(Summary):
    """S = normalized(core x_1 user_factors x_2 position_factors x_3 item_factors), (users, positions, n).

    S holds a probability over items at each position of each synthetic user; it is never formed unless asked
    for. `core`, `user_factors` and `position_factors` are parameters; `item_factors`, the item table of the
    pretrained learner, is a buffer and never learned, nor copied: what is written into it elsewhere changes the
    summary, of which `fit` takes care. Source: TD3 (WWW '25).

    It also answers to the interface of `DistilledData` in the paper's released program: `get_batch`,
    `data_dict`, `load_data_dict`, `save_pretrained`, `from_pretrained`, `config`, `train_config`, `item_num`
    and `cuda`.

    Args:
        core: (d1, d2, d3).
        user_factors: (users, d1).
        position_factors: (positions, d2).
        item_factors: (n, d3), row 0 the padding item.
        position_embeddings: (positions, at most d3), the pretrained learner's, for fresh learners of its kind to
            start from; narrower than the item table where that has a column for the bias of items.
        normalize: "softmax" over items, or "none", the bare product.
        metadata: what the summary stands for; needed for `save`.

    Raises:
        ValueError: shapes or dtypes do not agree, or `normalize` is unknown.
    """

    kind = "td3_fast.TuckerSummary"
    factor_names = ("core", "user_factors", "position_factors")

    def __init__(
        self,
        core: Tensor,
        user_factors: Tensor,
        position_factors: Tensor,
        item_factors: Tensor,
        *,
        position_embeddings: Tensor | None = None,
        normalize: Normalize = "softmax",
        metadata: SummaryMetadata | None = None,
    ) -> None:
        super().__init__()
        check_normalize(normalize)
        _check_factors(core, user_factors, position_factors, item_factors, position_embeddings)
        self.core = nn.Parameter(core)
        self.user_factors = nn.Parameter(user_factors)
        self.position_factors = nn.Parameter(position_factors)
        self._carry(item_factors, position_embeddings, normalize, metadata)
        self.fix_order = True
        self._train_config: LearnerTrainConfig | None = None

    @classmethod
    def initialise(
        cls,
        *,
        users: int,
        positions: int,
        user_rank: int,
        position_rank: int,
        item_factors: Tensor,  # (n, d3)
        seed: int,
        normalize: Normalize = "softmax",
    ) -> TuckerSummary:
        """A summary to start from: user and position factors ~ N(0, 0.02^2), the core Kaiming-normal.

        The core's standard deviation is sqrt(2 / (d2 d3)). Drawn on the CPU in float64, then cast and
        moved to where `item_factors` are: the same seed gives the same summary everywhere.
        """
        sizes = {
            "users": users,
            "positions": positions,
            "user_rank": user_rank,
            "position_rank": position_rank,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        generator = seeded_generator(seed, "summary")

        def normal(*shape: int, sd: float) -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * sd
            # an item table may be kept in 16 bits, what is learned is not
            return drawn.to(item_factors.device, torch.promote_types(item_factors.dtype, torch.float32))

        rank = item_factors.shape[-1]
        return cls(
            normal(user_rank, position_rank, rank, sd=(2 / (position_rank * rank)) ** 0.5),
            normal(users, user_rank, sd=FACTOR_SD),
            normal(positions, position_rank, sd=FACTOR_SD),
            item_factors,
            normalize=normalize,
        )

    @property
    def num_users(self) -> int:
        return self.user_factors.shape[0]

    @property
    def num_positions(self) -> int:
        return self.position_factors.shape[0]

    def queries_and_keys(
        self, factors: tuple[Tensor, ...] | None = None, users: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """core x_1 user_factors x_2 position_factors, (u, positions, d3), and the item factors (n, d3)."""
        core, user_factors, position_factors = self.factors if factors is None else factors
        chosen = user_factors if users is None else user_factors[users]
        return tucker_queries(core, chosen, position_factors), self.item_factors

    @property
    def config(self) -> DistilledDataConfig:
        """The summary's sizes by the released program's names."""
        d1, d2, d3 = self.core.shape
        return DistilledDataConfig(
            seq_num=self.num_users,
            seq_len=self.num_positions,
            seq_dim1=d1,
            seq_dim2=d2,
            seq_dim3=d3,
            fix_order=self.fix_order,
        )

    @property
    def train_config(self) -> LearnerTrainConfig:
        """Steps and batch size by the released program's names; from the recipe in `metadata` unless set."""
        if self._train_config is not None:
            return self._train_config
        if self.metadata is not None:
            recipe = self.metadata.training
            return LearnerTrainConfig(train_step=recipe.steps, batch_size=recipe.batch_size)
        return LearnerTrainConfig(batch_size=self.num_users)

    @train_config.setter
    def train_config(self, value: LearnerTrainConfig) -> None:
        self._train_config = value

    @property
    def item_num(self) -> int:
        """`num_items` by the released program's name."""
        return self.num_items

    def with_factors(self, factors: tuple[Tensor, ...]) -> TuckerSummary:
        other = super().with_factors(factors)
        other.fix_order, other._train_config = self.fix_order, self._train_config
        return other

    def get_batch_indices(self, step: int) -> Tensor:
        """The synthetic users of a training step, (b,) int64.

        They go round in order; with `fix_order` off they are a random draw that depends on `step` only.
        """
        size = min(self.train_config.batch_size, self.num_users)
        if self.fix_order:
            return torch.arange(step * size, (step + 1) * size, device="cpu") % self.num_users
        generator = seeded_generator(0, "batch", step)
        return torch.randperm(self.num_users, generator=generator, device="cpu")[:size]

    def get_batch(self, step: int) -> dict[str, Tensor]:
        """{"inputs_embeds": `probabilities` of the step's users, (b, positions, n)}."""
        return {"inputs_embeds": self.probabilities(self.get_batch_indices(step).to(self.core.device))}

    def data_dict(self, detach: bool = False) -> dict[str, Tensor]:
        """The factors by the paper's letters: G, U, T are the live parameters, V the item factors.

        With `detach` they are detached and on the CPU.
        """
        tensors = {
            "G": self.core,
            "U": self.user_factors,
            "V": self.item_factors,
            "T": self.position_factors,
        }
        return {name: value.detach().cpu() for name, value in tensors.items()} if detach else tensors

    @torch.no_grad()
    def load_data_dict(self, data_dict: Mapping[str, Tensor]) -> None:
        """Copy factors by the paper's letters into this summary, V included; others that have its V keep it.

        Raises:
            ValueError: the keys are not G, U, V, T, or a shape differs.
        """
        own = self.data_dict()
        check_keys(dict(data_dict), list(own), "data_dict")
        for name, value in own.items():
            if value.shape != data_dict[name].shape:
                raise ValueError(
                    f"{name} has the shape {tuple(data_dict[name].shape)}, not {tuple(value.shape)}"
                )
        self.item_factors = self.item_factors.clone()
        for name, value in self.data_dict().items():
            value.copy_(data_dict[name])

    def save_pretrained(self, save_path: str | os.PathLike[str]) -> None:
        """Write the released program's folder: `config.json` and `data_dict` with the keys G, U, V, T.

        That program takes batches in order only where the batch size divides the users, and refuses a folder
        that asks for more; such a summary is written with `fix_order` false.

        Raises:
            ValueError: `normalize` is "none", which that program does not have.
        """
        if self.normalize != "softmax":
            raise ValueError(
                f"{save_path} is not written: the format knows normalize='softmax' only; use save()"
            )
        config = asdict(self.config)
        config["fix_order"] = self.fix_order and self.num_users % self.train_config.batch_size == 0
        write_distilled_data(
            save_path, self.data_dict(detach=True), DistilledDataConfig(**config), self.train_config
        )

    @classmethod
    def from_pretrained(cls, save_path: str | os.PathLike[str], item_emb: Any = None) -> TuckerSummary:
        """The summary in a folder of the released program.

        item_emb: for callers of that program, who hand over the item table; the folder's V counts, as there.

        Raises:
            SummaryError: the folder is incomplete, damaged or holds something else; no code in it is run.
        """
        try:
            tensors, config, train_config = read_distilled_data(save_path)
            summary = cls(tensors["G"], tensors["U"], tensors["T"], tensors["V"])
        except ValueError as error:
            raise SummaryError(str(error)) from error
        summary.fix_order = config.fix_order
        summary.train_config = train_config
        return summary

    def extra_repr(self) -> str:
        core = tuple(self.core.shape)
        return f"{self.size}, core={core}, num_items={self.num_items}, normalize={self.normalize!r}"


def load_summary(
    path: str | os.PathLike[str], *, item_factors: Tensor | str | os.PathLike[str] | None = None
) -> Summary:
    """The summary in a file, of whichever kind; arguments and errors as in `Summary.load`."""
    try:
        kind = artefact_kind(path)
    except ValueError as error:
        raise SummaryError(str(error)) from error
    chosen: type[Summary] = FarziSummary if kind == FarziSummary.kind else TuckerSummary
    return chosen.load(path, item_factors=item_factors)


def _check_factors(
    core: Tensor,
    user_factors: Tensor,
    position_factors: Tensor,
    item_factors: Tensor,
    position_embeddings: Tensor | None,
) -> None:
    if core.ndim != 3:
        raise ValueError(f"core must have the shape (d1, d2, d3), got {tuple(core.shape)}")
    d1, d2, d3 = core.shape
    matrices = {
        "user_factors": (user_factors, d1),
        "position_factors": (position_factors, d2),
        "item_factors": (item_factors, d3),
    }
    for name, (value, rank) in matrices.items():
        if value.ndim != 2 or value.shape[1] != rank:
            raise ValueError(
                f"{name} must have the shape (rows, {rank}) beside a core of {tuple(core.shape)}, "
                f"got {tuple(value.shape)}"
            )
    floating = {"core": core, **{name: value for name, (value, _) in matrices.items()}}
    check_positions(position_embeddings, d3, f"a core of {tuple(core.shape)}")
    if position_embeddings is not None:
        floating["position_embeddings"] = position_embeddings
    check_floating(floating)
    if not core.dtype == user_factors.dtype == position_factors.dtype:
        raise ValueError(
            f"core, user_factors and position_factors must have one dtype, got {core.dtype}, "
            f"{user_factors.dtype} and {position_factors.dtype}"
        )
