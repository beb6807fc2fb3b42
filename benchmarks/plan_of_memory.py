"""Peak memory of a distillation beside what was planned for it.

    python benchmarks/plan_of_memory.py --items 200000 --hidden 64 --size 10x10 --pool 2

pretends to have pretrained a learner, takes an outer step or more, validates, and prints the plan and how far resident
memory rose above that of the process with the package imported and the data made. Linux alone tells.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import torch
from measuring import MIB, forget_peak, resident

from td3_fast import evaluate, memory  # noqa: F401  (imported, so that they are not counted)
from td3_fast.data import generate_interactions, leave_one_out
from td3_fast.distill import Distiller, for_item_embedding
from td3_fast.learners import build_learner
from td3_fast.memory import plan_memory
from td3_fast.recipes import recipe_named
from td3_fast.training import Pretrained

MOST_ITEMS = 2000


def pretend(name: str, sizes: dict[str, int], pool: int) -> Pretrained:
    """A learner with a pool of copies."""
    state = {k: v.detach() for k, v in build_learner(name, sizes, seed=0).state_dict().items()}
    copies = [{k: v.clone() for k, v in state.items()} for _ in range(pool)] if pool > 1 else [state]
    return Pretrained(
        learner_name=name, learner_config=sizes, best=state, pool=copies, history=[], best_epoch=0
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of a distillation beside the plan.")
    parser.add_argument("--items", type=int, default=1682)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--size", default="50x50")
    parser.add_argument("--item-embedding", default="trained", choices=["trained", "frozen"])
    parser.add_argument("--learner", default="SASRec")
    parser.add_argument("--other-learners", default="", help="names, separated by commas; they start fresh")
    parser.add_argument("--pool", type=int, default=1)
    parser.add_argument("--users", type=int, default=300, help="of the log")
    parser.add_argument("--users-per-step", type=int, default=25)
    parser.add_argument("--middle-positions", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the window")
    parser.add_argument("--window", type=int, default=40)
    parser.add_argument("--steps", type=int, default=1, help="outer steps")
    parser.add_argument("--memory-limit", type=int, help="MiB")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()

    # the learner's table is as long as asked for, whether all its items occur or not
    log = generate_interactions(
        num_users=given.users, num_items=min(given.items, MOST_ITEMS), mean_length=100, seed=0
    )
    split = leave_one_out(log)
    recipe = recipe_named("ml-100k").with_learner(given.learner).sized(given.size)
    sizes = {**recipe.learner, "num_items": given.items + 1, "hidden": given.hidden}
    config = replace(
        recipe.distill,
        item_embedding=given.item_embedding,
        users_per_step=given.users_per_step,
        middle_positions=given.middle_positions,
        batch_size=given.batch_size,
        window=given.window,
        inner_steps=given.warm_up + given.window,
        other_learners=tuple(filter(None, given.other_learners.split(","))),
        start="fresh" if given.other_learners else "pool",
        memory_limit=None if given.memory_limit is None else given.memory_limit * MIB,
    )
    before = forget_peak()
    plan = plan_memory(split, config, learner_name=given.learner, learner_config=sizes, pool=given.pool)
    pretrained = for_item_embedding(pretend(given.learner, sizes, given.pool), config)
    forget_peak()  # what making it up took
    distiller = Distiller(split, pretrained, config, seed=0)
    state = distiller.initial_state()
    for _ in range(given.steps):
        distiller.outer_step(state)
    stepped = resident("VmHWM") - before
    distiller.validation.metrics(distiller.summary(state.factors.parameters), state, epoch=1)
    peak = resident("VmHWM") - before
    if given.json:
        print(json.dumps({"planned": plan.total, "peak": peak, "stepped": stepped}))
        return
    print(f"peak {peak / MIB:.0f} MiB, {stepped / MIB:.0f} up to validation; planned {plan.total / MIB:.0f}")
    for line in plan.lines():
        print("  ", line)
    print("  ", {moment: f"{size / MIB:.0f}" for moment, size in plan.moments.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
