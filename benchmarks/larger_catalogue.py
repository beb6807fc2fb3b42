"""What `uni100` would be if the catalogue had more rare items.

    python benchmarks/larger_catalogue.py SUMMARY DATA --more 290

The 100 negatives of a user are drawn from the items that he has not met. Where the rarest are missing from a data set
they are harder than those of the whole one, for rare items are seldom put before a target. Printed, in percent: the
metrics with the negatives as `td3-fast evaluate` draws them; their expectation over all draws, from the full ranks
(of 100 drawn out of C items of which k are before the target, a hypergeometric number is); the same with `--more`
items of which each stands before a target as often as one of the rarest `--more` that there are; and with items that
never do. The items of which there are none here are rarer than the rarest of these, so the truth lies between the
last two.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from numpy.typing import NDArray

import td3_fast
from td3_fast.data import cut_batch
from td3_fast.learners import Learner
from td3_fast.metrics import CUTOFFS, mean_and_sd
from td3_fast.ops import derive_seed
from td3_fast.training import NUM_NEGATIVES, Ranker, fresh_like, history_csr

Floats = NDArray[np.float64]
log_gamma = np.vectorize(math.lgamma, otypes=[float])


def log_binomial(n: Floats, k: Floats | int) -> Floats:
    found: Floats = log_gamma(n + 1) - log_gamma(np.asarray(k) + 1.0) - log_gamma(n - k + 1)
    return found


def expected(before: Floats, candidates: Floats) -> dict[str, float]:
    """Metrics of targets that so many of their candidates stand before, expected over draws of 100 candidates."""
    probability = []  # of x of the 100 being before the target
    for x in range(max(CUTOFFS)):
        can = (before >= x) & (candidates - before >= NUM_NEGATIVES - x)
        k, c = before[can], candidates[can]
        p = np.zeros(len(before))
        p[can] = np.exp(
            log_binomial(k, x) + log_binomial(c - k, NUM_NEGATIVES - x) - log_binomial(c, NUM_NEGATIVES)
        )
        probability.append(p.mean())
    rank = np.arange(1, max(CUTOFFS) + 1)
    worth = {"HR": np.ones(len(rank)), "NDCG": 1 / np.log2(rank + 1), "MRR": 1 / rank}
    return {
        f"{name}@{cutoff}": float((w * probability)[:cutoff].sum())
        for name, w in worth.items()
        for cutoff in CUTOFFS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="uni100 with more items in the catalogue.")
    parser.add_argument("summary")
    parser.add_argument("data")
    parser.add_argument("--more", type=int, default=290, metavar="N", help="items that are missing")
    parser.add_argument("--seeds", type=int, default=3, help="learners, those of `td3-fast evaluate`")
    options = parser.parse_args()

    summary = td3_fast.load_summary(options.summary)
    split = td3_fast.leave_one_out(td3_fast.load_interactions(options.data))
    ranker = Ranker(split.test, seed=derive_seed(0, "ranker"))
    offsets, _ = history_csr(split.test)
    candidates = (split.interactions.num_items - 1 - offsets.diff()).numpy().astype(float)
    counts = np.bincount(split.train.targets, minlength=split.interactions.num_items)
    rarest = torch.from_numpy(np.argsort(counts[1:], kind="stable")[: options.more] + 1)

    figures: dict[str, list[dict[str, float]]] = {}
    of_rare, of_all = [], []
    frozen = summary.metadata is not None and summary.metadata.training.item_embedding == "frozen"
    for run in range(options.seeds):
        seed = derive_seed(0, "run", run)
        learner = fresh_like(td3_fast.learner_for(summary), seed=seed, share_items=frozen)
        summary.fit(learner, seed=seed)
        before = ranker.ranks(learner, "full").numpy().astype(float) - 1
        of_all.append(float((before / candidates).mean()))
        rare_before = number_before(ranker, learner, rarest)
        of_rare.append(float(rare_before.mean()) / options.more)
        larger = candidates + options.more
        for name, metrics in {
            "drawn": ranker.metrics(learner)["uni100"],
            "expected": expected(before, candidates),
            "as the rarest": expected(before + rare_before, larger),
            "never before": expected(before, larger),
        }.items():
            figures.setdefault(name, []).append(metrics)

    print(f"{'':8}" + "".join(f"{name:>16}" for name in figures))
    columns = [mean_and_sd(runs) for runs in figures.values()]
    for name in columns[0]:
        cells = (f"{100 * c[name]['mean']:.2f} ± {100 * c[name]['sd']:.2f}" for c in columns)
        print(f"{name:8}" + "".join(f"{cell:>16}" for cell in cells))
    print(
        f"the last two of {options.more} items more; before a target are {100 * np.mean(of_all):.2f} % of all items, "
        f"{100 * np.mean(of_rare):.2f} % of the {options.more} rarest (at most {counts[rarest].max()} training targets)"
    )


@torch.no_grad()
def number_before(ranker: Ranker, learner: Learner, items: torch.Tensor) -> Floats:
    """How many of `items` score at least as high as each example's target."""
    table, examples = learner.item_embeddings, ranker.examples
    numbers = []
    for index in np.array_split(np.arange(len(examples)), max(1, len(examples) // 512)):
        histories, lengths, targets = cut_batch(examples, index, learner.max_len)
        hidden = learner(histories, lengths)
        of_target = (hidden * table[targets]).sum(-1, keepdim=True)
        numbers.append((hidden @ table[items].T >= of_target).sum(-1).double())
    return torch.cat(numbers).numpy()


if __name__ == "__main__":
    main()
