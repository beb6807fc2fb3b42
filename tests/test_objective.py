"""Real examples cut on the device of the item table: what the objective makes of those that the host cuts."""

from __future__ import annotations

import pytest
import torch
from test_unroll import small_distiller
from torch import Tensor

from td3_fast.data import ExamplesOnDevice
from td3_fast.learners import LEARNERS
from td3_fast.objective import OuterObjective


def objectives(**changes: object) -> tuple[list[OuterObjective], list[tuple[Tensor, ...]]]:
    """Of the same examples, cut by the host and by the device; the losses and gradients that they give."""
    distiller, state = small_distiller(**changes)
    follower, trajectory = distiller.follower, distiller.draw(state)
    assert follower.train_there is None  # on the CPU
    learner = tuple(1.1 * p for p in trajectory.start)  # another than the teacher
    made, results = [], []
    for there in (None, ExamplesOnDevice(follower.train, follower.learner.max_len, follower.items.device)):
        follower.train_there = there
        made.append(follower.objective(trajectory))
        fit, aligned, gradients = made[-1].gradient(follower.flat, learner, follower.items)
        results.append((fit, aligned, *gradients))
    return made, results


@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
@pytest.mark.parametrize("name", LEARNERS)
def test_real_examples_may_be_cut_on_the_device(name: str, item_embedding: str) -> None:
    (by_host, by_device), (expected, actual) = objectives(name=name, item_embedding=item_embedding)
    assert [i for i, _ in by_host.parts] == [0, 1, 2]
    # nothing that is looked up as it is encoded needs to be cut
    whole = name == "SASRec" and item_embedding == "frozen"
    assert [i for i, _ in by_device.parts] == ([0] if whole else [0, 1, 2])
    own = [torch.cat(tensors) for tensors in zip(*(part for _, part in by_device.parts), strict=True)]
    first = 0
    for _, theirs in by_host.parts:
        rows, width = slice(first, first + len(theirs.targets)), theirs.histories.shape[1]
        assert torch.equal(own[0][rows, :width], theirs.histories)
        assert torch.equal(own[1][rows], theirs.lengths)
        assert torch.equal(own[2][rows], theirs.targets)
        first += len(theirs.targets)
    assert all(tensor.is_contiguous() for _, part in by_device.parts for tensor in part)
    assert by_host.parts[0][1].histories.shape[1] < own[0].shape[1]
    for a, b in zip(actual, expected, strict=True):
        assert float(b.abs().max()) > 0
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
