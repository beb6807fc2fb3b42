"""The classes of learners that a summary is distilled by: the pretrained learner's, and others on its item table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from td3_fast.learners import FlatParameters, Learner, build_learner
from td3_fast.training import fresh_like

KEPT_SIZES = ("num_items", "max_len", "hidden")  # of the pretrained learner, in a learner of another class


def to_width(embeddings: Tensor, columns: int) -> Tensor:
    """(..., d) as (..., columns): cut at the end, or filled with zeros."""
    missing = columns - embeddings.shape[-1]
    return F.pad(embeddings, (0, missing)) if missing else embeddings


class PretrainedClass:
    """The class of the pretrained learner: learners with its embeddings under an encoder drawn anew.

    learner: one of the class, for what all of it share; flat: its parameters as a vector.
    """

    def __init__(self, learner: Learner) -> None:
        self.name = type(learner).__name__
        self.learner = learner
        self.flat = FlatParameters(learner)

    @property
    def columns(self) -> int:
        """Of the item table."""
        return self.learner.item_embeddings.shape[1]

    def fresh(self, *, seed: int, share_items: bool) -> Learner:
        """A learner that has trained for no step."""
        return fresh_like(self.learner, seed=seed, share_items=share_items)

    def fresh_parameters(self, *, seed: int) -> Tensor:
        """Those of such a learner, without its item table: (size,)."""
        return self.flat.gather(self.fresh(seed=seed, share_items=True).state_dict())


class OtherClass(PretrainedClass):
    """Another class, with the pretrained learner's embeddings of items, its length and its width; the rest by the
    defaults of the class. All else is drawn anew, positions among it, which mean something else in each class.

    A bias of items, where only one of the classes has that column, is left out, or 0.
    """

    def __init__(self, name: str, pretrained: Learner) -> None:
        sizes = pretrained.hyperparameters()
        self._sizes: dict[str, Any] = {size: sizes[size] for size in KEPT_SIZES}
        self._like = next(p for n, p in pretrained.named_parameters() if n != "item_embeddings")
        learner = self._around_no_items(name, seed=0)
        table = pretrained.item_embeddings.detach()
        columns = learner.item_embeddings.shape[1]
        # what the pretrained learner's table has beyond the width is no embedding
        known = table if table.shape[1] == columns else to_width(table[:, : sizes["hidden"]], columns)
        super().__init__(self._with_items(learner, known.contiguous(), trained=False))

    def _around_no_items(self, name: str, *, seed: int) -> Learner:
        """A learner whose table has one row: what is drawn does not depend on how many of the items are here."""
        return build_learner(name, {**self._sizes, "num_items": 1}, seed=seed).to(
            self._like.device, self._like.dtype
        )

    def _with_items(self, learner: Any, table: Tensor, *, trained: bool) -> Learner:
        learner.config = replace(learner.config, num_items=self._sizes["num_items"])
        learner.item_embeddings = nn.Parameter(table, requires_grad=trained)
        return learner

    def fresh(self, *, seed: int, share_items: bool) -> Learner:
        table = self.learner.item_embeddings.detach()
        learner = self._around_no_items(self.name, seed=seed)
        return self._with_items(learner, table if share_items else table.clone(), trained=not share_items)

    def fresh_parameters(self, *, seed: int) -> Tensor:
        return self.flat.gather(self._around_no_items(self.name, seed=seed).state_dict())
