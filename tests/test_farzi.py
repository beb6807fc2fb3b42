"""A Farzi summary: what it computes, where it starts, how it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from td3_fast.learners import build_learner
from td3_fast.summary import (
    FarziSummary,
    Preprocessing,
    SummaryError,
    SummaryMetadata,
    TrainingRecipe,
    TuckerSummary,
    load_summary,
)

USERS, POSITIONS, ITEMS, RANK, WIDTH = 4, 8, 11, 3, 5


def make(*, dtype: torch.dtype = torch.float32, normalize: Any = "softmax") -> FarziSummary:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    metadata = SummaryMetadata(
        item_ids=("[PAD]", *(f"item {i}" for i in range(1, ITEMS))),
        preprocessing=Preprocessing(data="synthetic", filters={}, fingerprint="ab"),
        training=TrainingRecipe(
            learner="SASRec",
            learner_config={"num_items": ITEMS, "hidden": WIDTH, "inner": 8, "max_len": POSITIONS},
            learning_rate=0.01, steps=3, batch_size=2, item_embedding="trained",
        ),
    )  # fmt: skip
    return FarziSummary(
        normal(USERS, POSITIONS, RANK), normal(ITEMS, RANK), normal(ITEMS, WIDTH),
        position_embeddings=normal(POSITIONS, WIDTH), normalize=normalize, metadata=metadata,
    )  # fmt: skip


@pytest.mark.parametrize("normalize", ["softmax", "none"])
@pytest.mark.parametrize("users", [None, [2], [3, 0, 3]])
def test_embeddings_are_probabilities_times_the_item_table(normalize: str, users: list[int] | None) -> None:
    summary = make(dtype=torch.float64, normalize=normalize)
    rows = list(range(USERS)) if users is None else users
    scores = torch.einsum("upr,nr->upn", summary.latents, summary.decoder)[rows]
    expected = scores.softmax(-1) if normalize == "softmax" else scores
    index = None if users is None else torch.tensor(users)
    torch.testing.assert_close(summary.probabilities(index), expected)
    torch.testing.assert_close(summary(index), expected @ summary.item_factors)
    assert summary.size == f"{USERS}x{POSITIONS}"
    assert summary.num_items == ITEMS


@pytest.mark.parametrize("item_embedding", ["frozen", "trained"])
def test_a_learner_trains_on_it(item_embedding: str) -> None:
    summary = make()
    assert summary.metadata is not None
    learner = build_learner("SASRec", summary.metadata.training.learner_config, seed=0)
    losses = summary.fit(learner, seed=1, steps=40, item_embedding=item_embedding)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert summary.decoder.grad is None


def test_the_start_depends_on_its_seed_and_is_near_uniform() -> None:
    sizes = {"users": 50, "positions": 20, "rank": 16, "item_factors": torch.randn(200, WIDTH)}
    first, again, other = (FarziSummary.initialise(**sizes, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.decoder, again.decoder)
    assert not torch.equal(first.latents, other.latents)
    assert float(first.latents.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(first.decoder.detach().std()) == pytest.approx((2 / 16) ** 0.5, rel=0.05)
    probabilities = first.probabilities()
    assert float(probabilities.detach().max()) < 2 / 200


@pytest.mark.parametrize("where", ["inside", "reference"])
def test_what_is_saved_is_loaded(tmp_path: Path, where: Any) -> None:
    summary = make()
    path = tmp_path / "summary.safetensors"
    summary.save(path, item_factors=where)
    loaded = load_summary(path)
    assert isinstance(loaded, FarziSummary)
    for name, value in summary.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    assert loaded.metadata == summary.metadata
    with pytest.raises(SummaryError, match="FarziSummary"):
        TuckerSummary.load(path)


def test_a_file_of_no_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "summary.safetensors"
    with pytest.raises(SummaryError, match="cannot be read"):
        load_summary(path)
    path.write_bytes(b"\x80\x02 not a summary")
    with pytest.raises(SummaryError, match="pickle"):
        load_summary(path)
    make().save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(SummaryError):
        load_summary(path)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"latents": (4, 3)}, "latents must have the shape"),
        ({"decoder": (11, 4)}, "decoder must have the shape"),
        ({"decoder": (10, 3)}, "decoder must have the shape"),
        ({"item_factors": (11,)}, "item_factors must have the shape"),
        ({"latents": (0, 8, 3)}, "must not be empty"),
    ],
)
def test_factors_that_do_not_agree_are_refused(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    sizes = {"latents": (4, 8, 3), "decoder": (11, 3), "item_factors": (11, 5), **shapes}
    with pytest.raises(ValueError, match=message):
        FarziSummary(**{name: torch.zeros(shape) for name, shape in sizes.items()})


def test_other_factors_of_the_same_form_keep_the_tables() -> None:
    summary = make()
    other = summary.with_factors(tuple(2 * factor for factor in summary.factors))
    assert torch.equal(other.latents, 2 * summary.latents)
    assert other.item_factors is summary.item_factors
    assert other.position_embeddings is summary.position_embeddings
    assert other.metadata is None
