import math

import pytest
import torch

from td3_fast.metrics import mean_and_sd, metrics_from_ranks, recovery


def test_metrics_equal_those_worked_by_hand():
    # ranks 1, 2, 3, 11: gains 1, 1/log2(3), 1/2, 1/log2(12) and reciprocal ranks 1, 1/2, 1/3, 1/11
    metrics = metrics_from_ranks(torch.tensor([11, 1, 3, 2]), cutoffs=(1, 5, 20))
    expected = {
        "HR@1": 0.25,
        "NDCG@1": 0.25,
        "MRR@1": 0.25,
        "HR@5": 0.75,
        "NDCG@5": (1 + 0.6309297535714574 + 0.5) / 4,
        "MRR@5": (1 + 1 / 2 + 1 / 3) / 4,
        "HR@20": 1.0,
        "NDCG@20": (1 + 0.6309297535714574 + 0.5 + 0.2789429456511298) / 4,
        "MRR@20": (1 + 1 / 2 + 1 / 3 + 1 / 11) / 4,
    }
    assert metrics == pytest.approx(expected, abs=1e-15)


def test_a_rank_at_the_cutoff_counts_and_the_next_one_does_not():
    metrics = metrics_from_ranks(torch.tensor([10, 11]), cutoffs=(10,))
    assert metrics == pytest.approx({"HR@10": 1 / 2, "NDCG@10": 0.5 / math.log2(11), "MRR@10": 1 / 20})


def test_default_cutoffs_are_5_10_20_and_order_of_examples_does_not_matter():
    ranks = torch.randint(1, 30, (1000,))
    metrics = metrics_from_ranks(ranks)
    assert list(metrics) == [f"{name}@{k}" for k in (5, 10, 20) for name in ("HR", "NDCG", "MRR")]
    assert metrics_from_ranks(ranks.flip(0)) == pytest.approx(metrics, rel=1e-12)


@pytest.mark.parametrize(
    ("ranks", "fault"),
    [
        (torch.empty(0, dtype=torch.int64), "no ranks"),
        (torch.tensor([1, 0]), "start at 1"),
        (torch.tensor([1.0]), "integers"),
        (torch.tensor([True]), "integers"),
        (torch.tensor([[1]]), "shape"),
    ],
)
def test_what_is_not_a_list_of_ranks_is_refused(ranks, fault):
    with pytest.raises(ValueError, match=fault):
        metrics_from_ranks(ranks)


def test_a_cutoff_below_1_is_refused():
    with pytest.raises(ValueError, match="cut-offs"):
        metrics_from_ranks(torch.tensor([1]), cutoffs=(0,))


@pytest.mark.parametrize(("ddof", "sd"), [(1, 2.0), (0, math.sqrt(8 / 3))])
def test_mean_and_sd_equal_those_worked_by_hand(ddof, sd):
    runs = [{"HR@5": 2.0}, {"HR@5": 4.0}, {"HR@5": 6.0}]
    assert mean_and_sd(runs, ddof=ddof) == {"HR@5": {"mean": 4.0, "sd": pytest.approx(sd)}}


def test_one_run_has_no_spread():
    assert mean_and_sd([{"HR@5": 0.3}]) == {"HR@5": {"mean": 0.3, "sd": 0.0}}


@pytest.mark.parametrize("runs", [[], [{"HR@5": 1.0}, {"HR@10": 1.0}]])
def test_runs_that_cannot_be_summed_up_are_refused(runs):
    with pytest.raises(ValueError, match="run"):
        mean_and_sd(runs)


def test_recovery_is_the_share_of_the_gain_and_none_without_one():
    summary = {"HR@5": 0.6, "MRR@5": 0.9, "NDCG@5": 0.3, "HR@10": 0.1}
    control = {"HR@5": 0.5, "MRR@5": 0.2, "NDCG@5": 0.4, "HR@10": 0.3}
    full = {"HR@5": 0.7, "MRR@5": 0.2, "NDCG@5": 0.6, "HR@10": 0.2}
    assert recovery(summary, control, full) == {
        "HR@5": pytest.approx(0.5),
        "MRR@5": None,
        "NDCG@5": pytest.approx(-0.5),
        "HR@10": None,  # on the way down there is nothing to recover
    }


def test_recovery_of_different_metrics_is_refused():
    with pytest.raises(ValueError, match="same metrics"):
        recovery({"HR@5": 1.0}, {"HR@5": 1.0}, {"HR@10": 1.0})
