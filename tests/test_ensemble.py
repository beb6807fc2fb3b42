"""Learners that teach another one: the loss, going on after a stop, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from td3_fast.checkpoint import Checkpoint, load_checkpoint, load_pretrained, save_checkpoint
from td3_fast.cli import app
from td3_fast.data import (
    Batch,
    Split,
    cut_batch,
    generate_interactions,
    leave_one_out,
    write_interactions,
)
from td3_fast.ensemble import Ensemble
from td3_fast.learners import FlatParameters, Learner, build_learner
from td3_fast.ops import DropoutStream
from td3_fast.pretrain import PretrainConfig, PretrainState, pretrain
from td3_fast.recipes import recipe_named
from td3_fast.report import read_json_lines
from td3_fast.run import Run
from td3_fast.run_folder import LOG, PRETRAINED, Stopped, Watcher
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
        *start, *batch, dropout=DropoutStream(3), cross_entropy=ensemble.loss_of(batch)
    )
    for mine, reference in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("members", "epoch", "batch"),
    [(0, 1, 1), (0, 2, 0), (1, 0, 1), (1, 2, 0), (2, 1, 2)],
    ids=["first", "first trained", "second", "second trained", "the learner itself"],
)
def test_pretraining_continues_with_the_same_bits(
    split: Split, members: int, epoch: int, batch: int, tmp_path: Path
) -> None:
    states: list[PretrainState] = []
    whole = make(split, 0)
    expected = pretrain(split, whole, CONFIG, seed=0, on_step=lambda s: states.append(copy.deepcopy(s)))
    (taken,) = (s for s in states if (len(s.members), s.fit.epoch, s.fit.batch) == (members, epoch, batch))
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, Checkpoint(state=taken, settings={}))
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
    with pytest.raises(
        ValueError, match="BERT4Rec is trained on more than that: choose SASRec, GRU4Rec or NARM"
    ):
        pretrain(split, make(split, 0, "BERT4Rec"), CONFIG, seed=0)
    with pytest.raises(ValueError, match="teaches all items"):
        replace(CONFIG, fit=replace(CONFIG.fit, loss="sampled"))
    with pytest.raises(ValueError, match="at least 0"):
        replace(CONFIG, ensemble=-1)
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        replace(CONFIG, ensemble_share=1.5)
    flat = FlatParameters(make(split, 0))
    with pytest.raises(ValueError, match="at least one member"):
        Ensemble(flat, [], share=0.5)
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        Ensemble(flat, [(torch.zeros(1), torch.zeros(1, 1))], share=0.0)


@pytest.mark.parametrize("steps", [3, 8, 9, 14, 20])
def test_a_stopped_run_goes_on_with_the_same_log(split: Split, tmp_path: Path, steps: int) -> None:
    tiny = recipe_named("synthetic").sized("6x6")
    recipe = replace(tiny, pretrain=CONFIG, learner={"max_len": 6, "hidden": 8, "inner": 8})

    def run(folder: Path, stop: Callable[[], bool] = lambda: False) -> None:
        common = {"split": split, "recipe": recipe, "seed": 0, "source": "toy"}
        Run(folder=folder, watcher=Watcher(stop=stop), **common).pretrained()

    def log(folder: Path) -> list[dict[str, object]]:
        return [{k: v for k, v in entry.items() if k != "seconds"} for entry in read_json_lines(folder / LOG)]

    run(tmp_path / "whole")
    left = iter(range(steps))
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", lambda: next(left, None) is None)
    # what lies after the checkpoint is done again
    with (tmp_path / "stopped" / LOG).open("a") as file:
        file.write('{"event": "pretrain", "epoch": 2}\n')
    run(tmp_path / "stopped")
    assert log(tmp_path / "stopped") == log(tmp_path / "whole")
    assert [entry.get("member") for entry in log(tmp_path / "whole")] == [0, 0, 1, 1, None, None]
    ours, theirs = (load_pretrained(tmp_path / which / PRETRAINED)[0] for which in ("stopped", "whole"))
    for name, value in theirs.best.items():
        assert torch.equal(ours.best[name], value), name


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        ("--pretrained some.safetensors", "exclude each other"),
        ("--recipe ciao", "--loss full --optimiser adam"),
        ("--learner BERT4Rec", "choose SASRec, GRU4Rec or NARM"),
    ],
)
def test_the_command_refuses_before_it_makes_a_folder(words: str, refusal: str, tmp_path: Path) -> None:
    data, out = tmp_path / "toy.inter", tmp_path / "out"
    write_interactions(generate_interactions(num_users=20, num_items=20, mean_length=6, seed=0), data)
    (tmp_path / "some.safetensors").touch()
    words = words.replace("some", str(tmp_path / "some"))
    result = CliRunner().invoke(
        app, ["distill", str(data), "--ensemble", "1", *words.split(), "--out", str(out)]
    )
    assert result.exit_code == 2
    assert refusal in result.stderr
    assert not out.exists()
