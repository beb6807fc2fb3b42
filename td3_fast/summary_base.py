"""What every kind of summary is: a distribution over items at each position of each synthetic user."""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from td3_fast.ops import full_precision, normalized_embedding, seeded_generator
from td3_fast.ops.tucker import Normalize
from td3_fast.progress import Progress, silent
from td3_fast.summary_file import SummaryError, SummaryMetadata, read_summary, write_summary

if TYPE_CHECKING:
    from td3_fast.learners import Learner

Self = TypeVar("Self", bound="Summary")

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SCORES_LIMIT = 64 * 2**20  # bytes of scores over items that are held at once


class Summary(nn.Module):
    """S = normalized(queries keysᵀ), (users, positions, n), never formed unless asked for.

    A kind of summary says how queries (users, positions, r) and keys (n, r) come from the factors that are learned,
    which are parameters; engines know no more of it. All kinds carry `item_factors` (n, d3), the item table of the
    pretrained learner that learners start from, and perhaps its `position_embeddings`; both are buffers, which are not
    copied: several summaries and a learner may have one table.
    """

    kind: ClassVar[str]  # in the header of files
    factor_names: ClassVar[tuple[str, ...]]  # the parameters, in the order of `factors`

    item_factors: Tensor
    position_embeddings: Tensor | None
    normalize: Normalize
    metadata: SummaryMetadata | None

    def _carry(
        self,
        item_factors: Tensor,
        position_embeddings: Tensor | None,
        normalize: Normalize,
        metadata: SummaryMetadata | None,
    ) -> None:
        self.register_buffer("item_factors", _not_learned(item_factors))
        self.register_buffer("position_embeddings", _not_learned(position_embeddings))
        self.normalize = normalize
        self.metadata = metadata

    @property
    @abstractmethod
    def num_users(self) -> int:
        """Synthetic users."""

    @property
    @abstractmethod
    def num_positions(self) -> int:
        """Positions of each."""

    @abstractmethod
    def queries_and_keys(
        self, factors: tuple[Tensor, ...] | None = None, users: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(u, positions, r) of the users at (u,) indices, all by default, and (n, r); differentiable in `factors`.

        factors: in place of the summary's own, of the same shapes.
        """

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """What is learned, in the order of `factor_names`."""
        return tuple(getattr(self, name) for name in self.factor_names)

    @property
    def num_items(self) -> int:
        """Items, the padding item 0 included."""
        return self.item_factors.shape[0]

    @property
    def size(self) -> str:
        """Users x positions, as in "50x50"."""
        return f"{self.num_users}x{self.num_positions}"

    def with_factors(self: Self, factors: tuple[Tensor, ...]) -> Self:
        """The same kind of summary with other factors and without metadata; tables are shared, factors copied."""
        copies = {n: f.detach().clone() for n, f in zip(self.factor_names, factors, strict=True)}
        return type(self)(
            **copies,
            item_factors=self.item_factors,
            position_embeddings=self.position_embeddings,
            normalize=self.normalize,
        )

    def queries(self, users: Tensor | None = None) -> Tensor:
        """(u, positions, r), of the users at (u,) indices, all by default."""
        return self.queries_and_keys(users=users)[0]

    @property
    def keys(self) -> Tensor:
        """(n, r), what queries are compared with, one row per item."""
        return self.queries_and_keys()[1]

    def forward(self, users: Tensor | None = None, item_embeddings: Tensor | None = None) -> Tensor:
        """Soft embeddings S @ item_embeddings, (u, positions, d), without forming S.

        users: (u,) int64 indices, all users by default; item_embeddings: (n, d), `item_factors` by default. Queries and
        keys are converted to its dtype where theirs is another one, queries to no less than float32.
        """
        values = self.item_factors if item_embeddings is None else item_embeddings
        queries, keys = self.queries_and_keys(users=users)
        queries = queries.to(torch.promote_types(values.dtype, torch.float32))
        return normalized_embedding(queries, keys.to(values.dtype), values, normalize=self.normalize)

    @full_precision()
    def probabilities(self, users: Tensor | None = None) -> Tensor:
        """S itself, (u, positions, n), formed in full; under `normalize="none"` the bare product."""
        queries, keys = self.queries_and_keys(users=users)
        scores = queries @ keys.T.to(queries.dtype)
        return scores.softmax(-1) if self.normalize == "softmax" else scores

    @torch.no_grad()
    @full_precision()
    def hard_sequences(
        self,
        *,
        draws: int | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        progress: Progress = silent,
    ) -> Tensor:  # (users * draws, positions) int64
        """Items in place of distributions over them, the padding item left out.

        Scores over items are held for a few positions at a time, in 64 MiB, or one position's where those take more;
        draws need half as much again.

        Args:
            draws: sequences that are drawn for each synthetic user, one after the other, item by item with
                probability proportional to S^(1 / temperature). None: one sequence a user, of the most probable
                item at each position.
            temperature: of the draws; below 1 they keep closer to the most probable items.
            seed: of the draws; the same seed gives the same sequences.
            progress: told of the positions that are done, as the stage "export".

        Raises:
            ValueError: `draws` or `temperature` is out of range, draws are asked for of a bare product
                (`normalize="none"`), or there is no item but padding.
        """
        if draws is not None and draws < 1:
            raise ValueError(f"draws must be at least 1, or None for the most probable items; got {draws}")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be positive, got {temperature}")
        if draws is not None and self.normalize != "softmax":
            raise ValueError('a summary with normalize="none" holds no probabilities to draw with')
        if self.num_items < 2:
            raise ValueError("there is no item but the padding item")
        queries, keys = self.queries_and_keys()
        rows = queries.flatten(0, 1)
        count = draws or 1
        generator = seeded_generator(seed, "hard")
        at = torch.rand(len(rows), count, generator=generator, dtype=torch.float64, device="cpu")
        at = at.to(rows.device)
        chosen = torch.empty(len(rows), count, dtype=torch.int64, device=rows.device)
        block = max(1, SCORES_LIMIT // (8 * self.num_items))
        for first in range(0, len(rows), block):
            progress("export", first, len(rows), {})
            part = slice(first, first + block)
            scores = rows[part] @ keys[1:].T.to(rows.dtype)
            if draws is None:
                chosen[part] = scores.argmax(-1, keepdim=True) + 1
                continue
            mass = scores.double()
            # in place, and not divided by its sum: the draws are scaled instead
            mass.sub_(mass.amax(-1, keepdim=True)).div_(temperature).exp_().cumsum_(-1)
            picked = torch.searchsorted(mass, at[part] * mass[:, -1:], right=True)
            chosen[part] = picked.clamp_(max=self.num_items - 2) + 1
        progress("export", len(rows), len(rows), {})
        by_user = chosen.view(self.num_users, self.num_positions, count).transpose(1, 2)
        return by_user.reshape(self.num_users * count, self.num_positions)

    def fit(self, learner: Learner, **options: Any) -> list[float]:
        """Train `learner` in place on this summary and return the loss of each step.

        Options are those of `td3_fast.unroll.fit_on_summary`; the recipe in `metadata` gives those left out.
        """
        from td3_fast.unroll import fit_on_summary

        recipe = {} if self.metadata is None else self.metadata.training.fit_options()
        return fit_on_summary(learner, self, **{**recipe, **options})

    def save(
        self, path: str | os.PathLike[str], *, item_factors: Literal["inside", "reference"] = "inside"
    ) -> None:
        """Write the summary and its metadata as one safetensors file, atomically.

        With `item_factors="reference"` the item table goes into a file of its own in the same folder, named
        after its contents so that summaries of one learner share it; this file holds its name and SHA-256.

        Raises:
            SummaryError: there is no metadata, or what would be written could not be read again.
        """
        if self.metadata is None:
            raise SummaryError(
                f"{path} is not written, the summary has no metadata: set `summary.metadata` first"
            )
        write_summary(
            path,
            self.state_dict(),
            self.metadata,
            kind=self.kind,
            normalize=self.normalize,
            item_factors=item_factors,
        )

    @classmethod
    def load(
        cls: type[Self],
        path: str | os.PathLike[str],
        *,
        item_factors: Tensor | str | os.PathLike[str] | None = None,
    ) -> Self:
        """The summary that `save` wrote, on the CPU. No code in the file is ever run.

        item_factors: for a summary that keeps its item table by reference, the table (n, d3) or its file; by
        default the file that the summary names, in the same folder.

        Raises:
            SummaryError: the file is missing, damaged or of another kind, or the item table is another one.
        """
        tensors, normalize, metadata = read_summary(
            path, kind=cls.kind, factors=cls.factor_names, item_factors=item_factors
        )
        try:
            return cls(**tensors, normalize=normalize, metadata=metadata)
        except ValueError as error:
            raise SummaryError(f"{path} is not a valid summary, {error}: save it anew") from error


def _not_learned(table: Tensor | None) -> Tensor | None:
    """Itself, but of a learner's parameter its values alone."""
    return (
        table.detach()
        if isinstance(table, nn.Parameter) or (table is not None and table.requires_grad)
        else table
    )


def check_normalize(normalize: str) -> None:
    """ValueError unless `normalize` is known."""
    if normalize not in ("softmax", "none"):
        raise ValueError(f'normalize must be "softmax" or "none", got {normalize!r}')


def check_floating(tensors: dict[str, Tensor]) -> None:
    """ValueError unless the named tensors are floating and not empty."""
    for name, value in tensors.items():
        if value.numel() == 0:
            raise ValueError(f"{name} must not be empty, got {tuple(value.shape)}")
        if value.dtype not in FLOATING:
            raise ValueError(f"{name} must be floating, got {value.dtype}")


def check_positions(position_embeddings: Tensor | None, width: int, beside: str) -> None:
    """ValueError unless (positions, at most `width`)."""
    if position_embeddings is None:
        return
    if position_embeddings.ndim != 2 or position_embeddings.shape[1] > width:
        raise ValueError(
            f"position_embeddings must have the shape (rows, {width} or less) beside {beside}, "
            f"got {tuple(position_embeddings.shape)}"
        )
