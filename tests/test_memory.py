"""The plan of memory: true to what a distillation takes, and obeyed by it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_unroll import small_distiller

from td3_fast.cli_data import parse_bytes
from td3_fast.data import Split, generate_interactions, leave_one_out
from td3_fast.distill_config import DistillConfig
from td3_fast.live_bytes import LiveBytes
from td3_fast.memory import MIB, MemoryLimitError, MemoryPlan, in_words, plan_memory

NEEDS_PROC = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc"
)
MEASURE = Path(__file__).parents[1] / "benchmarks" / "plan_of_memory.py"
CONFIG = DistillConfig(
    users=10, positions=10, user_rank=4, position_rank=4, batch_size=1024, users_per_step=5, summary_lr=0.03,
    learner_lr=0.01, inner_steps=60, window=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def split() -> Split:
    return leave_one_out(generate_interactions(num_users=100, num_items=80, mean_length=30, seed=1))


def planned(split: Split, config: DistillConfig, *, items: int = 100_000, pool: int = 1) -> MemoryPlan:
    sizes = {"num_items": items, "max_len": 20, "hidden": 32}
    return plan_memory(split, config, learner_name="SASRec", learner_config=sizes, pool=pool)


def test_tensors_are_followed_from_birth_to_death() -> None:
    before = torch.zeros(1000, requires_grad=True)
    with LiveBytes() as live:
        assert before.view(10, 100).shape == (10, 100)
        assert live.now == 0
        product = before * 2
        loss = product.exp().sum()
        assert live.now == 4000 + 4000 + 4
        (gradient,) = torch.autograd.grad(loss, before)
        assert live.peak >= live.now
        del product, loss, gradient
        assert live.now == 0
        assert live.peak >= 12_000


@NEEDS_PROC
@pytest.mark.parametrize(
    "case",
    [
        # tables of 38 MB, of which every third adjoint state is kept
        "--items 150000 --hidden 64 --size 4x5 --users-per-step 2 --batch-size 256 --window 9 --warm-up 0 --users 50",
        # probabilities that are kept
        "--items 20000 --size 50x50 --users-per-step 25 --batch-size 256 --window 6 --warm-up 2 --users 50",
        "--items 250000 --hidden 64 --size 4x5 --users-per-step 2 --batch-size 128 --window 3 --warm-up 0 --users 50 "
        "--item-embedding frozen --pool 3",
        # what a window keeps, with what kernels need for a moment in between
        "--item-embedding frozen --learner BERT4Rec --window 60 --batch-size 256 --users 50",
        "--item-embedding frozen --other-learners BERT4Rec,GRU4Rec,NARM --items 150000 --hidden 64 --size 10x20 "
        "--users-per-step 5 --batch-size 256 --window 10 --warm-up 0 --users 50 --steps 4",
    ],
    ids=["trained", "probabilities", "frozen", "a long window", "four classes"],
)
def test_the_plan_is_within_15_percent_of_the_peak(case: str) -> None:
    figures = measured(case)
    assert figures["planned"] == pytest.approx(figures["peak"], rel=0.15)


@NEEDS_PROC
def test_scores_of_every_target_are_planned_for() -> None:
    figures = measured(
        "--items 5000 --middle-positions 12 --window 30 --warm-up 0 --batch-size 256 --users 50"
    )
    # blocks of scores are reused whole, where the plan takes some of every block for lost
    assert figures["peak"] <= figures["planned"] <= 1.35 * figures["peak"]


def measured(case: str) -> Any:
    command = [sys.executable, str(MEASURE), *case.split(), "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_parts_add_up(split: Split) -> None:
    plan = planned(split, CONFIG)
    assert plan.total == sum(plan.parts.values()) == max(plan.moments.values())
    assert "MiB" in " ".join(plan.lines())
    assert plan.moment in " ".join(plan.lines())


def test_a_frozen_table_needs_no_adjoint_of_it(split: Split) -> None:
    trained, frozen = (planned(split, replace(CONFIG, item_embedding=kind)) for kind in ("trained", "frozen"))
    table = 100_000 * 32 * 4
    assert trained.total - frozen.total > 20 * table
    assert "streamed" in frozen.kept


def test_trajectories_take_no_more_than_one(split: Split) -> None:
    one, many = (planned(split, replace(CONFIG, trajectories=count)) for count in (1, 16))
    assert many.total == one.total


def test_a_limit_is_kept_by_the_cheapest_means(split: Split) -> None:
    many = replace(CONFIG, users=60)  # whose probabilities are worth the memory of making them anew
    usual = planned(split, many)
    limit = usual.total
    seen = [usual]
    while True:
        limit = int(limit * 0.85)
        try:
            plan = planned(split, replace(many, memory_limit=limit))
        except MemoryLimitError:
            break
        assert plan.total <= limit
        seen.append(plan)
    assert seen[0].limits.micro_batch == 1024
    assert any(plan.limits.kept_states == 0 and plan.limits.cached_probabilities for plan in seen)
    assert seen[-1].limits.cached_probabilities == 0
    assert seen[-1].limits.kept_states == 0
    assert seen[-1].total < 0.6 * usual.total


def test_a_larger_limit_is_used(split: Split) -> None:
    many = replace(CONFIG, users=200, positions=20)
    usual = planned(split, many)
    assert "streamed" in usual.kept
    assert usual.all_kept is not None
    assert in_words(usual.all_kept) in " ".join(usual.lines())
    large = planned(split, replace(many, memory_limit=usual.all_kept))
    assert large.total == usual.all_kept
    assert "probabilities kept, real" in large.kept
    assert planned(split, replace(many, memory_limit=usual.all_kept - 1)).kept != large.kept
    assert planned(split, replace(CONFIG, item_embedding="frozen")).all_kept is None


@pytest.mark.parametrize(
    ("changes", "pool", "words"),
    [
        ({}, 1, "--item-embedding frozen"),
        ({}, 60, "for pretrained learner and its pool.*pool"),
        ({"item_embedding": "frozen"}, 1, "libraries.*raise the limit"),
    ],
)
def test_too_small_a_limit_names_part_and_remedy(
    split: Split, changes: dict[str, str], pool: int, words: str
) -> None:
    with pytest.raises(MemoryLimitError, match=words):
        planned(split, replace(CONFIG, memory_limit=40 * MIB, **changes), pool=pool)


@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
def test_the_least_that_is_said_to_work_does(split: Split, item_embedding: Any) -> None:
    config = replace(CONFIG, item_embedding=item_embedding, memory_limit=2**10)
    with pytest.raises(MemoryLimitError, match="a memory limit of 1 KiB is too small") as refused:
        planned(split, config)
    said = re.search(r"the least that works is ([\d,]+) MiB", str(refused.value))
    assert said is not None
    least = int(said[1].replace(",", "")) * MIB
    assert planned(split, replace(config, memory_limit=least + MIB)).total <= least + MIB
    with pytest.raises(MemoryLimitError):
        planned(split, replace(config, memory_limit=least - MIB))


def test_a_limit_goes_with_a_table_of_16_bits() -> None:
    half, state = small_distiller(item_embedding="frozen", item_dtype="bfloat16", memory_limit=2**40)
    assert half.items.dtype == torch.bfloat16
    half.meta_gradient(state, window=(3, 5))


def test_a_distillation_obeys_its_plan() -> None:
    free, state = small_distiller()
    bound, _ = small_distiller(memory_limit=free_total() - 1)
    assert bound.limits != free.limits
    assert bound.limits.micro_batch < free.limits.micro_batch or bound.limits.kept_states == 0
    (ours, losses), (theirs, other) = (d.meta_gradient(state, window=(3, 5)) for d in (bound, free))
    assert losses["loss"] == pytest.approx(other["loss"], rel=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def free_total() -> int:
    distiller, _ = small_distiller()
    pretrained = distiller.pretrained
    return plan_memory(
        distiller.split,
        distiller.config,
        learner_name=pretrained.learner_name,
        learner_config=pretrained.learner_config,
        pool=len(pretrained.pool),
        dtype=torch.float64,
    ).total


def test_data_without_an_example_are_refused() -> None:
    log = generate_interactions(seed=0, num_users=20, num_items=30, mean_length=3, min_length=3)
    with pytest.raises(ValueError, match="no training example"):
        planned(leave_one_out(log), CONFIG)


def test_the_other_engine_is_not_planned(split: Split) -> None:
    with pytest.raises(ValueError, match='use engine="native"'):
        planned(split, replace(CONFIG, engine="higher"))
    with pytest.raises(ValueError, match='asks for engine="native"'):
        replace(CONFIG, engine="higher", memory_limit=2**30)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2**31), ("512 MiB", 2**29), ("1.5GB", 1_500_000_000), ("4096", 4096), ("1k", 1000)],
)
def test_sizes_of_memory(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "two", "-1GiB", "1 XB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="2GiB"):
        parse_bytes(text)
