"""Memory of each process in an outer step whose item tables are split over all of them.

    python benchmarks/memory_per_process.py frozen
    torchrun --standalone --nproc-per-node 2 benchmarks/memory_per_process.py frozen

prints for each process the MiB of the item table that it holds, and how far resident memory rose at its highest above
that before the table was made. Loss and norm of the meta-gradient show that it is the same step. Linux alone tells.
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext

import numpy as np
import torch
from measuring import MIB, forget_peak, resident

from td3_fast.data import Interactions, leave_one_out
from td3_fast.distill import Distiller
from td3_fast.distill_config import DistillConfig
from td3_fast.learners import build_learner
from td3_fast.parallel import ALONE, Ranks, is_launched, join
from td3_fast.training import Pretrained


def table(num_items: int, width: int, rows: slice) -> torch.Tensor:
    """These rows of a random table, the same however it is cut."""
    made = torch.empty(rows.stop - rows.start, width)
    for row in range(rows.start, rows.stop):
        made[row - rows.start].normal_(0.0, 0.1, generator=torch.Generator().manual_seed(row))
    return made


def log_of(num_items: int, *, num_users: int = 300, length: int = 20) -> Interactions:
    """A random log in which not every item occurs."""
    generator = np.random.default_rng(0)
    ids = np.array(["[PAD]", *map(str, range(1, num_items))])
    return Interactions(
        offsets=np.arange(num_users + 1, dtype=np.int64) * length,
        items=generator.integers(1, num_items, num_users * length, dtype=np.int32),
        item_ids=ids,
        user_ids=np.array([str(user) for user in range(num_users)]),
        name="random",
    )


def measure(ranks: Ranks, given: argparse.Namespace) -> list[float]:
    """Loss, norm of the meta-gradient, MiB of the item table, MiB at the peak of an outer step."""
    split = leave_one_out(log_of(given.num_items))
    config = DistillConfig(
        users=50,
        positions=50,
        user_rank=16,
        position_rank=16,
        batch_size=512,
        users_per_step=25,
        summary_lr=0.03,
        learner_lr=0.005,
        inner_steps=given.steps,
        window=given.window,
        item_embedding=given.item_embedding,
    )
    before = forget_peak()
    rows = ranks.items.rows(given.num_items)
    sizes = {"num_items": rows.stop - rows.start, "max_len": 50, "hidden": given.width}
    # of one item, so that the encoder is drawn alike however the table is cut
    state = build_learner("SASRec", {**sizes, "num_items": 1}, seed=0).state_dict()
    state["item_embeddings"] = table(given.num_items, given.width, rows)
    pretrained = Pretrained(
        learner_name="SASRec", learner_config=sizes, best=state, pool=[state], history=[], best_epoch=0
    )
    distiller = Distiller(split, pretrained, config, seed=0, ranks=ranks)
    warm_up = given.steps - given.window
    gradients, losses = distiller.meta_gradient(distiller.initial_state(), window=(warm_up, given.window))
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    return [losses["loss"], norm, state["item_embeddings"].nbytes / MIB, (resident("VmHWM") - before) / MIB]


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of each process in an outer step.")
    parser.add_argument("item_embedding", choices=["frozen", "trained"])
    parser.add_argument("--num-items", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--window", type=int, default=8)
    given = parser.parse_args()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    launched = is_launched(os.environ)
    with join(item_shards=size) if launched else nullcontext(ALONE) as ranks:
        measured = ranks.everyone.stack(torch.tensor(measure(ranks, given), dtype=torch.float64))
    if not ranks.first:
        return
    print(f"{given.num_items:,} items x {given.width}, table {given.item_embedding}, {size} process(es)")
    for rank, (loss, norm, held, peak) in enumerate(measured.tolist()):
        print(
            f"  process {rank}: loss {loss:.6f}, |gradient| {norm:.6g}; table {held:.1f} MiB, peak {peak:.0f} MiB"
        )


if __name__ == "__main__":
    main()
