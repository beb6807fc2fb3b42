"""Checkpoints: the same state comes back, bit for bit, and nothing else is taken for one."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from td3_fast.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_settings,
    describe_pretrained,
    differences,
    load_checkpoint,
    load_item_factors,
    load_learner,
    load_pretrained,
    save_checkpoint,
    save_learner,
    save_pretrained,
)
from td3_fast.data import Split, generate_interactions, leave_one_out
from td3_fast.distill import distill
from td3_fast.distill_config import SEMANTICS, DistillConfig, with_semantics
from td3_fast.distill_state import DistillState
from td3_fast.learners import SASRec, SASRecConfig, build_learner
from td3_fast.pretrain import PretrainConfig, PretrainState, pretrain
from td3_fast.training import FitConfig, FitState, Pretrained
from td3_fast.unroll import initial_state

CONFIG = DistillConfig(
    users=6, positions=8, user_rank=3, position_rank=3, batch_size=128, users_per_step=4, summary_lr=0.03,
    learner_lr=0.01, epochs=2, inner_steps=6, window=3,
)  # fmt: skip
PRETRAIN = PretrainConfig(
    fit=FitConfig(batch_size=100, max_epochs=4, learning_rate=0.01), pool_first=2, pool_last=3
)
SETTINGS = {"data": "abc", "distill": {"epochs": 30, "semantics": {"shuffle": True}}}


@pytest.fixture(scope="module")
def split() -> Split:
    return leave_one_out(generate_interactions(num_users=40, num_items=30, mean_length=9, seed=1))


def learner(split: Split) -> SASRec:
    sizes = {"max_len": 8, "hidden": 8, "inner": 8}
    return SASRec(SASRecConfig(num_items=split.interactions.num_items, **sizes), seed=0)


@pytest.fixture(scope="module")
def pretrain_states(split: Split) -> list[PretrainState]:
    states: list[PretrainState] = []
    pretrain(
        split, learner(split), PRETRAIN, seed=0, on_step=lambda state: states.append(copy.deepcopy(state))
    )
    return states


@pytest.fixture(scope="module")
def pretrained(split: Split) -> Pretrained:
    return pretrain(split, learner(split), PRETRAIN, seed=0)


def through_a_file(folder: Path, state: Any) -> Any:
    save_checkpoint(folder / "checkpoint.safetensors", Checkpoint(state=state, settings=SETTINGS))
    return load_checkpoint(folder / "checkpoint.safetensors").state


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    if hasattr(a, "__dict__"):
        return type(a) is type(b) and equal(vars(a), vars(b))
    return bool(a == b)


def test_pretraining_goes_on_from_a_file_with_the_same_bits(
    split: Split, pretrain_states: list[PretrainState], pretrained: Pretrained, tmp_path: Path
) -> None:
    batches = len(pretrain_states) // 4
    for at in (0, batches - 1, batches, 2 * batches, len(pretrain_states) - 1):
        state = through_a_file(tmp_path, pretrain_states[at])
        assert equal(state, pretrain_states[at])
        assert equal(pretrain(split, learner(split), PRETRAIN, seed=0, state=state), pretrained)


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_distillation_goes_on_from_a_file_with_the_same_bits(
    split: Split, pretrained: Pretrained, semantics: Any, tmp_path: Path
) -> None:
    config = with_semantics(CONFIG, semantics)
    states: list[DistillState] = []
    summary, whole = distill(
        split, pretrained, config, seed=5, on_step=lambda state: states.append(copy.deepcopy(state))
    )
    for taken in states:
        state = through_a_file(tmp_path, taken)
        assert equal(state, taken)
        again, resumed = distill(split, pretrained, config, seed=5, state=state)
        assert equal(resumed, whole)
        assert equal(again.state_dict(), summary.state_dict())


def test_a_pretrained_learner_comes_back(pretrained: Pretrained, split: Split, tmp_path: Path) -> None:
    path = tmp_path / "pretrained.safetensors"
    save_pretrained(path, pretrained, SETTINGS)
    loaded, settings = load_pretrained(path)
    described = describe_pretrained(path)
    assert described == (loaded.learner_name, loaded.learner_config, len(loaded.pool), settings)
    assert settings == SETTINGS
    assert equal(loaded, pretrained)
    summary, _ = distill(split, pretrained, CONFIG, seed=1)
    again, _ = distill(split, loaded, CONFIG, seed=1)
    assert torch.equal(summary.core, again.core)


def test_only_the_rows_asked_for_come_back(pretrained: Pretrained, tmp_path: Path) -> None:
    path = tmp_path / "p"
    save_pretrained(path, pretrained, SETTINGS)
    loaded, settings = load_pretrained(path, items=slice(7, 19))
    assert settings == SETTINGS
    assert equal(loaded, pretrained.cut(slice(7, 19)))
    assert loaded.learner().item_embeddings.shape == (12, 8)
    assert torch.equal(load_item_factors(path), pretrained.best["item_embeddings"])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_pretrained(path, items=slice(7, 19))
    save_checkpoint(
        path,
        Checkpoint(
            state=PretrainState(fit=FitState(optimiser=initial_state(()), best=()), pool=[]), settings={}
        ),
    )
    with pytest.raises(CheckpointError, match=r"holds 'td3_fast\.Checkpoint'"):
        load_item_factors(path)


def test_a_learner_of_unknown_fields_is_not_described(pretrained: Pretrained, tmp_path: Path) -> None:
    later = replace(pretrained)
    later.learner_config = {**pretrained.learner_config, "unheard_of": 1}
    save_pretrained(tmp_path / "p", later, SETTINGS)
    with pytest.raises(CheckpointError, match=r"unheard_of.*make it anew"):
        describe_pretrained(tmp_path / "p")


def test_a_bert4rec_from_before_its_positions_had_a_name_is_what_it_was(
    pretrained: Pretrained, tmp_path: Path
) -> None:
    path = tmp_path / "p"
    sizes = {"num_items": 9, "max_len": 5, "hidden": 8, "heads": 1}
    learner = build_learner("BERT4Rec", sizes, seed=0)
    states = {name: value.detach() for name, value in learner.state_dict().items()}
    own = replace(pretrained, learner_name="BERT4Rec", learner_config=sizes, best=states, pool=[states])
    save_pretrained(path, own, {})
    assert load_pretrained(path)[0].learner_config["positions_from"] == "last"
    del own.learner_config["positions_from"]
    save_pretrained(path, own, {})
    assert load_pretrained(path)[0].learner_config["positions_from"] == "first"
    assert describe_pretrained(path).learner_config["positions_from"] == "first"


def test_a_pool_that_is_the_best_checkpoint_comes_back(pretrained: Pretrained, tmp_path: Path) -> None:
    shared = replace(pretrained, pool=[pretrained.best])
    save_pretrained(tmp_path / "p", shared, {})
    assert equal(load_pretrained(tmp_path / "p")[0], shared)


def test_a_learner_comes_back_with_its_items(split: Split, tmp_path: Path) -> None:
    made = learner(split)
    save_learner(tmp_path / "l", made, item_ids=split.interactions.item_ids.tolist())
    loaded, ids = load_learner(tmp_path / "l")
    assert ids == tuple(split.interactions.item_ids.tolist())
    assert equal(loaded.state_dict(), made.state_dict())


def test_a_learner_comes_back_in_its_own_dtypes(split: Split, tmp_path: Path) -> None:
    made = learner(split).double()
    made.item_embeddings.data = made.item_embeddings.data.bfloat16()
    save_learner(tmp_path / "l", made, item_ids=())
    loaded, _ = load_learner(tmp_path / "l")
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {
        name: p.dtype for name, p in made.named_parameters()
    }
    assert equal(loaded.state_dict(), made.state_dict())


def test_a_learner_with_ids_of_other_items_is_refused(split: Split, tmp_path: Path) -> None:
    save_learner(tmp_path / "l", learner(split), item_ids=["[PAD]", "a"])
    with pytest.raises(CheckpointError, match="2 ids for"):
        load_learner(tmp_path / "l")


def test_settings_that_differ_are_named() -> None:
    now = {"data": "abc", "distill": {"epochs": 10, "semantics": {"shuffle": False}}, "seed": 1}
    assert differences(SETTINGS, SETTINGS) == []
    assert differences(SETTINGS, now) == [
        "distill.epochs was 30 and is now 10",
        "distill.semantics.shuffle was true and is now false",
        "seed was not set and is now 1",
    ]
    with pytest.raises(CheckpointError, match=r"here belongs .*distill\.epochs was 30 and is now 10"):
        check_settings("here", SETTINGS, now)


def test_settings_are_compared_as_json_has_them() -> None:
    assert differences({"size": (1, 2)}, {"size": [1, 2]}) == []


def test_other_files_are_refused(pretrained: Pretrained, split: Split, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)
    torch.save({"state": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="pickle"):
        load_checkpoint(path)
    save_pretrained(path, pretrained, SETTINGS)
    with pytest.raises(CheckpointError, match=r"holds 'td3_fast.Pretrained', not 'td3_fast.Checkpoint'"):
        load_checkpoint(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_pretrained(path)
    path.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load_pretrained(path)


def test_a_learner_whose_tensors_do_not_fit_is_refused(pretrained: Pretrained, tmp_path: Path) -> None:
    config = {**pretrained.learner_config, "hidden": 16}
    save_pretrained(tmp_path / "p", replace(pretrained, learner_config=config), {})
    with pytest.raises(CheckpointError, match="not a valid pretrained learner"):
        load_pretrained(tmp_path / "p")
    unknown = replace(pretrained)
    unknown.learner_name = "Oracle"
    save_pretrained(tmp_path / "p", unknown, {})
    with pytest.raises(CheckpointError, match="unknown learner 'Oracle'"):
        load_pretrained(tmp_path / "p")


def test_tensors_out_of_place_are_refused(pretrain_states: list[PretrainState], tmp_path: Path) -> None:
    state = copy.deepcopy(pretrain_states[0])
    state.fit.optimiser = state.fit.optimiser._replace(first_moments=state.fit.optimiser.first_moments[:1])
    with pytest.raises(CheckpointError, match="parameters and moments of the optimiser do not agree"):
        through_a_file(tmp_path, state)
