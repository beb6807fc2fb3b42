from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from td3_fast.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from td3_fast.data import Batch, Split, cut_batch, generate_interactions, leave_one_out
from td3_fast.ensemble import Ensemble
from td3_fast.learners import FlatParameters, Learner, build_learner
from td3_fast.ops import DropoutStream
from td3_fast.pretrain import PretrainConfig, PretrainState, pretrain
from td3_fast.training import FitConfig, FitStep
from td3_fast.unroll import initial_state

CONFIG = PretrainConfig(
    fit=FitConfig(batch_size=64, max_epochs=2, learning_rate=0.01), pool_first=1, pool_last=2, ensemble=2
)


@pytest.fixture(scope="module")
def split() -> Split:
    return leave_one_out(generate_interactions(num_users=40, num_items=60, mean_length=8, seed=2))


def make(split: Split, seed: int, name: str = "SASRec") -> Learner:
    sizes = {"num_items": split.interactions.num_items, "max_len": 6, "hidden": 8}
    return build_learner(name, sizes, seed=seed)


def batch_of(split: Split) -> Batch:
    return Batch(*cut_batch(split.train, np.arange(20), 6))


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("name", ["SASRec", "GRU4Rec", "NARM"])
def test_the_loss_is_the_cross_entropy_to_the_mixed_predictions(
    split: Split, name: str, share: float
) -> None:
    taught, *others = (make(split, seed, name).double() for seed in range(3))
    flat, batch = FlatParameters(taught), batch_of(split)
    members = [(flat.gather(other.state_dict()), other.item_embeddings) for other in others]
    step = FitStep(taught, split.train, FitConfig(), ensemble=Ensemble(flat, members, share=share))
    start = (flat.gather(taught.state_dict()), taught.item_embeddings.detach().clone())
    _, loss = step(initial_state(start), batch, dropout=DropoutStream(3), seed=0)

    with torch.no_grad():
        mean = torch.stack(
            [(o(batch.histories, batch.lengths) @ o.item_embeddings.T).softmax(-1) for o in others]
        ).mean(0)
    one_hot = torch.nn.functional.one_hot(batch.targets, mean.shape[1]).to(mean)
    wanted = share * mean + (1 - share) * one_hot
    theta, items = (p.clone().requires_grad_() for p in start)
    hidden = flat.encode(
        theta, items[batch.histories], (batch.lengths - 1).unsqueeze(1), dropout=DropoutStream(3)
    )
    expected = -(wanted * (hidden.squeeze(1) @ items.T).log_softmax(-1)).sum(-1).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    gradients = torch.autograd.grad(expected, (theta, items))
    ensemble = Ensemble(flat, members, share=share)
    _, ours = flat.loss_gradient(
        *start, *batch, dropout=DropoutStream(3), cross_entropy=ensemble.cross_entropy(batch)
    )
    for mine, reference in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("taken", [1, 5, -3], ids=["first member", "second member", "the learner itself"])
def test_pretraining_continues_with_the_same_bits(split: Split, taken: int, tmp_path: Path) -> None:
    states: list[PretrainState] = []
    whole = make(split, 0)
    expected = pretrain(split, whole, CONFIG, seed=0, on_step=lambda s: states.append(copy.deepcopy(s)))
    assert [len(s.members) for s in states] == sorted(len(s.members) for s in states)
    assert len(states[-1].members) == 2
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, Checkpoint(state=states[taken], settings={}))
    state = load_checkpoint(path).state
    assert isinstance(state, PretrainState)
    found = pretrain(split, make(split, 0), CONFIG, seed=0, state=state)
    assert found.history == expected.history
    assert len(found.pool) == len(expected.pool) == 2
    for name, value in expected.best.items():
        assert torch.equal(found.best[name], value), name


def test_members_differ_and_change_what_is_learned(split: Split) -> None:
    states: list[PretrainState] = []
    taught = pretrain(split, make(split, 0), CONFIG, seed=0, on_step=states.append)
    first, second = states[-1].members
    assert not torch.equal(first[1], second[1])
    alone = pretrain(split, make(split, 0), replace(CONFIG, ensemble=0), seed=0)
    assert not torch.equal(taught.best["item_embeddings"], alone.best["item_embeddings"])


def test_settings_are_those_of_before_where_there_is_no_ensemble() -> None:
    assert "ensemble" not in PretrainConfig().settings()
    assert CONFIG.settings()["ensemble"] == 2
    assert CONFIG.settings()["ensemble_share"] == 0.5


def test_what_cannot_be_taught_is_refused(split: Split) -> None:
    with pytest.raises(ValueError, match="a BERT4Rec is trained on more than that"):
        pretrain(split, make(split, 0, "BERT4Rec"), CONFIG, seed=0)
    with pytest.raises(ValueError, match="teaches all items"):
        replace(CONFIG, fit=replace(CONFIG.fit, loss="sampled"))
    with pytest.raises(ValueError, match="at least 0"):
        replace(CONFIG, ensemble=-1)
    flat = FlatParameters(make(split, 0))
    with pytest.raises(ValueError, match="at least one member"):
        Ensemble(flat, [], share=0.5)
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        Ensemble(flat, [(torch.zeros(1), torch.zeros(1, 1))], share=0.0)
