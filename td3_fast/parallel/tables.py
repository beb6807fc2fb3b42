"""What is done with item tables, whole in one process or split by rows over several.

A split table is a tensor of this process's rows, in the order of the ranks; all other tensors are common to the
processes (`collectives.py` says what that means for gradients), and item ids are those of the whole catalogue.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from td3_fast.ops import (
    Normalize,
    item_cross_entropy,
    item_logsumexp,
    item_probabilities,
    look_up,
    normalized_embedding,
    soft_embedding,
    target_rank,
)
from td3_fast.parallel.collectives import copied, gather, total
from td3_fast.parallel.group import Group

RANKED_AT_ONCE = 65536  # rows of a table, or candidates, beside the rows' targets: bounds what is copied


class ItemTables(Protocol):
    """The ops of `td3_fast.ops` on tables of all items, by the same formulas, wherever the rows are.

    Differentiable as those are: twice, in every tensor.
    """

    def rows(self) -> slice:
        """The rows of the whole tables that are here."""

    def most_rows(self, table: Tensor) -> int:
        """The most rows that a process has: what sizes are decided by, so that all decide alike."""

    def look_up(self, ids: Tensor, table: Tensor) -> Tensor:
        """The rows of a table (n, d) at `ids` (*shape): (*shape, d), in float32 where it is kept in 16 bits."""

    def soft_embedding(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """`td3_fast.ops.soft_embedding`."""

    def item_cross_entropy(self, hidden: Tensor, table: Tensor, target: Tensor) -> Tensor:
        """`td3_fast.ops.item_cross_entropy`."""

    def normalized_embedding(
        self, queries: Tensor, keys: Tensor, item_embeddings: Tensor, *, normalize: Normalize = "softmax"
    ) -> Tensor:
        """`td3_fast.ops.normalized_embedding`."""

    def target_rank(
        self,
        hidden: Tensor,
        table: Tensor,
        target: Tensor,
        *,
        candidates: Tensor | None = None,
        excluded: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """`td3_fast.ops.target_rank`, the padding item left out."""

    def probabilities(self, queries: Tensor, keys: Tensor) -> Tensor:
        """`softmax(queries @ keys.T)` over all items, the columns of this process's. Not differentiable."""

    def total(self, partial: Tensor) -> Tensor:
        """The sum over all items, of sums over those that are here. Not differentiable."""


