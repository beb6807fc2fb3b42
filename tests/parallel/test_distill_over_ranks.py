"""Distilling in several processes gives what one process gives, to rounding in float64."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from td3_fast.data import Interactions, generate_interactions, leave_one_out
from td3_fast.distill import Distiller, distill
from td3_fast.distill_config import SEMANTICS, DistillConfig, Semantics
from td3_fast.distill_state import DistillState
from td3_fast.learners import build_learner
from td3_fast.parallel import ALONE, Group, Ranks, grid
from td3_fast.training import Pretrained
from td3_fast.unroll import fit

TOLERANCE = 1e-10
NUM_ITEMS = 23


def pretrained_of(split: Any, name: str) -> Pretrained:
    sizes = {"num_items": split.interactions.num_items, "max_len": 9, "hidden": 8}
    learners = [build_learner(name, sizes, seed=seed).double() for seed in (1, 2)]
    for learner in learners:
        for parameter in learner.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.3, generator=torch.Generator().manual_seed(5))
    best, other = ({k: v.detach() for k, v in learner.state_dict().items()} for learner in learners)
    return Pretrained(
        learner_name=name,
        learner_config=learners[0].hyperparameters(),
        best=best,
        pool=[best, other],
        history=[],
        best_epoch=1,
    )


CONFIG = DistillConfig(
    users=5, positions=8, user_rank=3, position_rank=4, batch_size=40, users_per_step=3, summary_lr=0.01,
    learner_lr=0.01, inner_steps=12, window=5, micro_batch=16, epochs=1, validation_runs=2,
)  # fmt: skip


def small(ranks: Ranks, *, name: str = "SASRec", **changes: Any) -> tuple[Distiller, DistillState]:
    split = leave_one_out(generate_interactions(num_users=30, num_items=NUM_ITEMS, mean_length=9, seed=3))
    config = replace(CONFIG, **changes)
    pretrained = pretrained_of(split, name).cut(ranks.items.rows(split.interactions.num_items))
    distiller = Distiller(split, pretrained, config, seed=11, ranks=ranks)
    state = distiller.initial_state()
    for factor in state.factors.parameters:
        torch.nn.init.normal_(factor, 0.0, 0.8, generator=torch.Generator().manual_seed(7))
    return distiller, state


@functools.cache
def ranks_of(item_shards: int) -> Ranks:
    return grid(item_shards)


def meta_gradient(
    group: Group | None, item_shards: int, cached_limit: int | None, changes: dict[str, Any]
) -> tuple[list[Tensor], dict[str, float]]:
    before = fit.make_mixture.__kwdefaults__["cached_limit"]
    fit.make_mixture.__kwdefaults__["cached_limit"] = before if cached_limit is None else cached_limit
    try:
        distiller, state = small(ALONE if group is None else ranks_of(item_shards), **changes)
        gradients, losses = distiller.meta_gradient(state, window=(3, 5))
        return list(gradients), losses
    finally:
        fit.make_mixture.__kwdefaults__["cached_limit"] = before


VARIANTS: dict[str, tuple[bool, int | None, dict[str, Any]]] = {
    "examples, frozen": (False, None, {"item_embedding": "frozen"}),
    "examples, trained": (False, None, {}),
    "examples, a batch of one": (False, None, {"batch_size": 1}),
    "examples, dropout everywhere": (
        False,
        None,
        {"semantics": Semantics(outer_dropout=True, alignment_dropout=True, separate_passes=True)},
    ),
    "examples, cut short": (False, None, {"growth_limit": 1.2, "learner_lr": 0.1}),
    # trajectories: of as many processes or fewer each takes some, in turn; else all take examples of each
    "two trajectories": (False, None, {"trajectories": 2}),
    "three trajectories, frozen": (False, None, {"trajectories": 3, "item_embedding": "frozen"}),
    "four trajectories": (False, None, {"trajectories": 4}),
    "five trajectories, dropout everywhere": (
        False,
        None,
        {"trajectories": 5, "semantics": Semantics(outer_dropout=True, alignment_dropout=True)},
    ),
    "three trajectories, items": (True, None, {"trajectories": 3}),
    "items, frozen": (True, None, {"item_embedding": "frozen"}),
    "items, trained, cached": (True, None, {}),
    "items, trained, streamed": (True, 0, {}),
    "items, cut short": (True, None, {"growth_limit": 1.2, "learner_lr": 0.1}),
    "items, bare product": (True, None, {"normalize": "none"}),
    "items, frozen, bare product": (True, None, {"normalize": "none", "item_embedding": "frozen"}),
    "items, bias of items": (True, None, {"name": "BERT4Rec"}),
    "three trajectories, of three classes": (
        False,
        None,
        {
            "trajectories": 3,
            "other_learners": ("BERT4Rec", "NARM"),
            "item_embedding": "frozen",
            "start": "fresh",
        },
    ),
    "items, three trajectories of two classes": (
        True,
        None,
        {
            "trajectories": 3,
            "other_learners": ("BERT4Rec",),
            "item_embedding": "frozen",
            "start": "fresh",
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_meta_gradient_is_that_of_one_process(variant: str, processes: Any) -> None:
    split_items, cached_limit, changes = VARIANTS[variant]
    expected, expected_losses = meta_gradient(None, 1, cached_limit, changes)
    # of four processes two split the table, and two such pairs share out the examples
    results = processes(meta_gradient, 2 if split_items else 1, cached_limit, changes)
    for gradients, losses in results:
        assert losses == pytest.approx(expected_losses, rel=TOLERANCE)
        for a, b, first in zip(gradients, expected, results[0][0], strict=True):
            assert torch.linalg.vector_norm(a - b) <= TOLERANCE * torch.linalg.vector_norm(b)
            assert torch.equal(a, first)


def followed(group: Group, count: int) -> list[tuple[int, int, int]]:
    """Of each trajectory that this process follows: its number, its real examples, and those that are taken here."""
    distiller, state = small(ranks_of(1), trajectories=count)
    draw, make_objective = distiller.draw, distiller.follower.objective
    drawn: list[int] = []
    noted: list[tuple[int, int, int]] = []

    def note_draw(state: DistillState, trajectory: int, **options: Any) -> Any:
        drawn.append(trajectory)
        return draw(state, trajectory, **options)

    def note_objective(trajectory: Any) -> Any:
        objective = make_objective(trajectory)
        taken = sum(len(part.targets) for _, part in objective.parts)
        noted.append((drawn[-1], len(trajectory.examples), taken))
        return objective

    vars(distiller).update(draw=note_draw)
    vars(distiller.follower).update(objective=note_objective)
    distiller.meta_gradient(state, window=(3, 5))
    return noted


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_trajectories_are_dealt_out_where_they_suffice_for_all(count: int, processes: Any) -> None:
    results = processes(followed, count)
    dealt = count >= processes.size
    for rank, noted in enumerate(results):
        own = range(rank, count, processes.size) if dealt else range(count)
        assert [number for number, _, _ in noted] == list(own)
        assert all((taken == examples) == dealt for _, examples, taken in noted)
    for number in range(count):
        entries = [entry for noted in results for entry in noted if entry[0] == number]
        assert sum(taken for _, _, taken in entries) == entries[0][1]


def carried_learners(group: Group | None, count: int) -> list[Tensor]:
    """Those of all trajectories after three outer steps, the last of which starts from what the others left."""
    semantics = Semantics(reload_learner="epoch")
    distiller, state = small(ALONE if group is None else ranks_of(1), trajectories=count, semantics=semantics)
    for _ in range(3):
        distiller.outer_step(state)
    assert state.carried is not None
    return [*state.carried, *state.factors.parameters]


@pytest.mark.parametrize("count", [3, 4, 5])
def test_learners_that_are_carried_over_are_known_to_all(count: int, processes: Any) -> None:
    expected = carried_learners(None, count)
    for result in processes(carried_learners, count):
        assert len(result) == len(expected)
        for a, b in zip(result, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def whole_run(group: Group | None, item_shards: int, changes: dict[str, Any]) -> dict[str, Any]:
    ranks = ALONE if group is None else ranks_of(item_shards)
    distiller, _ = small(ranks, **changes)
    summary, state = distill(distiller.split, distiller.pretrained, distiller.config, seed=11, ranks=ranks)
    assert summary.metadata is not None
    return {
        "factors": [f.clone() for f in state.factors.parameters],
        "history": state.history,
        "items": summary.item_factors,
        "learner_config": summary.metadata.training.learner_config,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"item_embedding": "frozen"},
        {"item_embedding": "trained"},
        {"item_embedding": "frozen", "start": "fresh", "other_learners": ("BERT4Rec", "NARM")},
    ],
    ids=["frozen", "trained", "three classes"],
)
@pytest.mark.parametrize("split_items", [False, True], ids=["examples", "items"])
def test_a_whole_distillation_is_that_of_one_process(
    changes: dict[str, Any], split_items: bool, processes: Any
) -> None:
    changes = {"selection": "full", **changes}
    expected = whole_run(None, 1, changes)
    shards = processes.size if split_items else 1
    results = processes(whole_run, shards, changes)
    for result in results:
        for mine, theirs in zip(result["history"], expected["history"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-8)
        for a, b in zip(result["factors"], expected["factors"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        assert result["learner_config"] == expected["learner_config"]
    held = [result["items"] for result in results]
    assert torch.equal(torch.cat(held) if split_items else held[0], expected["items"])
    if split_items:
        assert max(map(len, held)) == -(-len(expected["items"]) // shards)


class Longest(TorchDispatchMode):
    """The longest side of any matrix, or tensor of more dimensions, that is made."""

    side = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.dim() > 1:
                self.side = max(self.side, *tensor.shape, 0)
        return made


def longest_side(group: Group | None, item_embedding: str) -> int:
    generator = np.random.default_rng(0)
    log = Interactions(
        offsets=np.arange(21, dtype=np.int64) * 6,
        items=generator.integers(1, 6000, 120, dtype=np.int32),
        item_ids=np.array(["[PAD]", *map(str, range(1, 6000))]),
        user_ids=np.array([str(user) for user in range(20)]),
        name="random",
    )
    split = leave_one_out(log)
    ranks = ALONE if group is None else ranks_of(group.size)
    pretrained = pretrained_of(split, "SASRec").cut(ranks.items.rows(6000))
    config = replace(CONFIG, item_embedding=item_embedding, selection="full")
    distiller = Distiller(split, pretrained, config, seed=11, ranks=ranks)
    with Longest() as longest:
        distiller.run()
    return longest.side


@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
def test_a_process_makes_no_tensor_longer_than_its_share_of_the_catalogue(
    item_embedding: str, processes: Any
) -> None:
    targets = 20  # of a batch, which are ranked beside the items
    assert longest_side(None, item_embedding) == 6000
    assert max(processes(longest_side, item_embedding)) <= 6000 // processes.size + targets


def refused(group: Group) -> str:
    try:
        small(ranks_of(group.size), semantics=SEMANTICS["authors"])
    except ValueError as error:
        return str(error)
    return "nothing"


def test_semantics_that_carry_tables_over_need_them_whole(processes: Any) -> None:
    assert all("do not split the item tables" in message for message in processes(refused))


def divided(group: Group) -> str:
    try:
        grid(3)
    except ValueError as error:
        return str(error)
    return "nothing"


def test_processes_that_cannot_be_divided_are_an_error(processes: Any) -> None:
    message = f"{processes.size} processes cannot split an item table over 3"
    assert all(message in result for result in processes(divided))
