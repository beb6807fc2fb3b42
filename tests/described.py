"""What files say of the summaries that tests make."""

from td3_fast.data import Interactions
from td3_fast.learners import Learner
from td3_fast.summary import Preprocessing, SummaryMetadata, TrainingRecipe


def metadata_of(log: Interactions, learner: Learner) -> SummaryMetadata:
    """That of a summary of `log` for learners like `learner`, trained in four steps, the item table included."""
    return SummaryMetadata(
        item_ids=tuple(log.item_ids.tolist()),
        preprocessing=Preprocessing(data=log.name, filters={}, fingerprint=log.fingerprint),
        training=TrainingRecipe(
            learner=type(learner).__name__, learner_config=learner.hyperparameters(), learning_rate=0.01, steps=4,
            batch_size=3, item_embedding="trained",
        ),
    )  # fmt: skip
