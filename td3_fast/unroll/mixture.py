"""How soft embeddings come from a summary during an inner loop, and how their gradients get back to it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from td3_fast.ops import mix_items, mix_items_transposed, weigh_products
from td3_fast.parallel import WHOLE, ItemTables

if TYPE_CHECKING:
    from typing_extensions import Self


def flat_pair(queries: Tensor, keys: Tensor) -> Tensor:
    """The one tensor that a mixture is made from where its keys are learned as well: one after the other, flat."""
    return torch.cat([queries.flatten(), keys.flatten()])


NOTED_LIMIT = 64 * 2**20  # bytes of cotangents and tables


class Embeddings(Protocol):
    """What the steps of an inner loop ask of an `ItemMixture`."""

    @property
    def whole(self) -> Tensor | None:
        """X (μ, ζ, d) of all users, where it is there and every table's."""

    def embed(self, users: Tensor, items: Tensor) -> Tensor:
        """X of the selected users under the table `items`."""

    def embed_transposed(self, users: Tensor, cotangent: Tensor) -> Tensor:
        """The gradient with respect to the table where X has the cotangent (b, ζ, d): (n, d)."""

    def note(self, users: Tensor, cotangent: Tensor, items: Tensor) -> None:
        """Take note that X under the table `items` has this cotangent."""


class ItemMixture(Embeddings, Protocol):
    """The soft embeddings X (b, ζ, d) of selected synthetic users as a function of the learner's item table E (n, d).

    It is constant over an inner loop and linear in E. `noted` cotangents add up until `gradient` fetches them.
    Tables, E among them, may be split over processes: X is then common to these, and so is what `gradient` gives.
    """

    @property
    def probabilities(self) -> Tensor | None:
        """(μ, ζ, n), where X is their product with the table and they are there, of all items."""

    def twin(self) -> Self:
        """The same mixture, to be embedded by, which reads its constants from tensors of its own: what a captured graph
        reads again whenever it is replayed, after `assign`. It never reads a tensor on the host."""

    def assign(self, other: Self) -> None:
        """Take the constants of a mixture of the same kind and size, into the tensors that are there."""

    def apart(self) -> Self:
        """The same soft embeddings, with cotangents of its own to note; nothing may be noted here yet."""

    def note_steps(self, users: Tensor, cotangents: Tensor, items: Tensor) -> None:
        """`note` of several steps: users (steps, b) on the host, cotangents (steps, b, ζ, d), a table (n, d) of each.

        The same bits whenever it is called with the same; others than those of `note` step by step.
        """

    def gradient(self) -> Tensor:
        """What was noted since the last call, as the gradient of the tensor that the mixture was made from."""


class _Constants(ABC):
    """`twin` and `assign` by the names of the tensors that soft embeddings are a function of, `apart` by those that
    cotangents are added to; `note_steps` step by step."""

    constants: ClassVar[tuple[str, ...]]
    sums: ClassVar[tuple[str, ...]] = ("_gradient", "_of_keys")
    by_index = False  # whether rows are taken by an index on the device even where a view would do

    @property
    def whole(self) -> Tensor | None:
        return None

    @property
    def probabilities(self) -> Tensor | None:
        return None

    def twin(self) -> Self:
        twin = copy.copy(self)
        twin.by_index = True
        for name in self.constants:
            setattr(twin, name, getattr(self, name).detach().clone())
        return twin

    def assign(self, other: Self) -> None:
        for name in self.constants:
            getattr(self, name).copy_(getattr(other, name))

    @abstractmethod
    def note(self, users: Tensor, cotangent: Tensor, items: Tensor) -> None: ...

    def note_steps(self, users: Tensor, cotangents: Tensor, items: Tensor) -> None:
        steps = list(zip(users, cotangents, items, strict=True))
        for step in reversed(steps):
            self.note(*step)

    def apart(self) -> Self:
        apart = copy.copy(self)
        for name in self.sums:
            sum_ = getattr(self, name)
            setattr(apart, name, None if sum_ is None else torch.zeros_like(sum_))
        return apart


class FixedEmbeddings(_Constants):
    """For a frozen table: X (μ, ζ, d) is made once and every step takes its rows. The gradient is that of X."""

    constants = ("_embeddings",)
    sums = ("_gradient",)

    def __init__(self, embeddings: Tensor) -> None:
        self._embeddings = embeddings.detach()
        self._gradient = torch.zeros_like(self._embeddings)

    @property
    def whole(self) -> Tensor | None:
        return self._embeddings

    def embed(self, users: Tensor, items: Tensor) -> Tensor:
        return self._embeddings.index_select(0, users)

    def embed_transposed(self, users: Tensor, cotangent: Tensor) -> Tensor:
        raise TypeError("fixed embeddings do not depend on the learner's item table")

    def note(self, users: Tensor, cotangent: Tensor, items: Tensor) -> None:
        self._gradient.index_add_(0, beside(users, cotangent), cotangent)

    def note_steps(self, users: Tensor, cotangents: Tensor, items: Tensor) -> None:
        # as a product, whose sums have one order on every device: users recur, and index_add_ would meet them in any
        chosen = beside(users.flatten(), cotangents)
        rows = torch.arange(len(self._gradient), device=cotangents.device).unsqueeze(1)
        of_rows = (rows == chosen).to(cotangents.dtype)  # (μ, steps b)
        self._gradient += (of_rows @ cotangents.flatten(0, 1).flatten(1)).view_as(self._gradient)

    def gradient(self) -> Tensor:
        gradient, self._gradient = self._gradient, torch.zeros_like(self._gradient)
        return gradient


