from collections.abc import Iterator

import pytest
import torch
from described import metadata_of

from td3_fast.data import Split, generate_interactions, leave_one_out
from td3_fast.learners import SASRec, SASRecConfig
from td3_fast.summary import TuckerSummary


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """No picture of every single run: they take longer than the runs."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("td3_fast.run_folder.draw_report", lambda *args, **options: None)
        yield


@pytest.fixture(scope="module")
def split() -> Split:
    """Data for modules that make none of their own."""
    return leave_one_out(generate_interactions(num_users=40, num_items=130, mean_length=8, seed=4))


@pytest.fixture(scope="module")
def summary(split: Split) -> TuckerSummary:
    """Of these data, not distilled, with all that a file says of how it is used."""
    log = split.interactions
    learner = SASRec(SASRecConfig(num_items=log.num_items, max_len=6, hidden=8, inner=8), seed=0)
    positions = learner.position_embeddings.detach()
    made = TuckerSummary.initialise(
        users=5, positions=6, user_rank=2, position_rank=2, item_factors=learner.item_embeddings.detach(), seed=0
    )  # fmt: skip
    made = TuckerSummary(
        made.core.detach(), made.user_factors.detach(), made.position_factors.detach(), made.item_factors,
        position_embeddings=positions,
    )  # fmt: skip
    made.metadata = metadata_of(log, learner)
    return made


@pytest.fixture(autouse=True)
def _fixed_randomness() -> None:
    torch.manual_seed(0)
