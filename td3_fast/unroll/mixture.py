"""How soft embeddings come from a summary during an inner loop, and how their gradients get back to it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from td3_fast.ops import mix_items, mix_items_transposed, soft_embedding

NOTED_LIMIT = 64 * 2**20  # bytes of cotangents and tables


class ItemMixture(Protocol):
    """The soft embeddings X (b, ζ, d) of selected synthetic users as a function of the learner's item table E (n, d).

    It is constant over an inner loop and linear in E. `noted` cotangents add up until `gradient` fetches them.
    """

    def embed(self, users: Tensor, items: Tensor) -> Tensor:
        """X of the selected users under the table `items`."""

    def embed_transposed(self, users: Tensor, cotangent: Tensor) -> Tensor:
        """The gradient with respect to the table where X has the cotangent (b, ζ, d): (n, d)."""

    def note(self, users: Tensor, cotangent: Tensor, items: Tensor) -> None:
        """Take note that X under the table `items` has this cotangent."""

    def gradient(self) -> Tensor:
        """What was noted since the last call, as the gradient of the tensor that the mixture was made from."""


class FixedEmbeddings:
    """For a frozen table: X (μ, ζ, d) is made once and every step takes its rows. The gradient is that of X."""

    def __init__(self, embeddings: Tensor) -> None:
        self._embeddings = embeddings.detach()
        self._gradient = torch.zeros_like(self._embeddings)

    def embed(self, users: Tensor, items: Tensor) -> Tensor:
        return self._embeddings[users]

    def embed_transposed(self, users: Tensor, cotangent: Tensor) -> Tensor:
        raise TypeError("fixed embeddings do not depend on the learner's item table")

    def note(self, users: Tensor, cotangent: Tensor, items: Tensor) -> None:
        self._gradient.index_add_(0, users, cotangent)

    def gradient(self) -> Tensor:
        gradient, self._gradient = self._gradient, torch.zeros_like(self._gradient)
        return gradient


class CachedMixture:
    """X = softmax(C Vᵀ) E with the probabilities (μ, ζ, n) kept, and as much again when the gradient is asked for.

    The gradient is that of the queries C (μ, ζ, r), like that of the classes below. Cotangents wait in low rank, each
    with a table, until then or until they fill `NOTED_LIMIT` bytes, so that each set of users costs one matrix product
    in place of one a step.
    """

    def __init__(self, queries: Tensor, item_factors: Tensor) -> None:
        self._keys = item_factors
        self._probabilities = torch.softmax(queries.detach() @ item_factors.T, dim=-1)
        self._noted: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        self._noted_bytes = 0
        self._gradient = torch.zeros_like(queries)

    def _rows(self, users: Tensor) -> Tensor:
        return rows_of(self._probabilities, users).flatten(0, 1)

    def embed(self, users: Tensor, items: Tensor) -> Tensor:
        return mix_items(self._rows(users), items).unflatten(0, (len(users), -1))

    def embed_transposed(self, users: Tensor, cotangent: Tensor) -> Tensor:
        return mix_items_transposed(self._rows(users), cotangent.flatten(0, 1))

    def note(self, users: Tensor, cotangent: Tensor, items: Tensor) -> None:
        self._noted.setdefault(tuple(users.tolist()), []).append((cotangent.flatten(0, 1), items))
        self._noted_bytes += cotangent.nbytes + items.nbytes
        if self._noted_bytes > NOTED_LIMIT:
            self._add_noted()

    def _add_noted(self) -> None:
        for users in list(self._noted):
            noted = self._noted.pop(users)
            index = torch.tensor(users, device=self._gradient.device)
            rows = self._rows(index)
            cotangents, tables = (torch.cat(parts, dim=1) for parts in zip(*noted, strict=True))
            del noted
            weighted = (cotangents @ tables.T).mul_(rows)
            # the softmax's derivative, with the row sums taken out after the product with the keys
            shares = weighted.sum(-1, keepdim=True)
            gradient = weighted @ self._keys - shares * (rows @ self._keys)
            self._gradient.index_add_(0, index, gradient.unflatten(0, (len(users), -1)))
        self._noted_bytes = 0

    def gradient(self) -> Tensor:
        self._add_noted()
        gradient, self._gradient = self._gradient, torch.zeros_like(self._gradient)
        return gradient


def rows_of(tensor: Tensor, users: Tensor) -> Tensor:
    """`tensor[users]`, as a view where the users follow one another."""
    first, count = int(users[0]), len(users)
    following = torch.arange(first, first + count, device=users.device)
    return tensor[first : first + count] if torch.equal(users, following) else tensor[users]


class StreamedMixture:
    """X = softmax(C Vᵀ) E with nothing of size positions × items: the probabilities are recomputed in every call."""

    def __init__(self, queries: Tensor, item_factors: Tensor) -> None:
        self._queries = queries.detach()
        self._keys = item_factors
        self._gradient = torch.zeros_like(self._queries)

    def embed(self, users: Tensor, items: Tensor) -> Tensor:
        embedding, _ = soft_embedding(self._queries[users].flatten(0, 1), self._keys, items)
        return embedding.unflatten(0, (len(users), -1))

    def embed_transposed(self, users: Tensor, cotangent: Tensor) -> Tensor:
        # X is linear in the table, so the point at which its derivative is taken does not matter
        table = cotangent.new_zeros(len(self._keys), cotangent.shape[-1]).requires_grad_()
        with torch.enable_grad():
            embedding = self.embed(users, table)
        return torch.autograd.grad(embedding, table, cotangent)[0]

    def note(self, users: Tensor, cotangent: Tensor, items: Tensor) -> None:
        with torch.enable_grad():
            queries = self._queries[users].flatten(0, 1).requires_grad_()
            embedding, _ = soft_embedding(queries, self._keys, items)
        (gradient,) = torch.autograd.grad(embedding, queries, cotangent.flatten(0, 1))
        self._gradient.index_add_(0, users, gradient.unflatten(0, (len(users), -1)))

    def gradient(self) -> Tensor:
        gradient, self._gradient = self._gradient, torch.zeros_like(self._gradient)
        return gradient


class LinearMixture:
    """The bare product of the paper: X = C (Vᵀ E), reassociated so that nothing of size positions × items is made."""

    def __init__(self, queries: Tensor, item_factors: Tensor) -> None:
        self._queries = queries.detach()
        self._keys = item_factors
        self._gradient = torch.zeros_like(self._queries)

    def embed(self, users: Tensor, items: Tensor) -> Tensor:
        return self._queries[users] @ (self._keys.T @ items)

    def embed_transposed(self, users: Tensor, cotangent: Tensor) -> Tensor:
        return self._keys @ (self._queries[users].flatten(0, 1).T @ cotangent.flatten(0, 1))

    def note(self, users: Tensor, cotangent: Tensor, items: Tensor) -> None:
        self._gradient.index_add_(0, users, cotangent @ (items.T @ self._keys))

    def gradient(self) -> Tensor:
        gradient, self._gradient = self._gradient, torch.zeros_like(self._gradient)
        return gradient
