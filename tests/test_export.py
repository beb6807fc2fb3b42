"""Hard sequences of a summary: which items they hold, how they are written, what they are compared with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from described import metadata_of
from typer.testing import CliRunner

import td3_fast.summary_base
from td3_fast.cli import app
from td3_fast.data import (
    Interactions,
    every_prefix,
    generate_interactions,
    leave_one_out,
    load_interactions,
    write_interactions,
)
from td3_fast.evaluate import HARD_ROWS, EvaluateConfig, evaluate
from td3_fast.export import HardConfig, hard_interactions
from td3_fast.learners import SASRec, SASRecConfig
from td3_fast.summary import (
    FarziSummary,
    Summary,
    TuckerSummary,
)
from td3_fast.training import FitConfig

USERS, POSITIONS, WIDTH = 5, 6, 8


def make(kind: str, log: Interactions, *, normalize: Any = "softmax", scale: float = 1.0) -> Summary:
    learner = SASRec(SASRecConfig(num_items=log.num_items, max_len=6, hidden=WIDTH, inner=8), seed=0)
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    metadata = metadata_of(log, learner)
    items = normal(log.num_items, WIDTH) * scale
    if kind == "farzi":
        return FarziSummary(
            normal(USERS, POSITIONS, 3), normal(log.num_items, 3) * scale, items,
            normalize=normalize, metadata=metadata,
        )  # fmt: skip
    return TuckerSummary(
        normal(2, 3, WIDTH), normal(USERS, 2), normal(POSITIONS, 3), items, normalize=normalize, metadata=metadata
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "made.inter"
    write_interactions(generate_interactions(num_users=40, num_items=130, mean_length=8, seed=4), path)
    return path


@pytest.fixture(scope="module")
def log(data: Path) -> Interactions:
    return load_interactions(data)


KINDS = pytest.mark.parametrize("kind", ["tucker", "farzi"])


@KINDS
@pytest.mark.parametrize("normalize", ["softmax", "none"])
def test_the_most_probable_item_but_padding_stands_at_each_position(
    log: Interactions, kind: str, normalize: str
) -> None:
    summary = make(kind, log, normalize=normalize)
    expected = summary.probabilities()[..., 1:].argmax(-1) + 1
    assert torch.equal(summary.hard_sequences(), expected)


@KINDS
@pytest.mark.parametrize("draws", [None, 3])
def test_how_many_scores_are_held_does_not_change_the_sequences(
    log: Interactions, kind: str, draws: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = make(kind, log)
    whole = summary.hard_sequences(draws=draws, seed=1)
    for limit in (1, 8 * log.num_items * 4):
        monkeypatch.setattr(td3_fast.summary_base, "SCORES_LIMIT", limit)
        assert torch.equal(summary.hard_sequences(draws=draws, seed=1), whole)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_probabilities(log: Interactions, temperature: float) -> None:
    draws = 4000
    summary = make("tucker", log, scale=0.5)
    drawn = summary.hard_sequences(draws=draws, temperature=temperature, seed=3)
    assert drawn.shape == (USERS * draws, POSITIONS)
    assert int(drawn.min()) >= 1
    expected = summary.probabilities().detach().double()[..., 1:] ** (1 / temperature)
    expected /= expected.sum(-1, keepdim=True)
    by_user = drawn.view(USERS, draws, POSITIONS)
    for user, position in ((0, 0), (4, 5)):
        counts = torch.bincount(by_user[user, :, position], minlength=log.num_items)[1:]
        p = expected[user, position]
        # six standard deviations of a binomial count, and one count for the rarest items
        assert bool(((counts - draws * p).abs() <= 6 * (draws * p * (1 - p)).sqrt() + 1).all())


def test_draws_depend_on_their_seed_only(log: Interactions) -> None:
    summary = make("tucker", log)
    first = summary.hard_sequences(draws=2, seed=5)
    assert torch.equal(first, summary.hard_sequences(draws=2, seed=5))
    assert not torch.equal(first, summary.hard_sequences(draws=2, seed=6))


def test_a_low_temperature_draws_the_most_probable_items(log: Interactions) -> None:
    summary = make("tucker", log)
    assert torch.equal(summary.hard_sequences(draws=1, temperature=1e-4), summary.hard_sequences())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"draws": 0}, "draws must be at least 1"), ({"temperature": 0.0}, "temperature must be positive")],
)
def test_options_out_of_range_are_refused(log: Interactions, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("tucker", log).hard_sequences(**options)


def test_a_bare_product_cannot_be_drawn_from(log: Interactions) -> None:
    with pytest.raises(ValueError, match="no probabilities"):
        make("tucker", log, normalize="none").hard_sequences(draws=1)


def test_ids_that_break_a_table_are_refused(log: Interactions) -> None:
    summary = make("tucker", log)
    assert summary.metadata is not None
    ids = list(summary.metadata.item_ids)
    ids[3] = "a\tb"
    summary.metadata = replace(summary.metadata, item_ids=tuple(ids))
    with pytest.raises(ValueError, match="cannot stand in a table"):
        hard_interactions(summary)
    ids[3] = "a\u00a0b"  # as the readers have it
    summary.metadata = replace(summary.metadata, item_ids=tuple(ids))
    assert "a\u00a0b" in hard_interactions(summary).item_ids


@pytest.mark.parametrize(("draws", "users"), [(None, USERS), (1, USERS), (3, 3 * USERS)])
def test_what_is_written_is_read_again(
    log: Interactions, tmp_path: Path, draws: int | None, users: int
) -> None:
    made = hard_interactions(make("tucker", log), HardConfig(draws=draws, seed=1))
    write_interactions(made, tmp_path / "hard.inter.gz")
    read = load_interactions(tmp_path / "hard.inter.gz")
    assert read.user_ids.tolist() == made.user_ids.tolist()
    assert len(read.user_ids) == users
    assert read.item_ids[read.items].tolist() == made.item_ids[made.items].tolist()
    assert set(read.item_ids[1:]) <= set(log.item_ids[1:])


def test_every_interaction_but_the_first_trains(log: Interactions) -> None:
    examples = every_prefix(log)
    assert len(examples) == log.num_interactions - log.num_users
    assert np.array_equal(
        np.sort(examples.ends), np.setdiff1d(np.arange(log.num_interactions), log.offsets[:-1])
    )
    assert (examples.lengths >= 1).all()


def test_rows_of_an_evaluation_train_on_the_hard_sequences(log: Interactions) -> None:
    config = EvaluateConfig(seeds=1, rows=("summary", *HARD_ROWS), fit=FitConfig(max_epochs=2, batch_size=16))
    summary, split = make("tucker", log), leave_one_out(log)
    rows = {row.name: row for row in evaluate(summary, split, config=config) if row.protocol == "full"}
    assert set(rows) == {"summary", *HARD_ROWS}
    assert len({row.metrics["MRR@20"]["mean"] for row in rows.values()}) == 3
    drawn = replace(config, rows=("hard",), hard=HardConfig(draws=2, seed=1))
    other = evaluate(summary, split, config=drawn)[0]
    assert other.metrics != rows["hard"].metrics


# the command


def run(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def saved(log: Interactions, tmp_path: Path) -> Path:
    path = tmp_path / "summary.safetensors"
    make("tucker", log).save(path)
    return path


def test_the_command_writes_and_says_what_it_costs(saved: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "hard.inter"
    result = run(
        "export", saved, "--out", out, "--draws", "2", "--test", data, "--seeds", "1", "--max-epochs", "2"
    )
    assert result.exit_code == 0, result.output
    assert "10 sequences of 6" in result.stdout
    for row in ("summary", "hard", "hard+embeddings", "zero-step"):
        assert row in result.stdout
    first = out.read_bytes()
    assert load_interactions(out).num_interactions == 2 * USERS * POSITIONS
    assert run("export", saved, "--out", out, "--draws", "2", "--overwrite").exit_code == 0
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("hard.csv", (), "RecBole file"),
        ("there.inter", (), "--overwrite"),
        ("hard.inter", ("--draws", "1", "--temperature", "-1"), "temperature must be positive"),
        ("hard.inter", ("--temperature", "0.5"), "--temperature is of draws"),
        ("folder.inter", ("--overwrite",), "is a folder: name a file"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    saved: Path, tmp_path: Path, name: str, more: tuple[str, ...], message: str
) -> None:
    (tmp_path / "there.inter").write_text("")
    (tmp_path / "folder.inter").mkdir()
    result = run("export", saved, "--out", tmp_path / name, *more)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "hard.inter").exists()
