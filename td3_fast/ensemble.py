"""Knowledge distillation (Hinton et al., 2015, arXiv:1503.02531): learners whose predictions another one is taught."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from td3_fast.data import Batch
from td3_fast.learners import CrossEntropy, FlatParameters
from td3_fast.ops import item_cross_entropy, look_up, soft_embedding

Member = tuple[Tensor, Tensor]  # flat parameters (size,) and item table (n, d) of a trained learner


class Ensemble:
    """Trained learners of one shape; the mean of their predictions is `share` of what another one is to predict.

    The rest of it is the next item itself. The members predict without dropout and are not trained any further.
    """

    def __init__(self, flat: FlatParameters, members: Sequence[Member], *, share: float) -> None:
        check_taught(flat)
        if not members:
            raise ValueError("an ensemble needs at least one member")
        if not 0 < share <= 1:
            raise ValueError(f"the share of an ensemble must lie in (0, 1], got {share}")
        self._flat = flat
        self._members = [(theta.detach(), items.detach()) for theta, items in members]
        self._share = share

    def cross_entropy(self, batch: Batch) -> CrossEntropy:
        """In the place of `item_cross_entropy` for the examples of `batch`, in their order."""
        with torch.no_grad():
            hidden = [self._hidden(member, batch) for member in self._members]

        def cross_entropy(of: Tensor, items: Tensor, targets: Tensor) -> Tensor:
            # the row that the mean prediction expects of the table, beside that of the next item
            made = zip(hidden, self._members, strict=True)
            rows = [soft_embedding(queries, keys, items)[0] for queries, (_, keys) in made]
            expected = torch.stack(rows).mean(0)
            return item_cross_entropy(of, items, torch.lerp(look_up(items, targets), expected, self._share))

        return cross_entropy

    def _hidden(self, member: Member, batch: Batch) -> Tensor:
        theta, items = member
        positions = (batch.lengths - 1).unsqueeze(1)
        return self._flat.encode(theta, look_up(items, batch.histories), positions).squeeze(1)


def check_taught(flat: FlatParameters) -> None:
    """ValueError for a learner whose training has other targets than the next item, so none to mix."""
    if not flat.predicts_next_item:
        raise ValueError(
            f"an ensemble teaches the next item, and a {flat.learner_name} is trained on more than that: "
            "leave it out, or choose SASRec, GRU4Rec or NARM"
        )
