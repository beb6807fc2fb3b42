"""Knowledge distillation (Hinton et al., 2015, arXiv:1503.02531): learners whose predictions another one is taught."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from td3_fast.data import Batch
from td3_fast.learners import LEARNERS, CrossEntropy, FlatParameters, Learner, predicts_next_item
from td3_fast.ops import item_cross_entropy, look_up, soft_embedding

Member = tuple[Tensor, Tensor]  # flat parameters (size,) and item table (n, d) of a trained learner


class Ensemble:
    """Trained learners of one shape; the mean of their predictions is `share` of what another one is to predict.

    The rest of it is the next item itself. The members predict without dropout and are not trained any further.
    """

    def __init__(self, flat: FlatParameters, members: Sequence[Member], *, share: float) -> None:
        if not members:
            raise ValueError("an ensemble needs at least one member")
        check_share(share)
        self._flat = flat
        self._members = [(theta.detach(), items.detach()) for theta, items in members]
        self._share = share

    def loss_of(self, batch: Batch) -> CrossEntropy:
        """What stands in the place of `item_cross_entropy` for the examples of `batch`, in their order."""
        with torch.no_grad():
            predicted = [self._hidden(member, batch) for member in self._members]

        def cross_entropy(hidden: Tensor, items: Tensor, targets: Tensor) -> Tensor:
            # the row that the mean prediction expects of the table, beside that of the next item
            made = zip(predicted, self._members, strict=True)
            rows = [soft_embedding(queries, keys, items)[0] for queries, (_, keys) in made]
            expected = torch.stack(rows).mean(0)
            return item_cross_entropy(
                hidden, items, torch.lerp(look_up(items, targets), expected, self._share)
            )

        return cross_entropy

    def _hidden(self, member: Member, batch: Batch) -> Tensor:
        theta, items = member
        positions = (batch.lengths - 1).unsqueeze(1)
        return self._flat.encode(theta, look_up(items, batch.histories), positions).squeeze(1)


def check_share(share: float) -> None:
    """ValueError unless it is a share of the targets."""
    if not 0 < share <= 1:
        raise ValueError(f"the share of an ensemble must lie in (0, 1], got {share}")


def check_taught(learner: type[Learner]) -> None:
    """ValueError for learners whose training has other targets than the next item, so none to mix."""
    if not predicts_next_item(learner):
        able = [name for name, (known, _) in LEARNERS.items() if predicts_next_item(known)]
        raise ValueError(
            f"an ensemble teaches the next item, and {learner.__name__} is trained on more than that: choose "
            f"{', '.join(able[:-1])} or {able[-1]}, or leave the ensemble out"
        )
