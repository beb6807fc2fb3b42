"""One outer step over very many items: time, peak memory, and how both grow with the number of items.

50 × 50 summary, width 64, 4096 real examples, 80 + 40 inner steps. The item table is one of 10,000 rows again and
again: the soft embeddings are then those of the short table and every log-sum-exp is larger by a constant, so with a
frozen table the meta-gradient must be that of the short one, by which each result is checked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from measuring import MIB, RESET_PEAK, forget_peak, resident
from report import Row
from torch import Tensor

from td3_fast.data import Split, generate_interactions, leave_one_out
from td3_fast.distill import Distiller
from td3_fast.distill_config import DistillConfig
from td3_fast.learners import SASRec, SASRecConfig
from td3_fast.training import Pretrained

SHORT = 10_000
WIDTH = 64
PARAMETERS = {
    # items, warm-up steps, differentiated steps
    "size": {
        "small": [(20_000, 2, 2)],
        "acceptance": [(100_000, 80, 40), (300_000, 80, 40)],
        # The last takes most of a minute a round on two cores; with a trained table minutes, and up to 16 GB.
        "full": [(100_000, 80, 40), (300_000, 80, 40), (1_000_000, 80, 40)],
    },
    "variant": ["frozen", "frozen bfloat16", "trained"],
}
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}

# by variant and steps, the number of items and the median of what was timed first
first_timed: dict[tuple[str, int], tuple[int, float]] = {}


@functools.cache
def real_examples() -> Split:
    return leave_one_out(
        generate_interactions(num_users=400, num_items=SHORT - 1, mean_length=20, seed=0, num_clusters=100)
    )


def make_distiller(num_items: int, variant: str) -> Distiller:
    item_embedding, _, item_dtype = variant.partition(" ")
    learner = SASRec(SASRecConfig(num_items=SHORT, max_len=50, hidden=WIDTH, inner=2 * WIDTH), seed=0)
    state = {name: value.detach() for name, value in learner.state_dict().items()}
    state["item_embeddings"] = state["item_embeddings"].repeat(num_items // SHORT, 1)
    pretrained = Pretrained(
        learner_name="SASRec",
        learner_config={**learner.hyperparameters(), "num_items": num_items},
        best=state,
        pool=[state],
        history=[],
        best_epoch=0,
    )
    config = DistillConfig(
        users=50,
        positions=50,
        user_rank=16,
        position_rank=16,
        batch_size=4096,
        users_per_step=25,
        summary_lr=0.03,
        learner_lr=0.005,
        item_embedding=item_embedding,  # type: ignore[arg-type]
        item_dtype=item_dtype or "float32",  # type: ignore[arg-type]
    )
    return Distiller(real_examples(), pretrained, config, seed=0)


def meta_gradient(distiller: Distiller, window: tuple[int, int]) -> tuple[Tensor, ...]:
    state = distiller.initial_state()
    for factor in state.factors.parameters:
        factor.mul_(20)
    return distiller.meta_gradient(state, window=window)[0]


def assert_is_that_of_the_short_table(
    gradients: tuple[Tensor, ...], variant: str, window: tuple[int, int]
) -> None:
    expected = meta_gradient(make_distiller(SHORT, variant), window)
    tolerance = TOLERANCE[variant.partition(" ")[2] or "float32"]
    for ours, short in zip(gradients, expected, strict=True):
        assert torch.linalg.vector_norm(ours - short) <= tolerance * torch.linalg.vector_norm(short)


def test_outer_step_over_many_items(
    benchmark: Any,
    size: tuple[int, int, int],
    variant: str,
    add_row: Callable[[Row], None],
    note: Callable[[str], None],
) -> None:
    num_items, *window = size
    steps = (window[0], window[1])
    distiller = make_distiller(num_items, variant)

    def step() -> tuple[Tensor, ...]:
        return meta_gradient(distiller, steps)

    before: list[int] = []
    setup = (lambda: before.append(forget_peak())) if RESET_PEAK.exists() else None
    benchmark.group = f"outer step, {steps[0]} + {steps[1]} inner steps, {variant} items"
    gradients = benchmark.pedantic(step, setup=setup, rounds=1 if num_items > 100_000 else 3)
    process = resident("VmHWM") if before else None
    if variant == "trained":
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
    else:
        assert_is_that_of_the_short_table(gradients, variant, steps)
    if process is not None:
        peak_mib, process_mib = (process - before[-1]) / MIB, process / MIB
        benchmark.extra_info.update(peak_mib=round(peak_mib), process_mib=round(process_mib))
        note(f"{benchmark.group}, {num_items} items: {process_mib:.0f} MiB of process memory at the peak")
    benchmark.extra_info["variant"] = f"{num_items} items"
    if not benchmark.disabled:
        median = benchmark.stats.stats.median
        add_row(Row(benchmark.group, f"{num_items} items", median, dict(benchmark.extra_info)))
        items, before = first_timed.setdefault((variant, steps[1]), (num_items, median))
        growth = (median / before) / (num_items / items)
        note(f"{benchmark.group}, {num_items} items: {growth:.2f} x what {items} items take, in proportion")
