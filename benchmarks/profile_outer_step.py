"""Where the time of an outer step goes: `python benchmarks/profile_outer_step.py ml-100k`, with `--device cpu` there.

The sizes of a recipe, or as many items as a number says (width 64, frozen, of which only the whole is timed). 160 + 40
inner steps. Prints medians of whole steps, of their parts with the host waiting after each, and the kernels that take
longest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from outer_step_problem import make_distiller, spread_state
from test_large_items import make_distiller as make_distiller_of_many

from td3_fast.data import generate_interactions, leave_one_out
from td3_fast.distill import Distiller
from td3_fast.recipes import recipe_named
from td3_fast.unroll import initial_state

WINDOW = (160, 40)
SIZES = {
    "ml-100k": {"num_users": 943, "num_items": 1682, "mean_length": 106},
    "ml-1m": {"num_users": 6040, "num_items": 3416, "mean_length": 165},
}
Result = TypeVar("Result")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Result], device: torch.device, rounds: int) -> tuple[float, Result]:
    """The median in milliseconds, and what was returned last."""
    seconds = []
    for _ in range(rounds):
        wait(device)
        start = time.perf_counter()
        result = run()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds), result


def distiller_of(sizes: str, embedding: str, trajectories: int, device: torch.device) -> Distiller:
    """Of a recipe's sizes, or of a number of items."""
    if sizes not in SIZES:
        many = make_distiller_of_many(int(sizes), embedding)
        config = replace(many.config, trajectories=trajectories)
        return Distiller(many.split, many.pretrained.to(device), config, seed=0)
    split = leave_one_out(generate_interactions(seed=0, **SIZES[sizes]))
    recipe = recipe_named(sizes).sized("50x50")
    config = replace(recipe.distill, item_embedding=embedding, trajectories=trajectories)
    return make_distiller(split, config, recipe.learner, device=str(device))


def print_parts(distiller: Distiller, state: Any, device: torch.device, rounds: int) -> None:
    follower = distiller.follower
    trajectory = replace(distiller.draw(state), warm_up=WINDOW[0], differentiated=WINDOW[1])
    factors = [factor.detach() for factor in state.factors.parameters]
    times = {}
    times["soft embeddings"], (_, mixture) = timed(lambda: distiller._mixture(factors), device, rounds)
    times["inputs of the steps"], loop = timed(
        lambda: follower._engine(trajectory, mixture, 0), device, rounds
    )
    start = initial_state(trajectory.start)
    items = follower.items

    def run_window() -> Any:
        return loop.run_window(start._replace(step=WINDOW[0]), items, mixture, until=sum(WINDOW))

    times["warm-up"], _ = timed(lambda: loop.run(start, items, mixture, until=WINDOW[0]), device, rounds)
    times["window"], (learner, window) = timed(run_window, device, rounds)
    times["real examples cut"], objective = timed(lambda: follower.objective(trajectory), device, rounds)
    times["outer gradient"], (_, _, cotangents) = timed(
        lambda: objective.gradient(follower.flat, learner.parameters, items), device, rounds
    )

    def pull_back() -> Any:
        # on the CPU a window is emptied on the way, and its cotangents are overwritten
        kept = window if device.type == "cuda" else run_window()[1]
        return loop.pull_back(kept, tuple(c.clone() for c in cotangents), mixture)

    times["window backwards"], _ = timed(pull_back, device, rounds)
    if device.type != "cuda":
        times["window backwards"] -= times["window"]
    print("  " + ", ".join(f"{name} {ms:.2f}" for name, ms in times.items()) + " ms")
    if device.type == "cuda":
        for name, part in (
            ("window", run_window),
            ("backwards", pull_back),
        ):
            print_kernels(name, part)


def print_kernels(name: str, part: Callable[[], object]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        part()
        torch.cuda.synchronize()
    events: list[Any] = list(profile.key_averages())
    total = sum(event.self_device_time_total for event in events) / 1e3
    print(f"  {name}: {sum(event.count for event in events)} kernels, {total:.2f} ms")
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:10]:
        print(f"    {event.count:5d} {event.self_device_time_total / 1e3:8.3f} ms {event.key[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", help="ml-100k, ml-1m or a number of items, of whole ten thousands")
    parser.add_argument(
        "--item-embedding", default="frozen", choices=["frozen", "frozen bfloat16", "trained"]
    )
    parser.add_argument("--trajectories", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    distiller = distiller_of(arguments.sizes, arguments.item_embedding, arguments.trajectories, device)
    state = spread_state(distiller)
    first, _ = timed(lambda: distiller.meta_gradient(state, window=WINDOW), device, 1)
    whole, _ = timed(lambda: distiller.meta_gradient(state, window=WINDOW), device, arguments.rounds)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else float("nan")
    print(
        f"{arguments.sizes}, {arguments.item_embedding} items, {arguments.trajectories} trajectories: "
        f"{whole:.1f} ms an outer step, the first {first:.0f} ms, {peak:.0f} MiB at the peak"
    )
    if arguments.sizes in SIZES and arguments.trajectories == 1:
        print_parts(distiller, state, device, arguments.rounds)


if __name__ == "__main__":
    main()