class WholeTables:
    """One process, all items: the ops as they are."""

    def rows(self) -> slice:
        return slice(None)

    def most_rows(self, table: Tensor) -> int:
        return len(table)

    def look_up(self, ids: Tensor, table: Tensor) -> Tensor:
        return look_up(table, ids)

    def soft_embedding(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return soft_embedding(queries, keys, values)

    def item_cross_entropy(self, hidden: Tensor, table: Tensor, target: Tensor) -> Tensor:
        return item_cross_entropy(hidden, table, target)

    def normalized_embedding(
        self, queries: Tensor, keys: Tensor, item_embeddings: Tensor, *, normalize: Normalize = "softmax"
    ) -> Tensor:
        return normalized_embedding(queries, keys, item_embeddings, normalize=normalize)

    def target_rank(
        self,
        hidden: Tensor,
        table: Tensor,
        target: Tensor,
        *,
        candidates: Tensor | None = None,
        excluded: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        return target_rank(hidden, table, target, candidates=candidates, excluded=excluded)

    def probabilities(self, queries: Tensor, keys: Tensor) -> Tensor:
        rows = queries.detach().flatten(0, -2)
        return item_probabilities(rows, keys.detach()).view(*queries.shape[:-1], len(keys))

    def total(self, partial: Tensor) -> Tensor:
        return partial


class SplitTables:
    """Tables of `num_items` rows split over a group: each process runs the op on its rows, and the results are merged.

    The merge gathers a vector of d + 1 numbers for each row of queries from every process, and weights the embeddings
    with `exp(lse_r - lse)`; derivatives are those of the ops under those of the merge. All work that is not on a table
    is done by every process alike.

    Raises:
        ValueError: there are more processes than items.
    """

    def __init__(self, group: Group, num_items: int) -> None:
        if group.size > num_items:
            raise ValueError(
                f"{num_items} items cannot be split over {group.size} processes: use fewer of them"
            )
        self._group = group
        self._num_items = num_items

    def rows(self) -> slice:
        return self._group.rows(self._num_items)

    def most_rows(self, table: Tensor) -> int:
        return -(-self._num_items // self._group.size)

    def _local(self, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Ids as rows of this process's table, and which of them are there."""
        self._check(table)
        self._check_ids(ids)
        local = ids - self.rows().start
        return local, (local >= 0) & (local < len(table))

    def _check(self, table: Tensor) -> None:
        rows = self.rows()
        if len(table) != rows.stop - rows.start:
            raise ValueError(
                f"expected the rows {rows.start} to {rows.stop} of a table of {self._num_items} items, "
                f"got {len(table)} rows: cut the table by `tables.rows()`"
            )

    def _check_ids(self, ids: Tensor) -> None:
        # no process would find them; a GPU is not waited for
        if ids.device.type != "cpu" or ids.numel() == 0:
            return
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= self._num_items:
            wrong = least if least < 0 else most
            raise IndexError(f"item {wrong} is out of range: there are {self._num_items} items")

    def look_up(self, ids: Tensor, table: Tensor) -> Tensor:
        local, here = self._local(ids, table)
        found = look_up(table, torch.where(here, local, 0))
        return total(found.masked_fill(~here.unsqueeze(-1), 0.0), self._group)

    def soft_embedding(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self._check(keys)
        embedding, logsumexp = soft_embedding(copied(queries, self._group), keys, values)
        parts = torch.cat([embedding.to(logsumexp.dtype), logsumexp.unsqueeze(-1)], dim=-1)
        gathered = gather(parts, self._group)  # (processes, rows, d + 1)
        embeddings, logsumexps = gathered[..., :-1], gathered[..., -1]
        shares = torch.softmax(logsumexps, dim=0).unsqueeze(-1)
        return (shares * embeddings).sum(0).to(queries.dtype), torch.logsumexp(logsumexps, dim=0)

    def item_cross_entropy(self, hidden: Tensor, table: Tensor, target: Tensor) -> Tensor:
        self._check(table)
        logsumexp = item_logsumexp(copied(hidden, self._group), table)
        if not target.is_floating_point():
            target = self.look_up(target, table)
        if target.shape != hidden.shape:
            raise ValueError(
                f"expected a target for each row of {tuple(hidden.shape)}, got {tuple(target.shape)}"
            )
        score = (hidden.to(logsumexp.dtype) * target).sum(-1)
        return torch.logsumexp(gather(logsumexp, self._group), dim=0) - score

    def normalized_embedding(
        self, queries: Tensor, keys: Tensor, item_embeddings: Tensor, *, normalize: Normalize = "softmax"
    ) -> Tensor:
        if normalize == "softmax":
            embedding, _ = self.soft_embedding(queries.flatten(0, 1), keys, item_embeddings)
            return embedding.view(*queries.shape[:2], -1)
        if normalize == "none":
            self._check(keys)
            accumulate = torch.promote_types(queries.dtype, torch.float32)
            table = total(keys.to(accumulate).T @ item_embeddings.to(accumulate), self._group)
            return (queries.to(accumulate) @ table).to(queries.dtype)
        raise ValueError(f'normalize must be "softmax" or "none", got {normalize!r}')

    @torch.no_grad()
    def target_rank(
        self,
        hidden: Tensor,
        table: Tensor,
        target: Tensor,
        *,
        candidates: Tensor | None = None,
        excluded: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        rows = self.look_up(target, table)
        if candidates is not None:
            if excluded is not None:
                raise ValueError("candidates already say what is ranked; excluded is for the full ranking")
            ahead = self._ahead_of_candidates(hidden, table, target, rows, candidates)
        else:
            ahead = self._ahead(hidden, table, target, rows, excluded)
        return self._group.total(ahead) + 1

    def _ahead(
        self,
        hidden: Tensor,
        table: Tensor,
        target: Tensor,
        target_rows: Tensor,
        excluded: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """How many items of this process score at least as high as each row's target: (rows,) int64.

        The op ranks a row of its table, so the targets' rows are put below a part of the table, and what they count
        among themselves is taken off again. Scores are summed in one order wherever a row lies, so ties stay exact.
        """
        count = len(hidden)
        behind = torch.arange(count, device=hidden.device)
        among_targets = target_rank(hidden, target_rows, behind, exclude_padding=False) - 1
        left_out = self._left_out(count, target, excluded)
        ahead = torch.zeros_like(target)
        first = self.rows().start
        for start in range(0, len(table), RANKED_AT_ONCE):
            part = table[start : start + RANKED_AT_ONCE]
            row, item = left_out
            local = item - first - start
            inside = (local >= 0) & (local < len(part))
            per_row = torch.bincount(row[inside], minlength=count)
            offsets = torch.cat([per_row.new_zeros(1), per_row.cumsum(0)])
            ranks = target_rank(
                hidden,
                torch.cat([part, target_rows]),
                behind + len(part),
                excluded=(offsets, local[inside]),
                exclude_padding=first + start == 0,
            )
            ahead += ranks - 1 - among_targets
        return ahead

    def _left_out(
        self, count: int, target: Tensor, excluded: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Rows and ids of the items that rows leave out, a row's own target among them, sorted by row."""
        every = torch.arange(count, device=target.device)
        if excluded is None:
            return every, target
        offsets, items = excluded
        self._check_ids(items)
        row = torch.cat([every.repeat_interleave(offsets.diff()), every])
        order = torch.argsort(row, stable=True)
        return row[order], torch.cat([items, target])[order]

    def _ahead_of_candidates(
        self, hidden: Tensor, table: Tensor, target: Tensor, target_rows: Tensor, candidates: Tensor
    ) -> Tensor:
        """How many candidates that are here score at least as high as each row's target: (rows,) int64."""
        local, here = self._local(candidates, table)
        here = here & (candidates != target.unsqueeze(1))
        ahead = torch.zeros_like(target)
        at_once = max(1, RANKED_AT_ONCE // max(1, candidates.shape[1]))
        for start in range(0, len(hidden), at_once):
            rows = slice(start, start + at_once)
            mine = here[rows]
            own_rows = table[local[rows][mine]]
            behind = torch.arange(len(mine), device=hidden.device) + len(own_rows)
            # a candidate of another process becomes the target itself, which is not counted
            places = behind.unsqueeze(1).expand_as(mine).clone()
            places[mine] = torch.arange(len(own_rows), device=hidden.device)
            ranked = target_rank(
                hidden[rows], torch.cat([own_rows, target_rows[rows]]), behind, candidates=places
            )
            ahead[rows] = ranked - 1
        return ahead

    @torch.no_grad()
    def probabilities(self, queries: Tensor, keys: Tensor) -> Tensor:
        self._check(keys)
        scores = queries.detach() @ keys.T
        logsumexp = torch.logsumexp(self._group.stack(torch.logsumexp(scores, dim=-1)), dim=0)
        return scores.sub_(logsumexp.unsqueeze(-1)).exp_()

    def total(self, partial: Tensor) -> Tensor:
        return self._group.total(partial)


WHOLE = WholeTables()


def item_tables(group: Group, num_items: int) -> ItemTables:
    """The tables of `num_items` rows that a group holds: whole where it is of one process."""
    return WHOLE if group.size == 1 else SplitTables(group, num_items)