class CachedMixture(_Constants):
    """X = softmax(C Vᵀ) E with the probabilities (μ, ζ, n) kept, and without the CPU's kernels as much again for a
    moment, when the gradient is asked for.

    The gradient is that of the queries C (μ, ζ, r), like that of the classes below, or, with `learned_keys`, that of
    `flat_pair(C, V)`. Cotangents wait in low rank, each with a table, until then or until they fill `NOTED_LIMIT`
    bytes, so that each set of users costs one matrix product in place of one a step.
    """

    constants = ("_probabilities",)

    def __init__(
        self, queries: Tensor, item_factors: Tensor, tables: ItemTables = WHOLE, *, learned_keys: bool = False
    ) -> None:
        self._keys = item_factors
        self._tables = tables
        self._queries = queries.detach() if learned_keys else None
        self._probabilities = tables.probabilities(queries, item_factors)
        # the users asked for last, and the first of them where they follow one another
        self._latest: tuple[Tensor, int | None] | None = None
        self._noted: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        self._noted_bytes = 0
        self._gradient = torch.zeros_like(queries)
        self._of_keys = torch.zeros_like(self._keys) if learned_keys else None

    @property
    def probabilities(self) -> Tensor | None:
        return self._probabilities if self._tables is WHOLE else None

    def apart(self) -> Self:
        apart = super().apart()
        apart._noted = {}
        return apart

    def _rows(self, users: Tensor) -> Tensor:
        if self.by_index:
            return self._probabilities[users].flatten(0, 1)
        # a step asks for the same users again and again
        if self._latest is None or self._latest[0] is not users:
            self._latest = (users, first_of(users, self._probabilities))
        first, all_rows = self._latest[1], self._probabilities
        rows = all_rows[users] if first is None else all_rows.narrow(0, first, len(users))
        return rows.flatten(0, 1)

    def embed(self, users: Tensor, items: Tensor) -> Tensor:
        mixed = self._tables.total(mix_items(self._rows(users), items))
        return mixed.view(users.shape[0], -1, items.shape[1])

    def embed_transposed(self, users: Tensor, cotangent: Tensor) -> Tensor:
        return mix_items_transposed(self._rows(users), cotangent.flatten(0, 1))

    def note(self, users: Tensor, cotangent: Tensor, items: Tensor) -> None:
        self._noted.setdefault(tuple(users.tolist()), []).append((cotangent.flatten(0, 1), items))
        # of the largest table of all processes, so that all add what they noted at the same moments
        rows = self._tables.most_rows(items)
        self._noted_bytes += cotangent.nbytes + rows * items.shape[1] * items.element_size()
        if self._noted_bytes > NOTED_LIMIT:
            self._add_noted()

    def _add_noted(self) -> None:
        for users in list(self._noted):
            noted = self._noted.pop(users)
            index = beside(torch.tensor(users, device="cpu"), self._gradient)
            rows = self._rows(index)
            cotangents, tables = zip(*noted, strict=True)
            queries = None if self._queries is None else self._queries[index].flatten(0, 1)
            by_keys, of_rows, of_items = weigh_products(rows, cotangents, tables, self._keys, queries)
            del noted, cotangents, tables
            # the softmax's derivative, with the sums over items taken out after the product with the keys
            shares = self._tables.total(of_rows)
            gradient = self._tables.total(by_keys - shares * mix_items(rows, self._keys))
            self._gradient.index_add_(0, index, gradient.unflatten(0, (len(users), -1)))
            if queries is not None and of_items is not None and self._of_keys is not None:
                self._of_keys += of_items.sub_(mix_items_transposed(rows, shares * queries))
        self._noted_bytes = 0

    def gradient(self) -> Tensor:
        self._add_noted()
        gradient, self._gradient = self._gradient, torch.zeros_like(self._gradient)
        if self._of_keys is None:
            return gradient
        of_keys, self._of_keys = self._of_keys, torch.zeros_like(self._of_keys)
        return flat_pair(gradient, of_keys)


def first_of(users: Tensor, tensor: Tensor) -> int | None:
    """The first of users that follow one another, so that a view has their rows of a tensor; None on a GPU, which is
    not asked."""
    if users.device.type != "cpu":
        return None
    chosen = users.tolist()
    count, first = len(chosen), chosen[0] if chosen else 0
    following = 0 <= first <= tensor.shape[0] - count and chosen == list(range(first, first + count))
    return first if following else None


