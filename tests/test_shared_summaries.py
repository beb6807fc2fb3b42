"""The summaries that come with the project: each can be read, says how it was made, and trains a learner."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from td3_fast.evaluate import learner_for
from td3_fast.summary import load_summary

FOLDER = Path(__file__).parents[1] / "summaries"
FILES = sorted(FOLDER.glob("*.safetensors"))
LIMIT = 2 << 20  # bytes


def test_the_table_has_every_file_and_no_other() -> None:
    named = re.findall(r"^\| `([^`]+\.safetensors)`", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)
    assert FILES
    assert sorted(named) == [path.name for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shared_summary_trains_a_learner(path: Path) -> None:
    assert path.stat().st_size < LIMIT
    summary = load_summary(path)
    metadata = summary.metadata
    assert metadata is not None
    assert metadata.settings["distill"]["users"] == summary.num_users
    assert "pretrain" in metadata.settings["pretrained"]
    assert metadata.metrics["NDCG@10"] > 0
    assert len(metadata.item_ids) == summary.num_items
    losses = summary.fit(learner_for(summary, seed=0), seed=0, steps=5)
    assert losses[-1] < losses[0]