def pinned(tensor: Tensor) -> Tensor:
    """A tensor of the host where a GPU can fetch it by itself, so that nobody waits for the copy."""
    return tensor.pin_memory()


def beside(index: Tensor, tensor: Tensor) -> Tensor:
    """`index` on the device of a tensor."""
    if tensor.is_cuda and not index.is_cuda:
        index = pinned(index)
    return index.to(tensor.device, non_blocking=True)


class _Embedded(NamedTuple):
    """Soft embeddings with their graph."""

    users: Tensor
    items: Tensor
    sources: tuple[Tensor, Tensor, Tensor]  # queries (b ζ, r), keys and a table of the same values as `items`
    embedding: Tensor  # (b ζ, d)


class StreamedMixture(_Constants):
    """X = softmax(C Vᵀ) E with nothing of size positions × items: the probabilities are recomputed in every call.

    The graph of the latest `embed` serves what is asked for the same users next, in the place of one more pass.
    """

    constants = ("_queries", "_keys")

    def __init__(
        self, queries: Tensor, item_factors: Tensor, tables: ItemTables = WHOLE, *, learned_keys: bool = False
    ) -> None:
        self._queries = queries.detach()
        self._keys = item_factors
        self._tables = tables
        self._gradient = torch.zeros_like(self._queries)
        self._of_keys = torch.zeros_like(self._keys) if learned_keys else None
        self._latest: _Embedded | None = None

    def _embedded(self, users: Tensor, items: Tensor) -> _Embedded:
        queries = self._queries[users].flatten(0, 1).requires_grad_()
        keys = self._keys.detach().requires_grad_(self._of_keys is not None)
        table = items.detach().requires_grad_()
        with torch.enable_grad():
            embedding, _ = self._tables.soft_embedding(queries, keys, table)
        return _Embedded(users, items, (queries, keys, table), embedding)

    def embed(self, users: Tensor, items: Tensor) -> Tensor:
        self._latest = self._embedded(users, items)
        return self._latest.embedding.detach().unflatten(0, (len(users), -1))

    def embed_transposed(self, users: Tensor, cotangent: Tensor) -> Tensor:
        latest, self._latest = self._latest, None
        if latest is None or latest.users is not users:
            latest = self._embedded(users, cotangent.new_zeros(len(self._keys), cotangent.shape[-1]))
        # X is linear in the table, so the point at which its derivative is taken does not matter
        return torch.autograd.grad(latest.embedding, latest.sources[2], cotangent.flatten(0, 1))[0]

    def note(self, users: Tensor, cotangent: Tensor, items: Tensor) -> None:
        made = self._latest
        if made is None or made.users is not users or made.items is not items:
            made = self._embedded(beside(users, cotangent), items)
        sources = made.sources[: 1 if self._of_keys is None else 2]
        gradient, *of_keys = torch.autograd.grad(
            made.embedding, sources, cotangent.flatten(0, 1), retain_graph=made is self._latest
        )
        self._gradient.index_add_(0, made.users, gradient.unflatten(0, (len(users), -1)))
        if self._of_keys is not None:
            self._of_keys += of_keys[0]

    def gradient(self) -> Tensor:
        gradient, self._gradient = self._gradient, torch.zeros_like(self._gradient)
        if self._of_keys is None:
            return gradient
        of_keys, self._of_keys = self._of_keys, torch.zeros_like(self._of_keys)
        return flat_pair(gradient, of_keys)


class LinearMixture(_Constants):
    """The bare product of the paper: X = C (Vᵀ E), reassociated so that nothing of size positions × items is made."""

    constants = ("_queries", "_keys")

    def __init__(
        self, queries: Tensor, item_factors: Tensor, tables: ItemTables = WHOLE, *, learned_keys: bool = False
    ) -> None:
        self._queries = queries.detach()
        self._keys = item_factors
        self._tables = tables
        self._gradient = torch.zeros_like(self._queries)
        self._of_keys = torch.zeros_like(self._keys) if learned_keys else None

    def embed(self, users: Tensor, items: Tensor) -> Tensor:
        return self._queries[users] @ self._tables.total(self._keys.T @ items)

    def embed_transposed(self, users: Tensor, cotangent: Tensor) -> Tensor:
        return self._keys @ (self._queries[users].flatten(0, 1).T @ cotangent.flatten(0, 1))

    def note(self, users: Tensor, cotangent: Tensor, items: Tensor) -> None:
        users = beside(users, cotangent)
        self._gradient.index_add_(0, users, cotangent @ self._tables.total(items.T @ self._keys))
        if self._of_keys is not None:
            self._of_keys += items @ (cotangent.flatten(0, 1).T @ self._queries[users].flatten(0, 1))

    def gradient(self) -> Tensor:
        gradient, self._gradient = self._gradient, torch.zeros_like(self._gradient)
        if self._of_keys is None:
            return gradient
        of_keys, self._of_keys = self._of_keys, torch.zeros_like(self._of_keys)
        return flat_pair(gradient, of_keys)
