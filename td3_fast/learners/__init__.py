"""Sequential recommenders that can be trained on real data, on a summary, and inside a differentiated window."""

from dataclasses import asdict
from typing import Any

from td3_fast.learners.base import (
    CrossEntropy,
    FlatParameters,
    Learner,
    check_encoder_dtype,
    predicts_next_item,
)
from td3_fast.learners.bert4rec import BERT4Rec, BERT4RecConfig
from td3_fast.learners.gru4rec import GRU4Rec, GRU4RecConfig
from td3_fast.learners.narm import NARM, NARMConfig
from td3_fast.learners.sasrec import SASRec, SASRecConfig

LEARNERS: dict[str, tuple[type[Any], type[Any]]] = {
    "SASRec": (SASRec, SASRecConfig),
    "GRU4Rec": (GRU4Rec, GRU4RecConfig),
    "NARM": (NARM, NARMConfig),
    "BERT4Rec": (BERT4Rec, BERT4RecConfig),
}


def register_learner(learner: type[Learner], config: type[Any]) -> None:
    """Let a class of learners be pretrained, distilled with, saved and loaded by its name.

    learner: built as `learner(config, seed=...)`; config: a frozen dataclass of its hyperparameters, which
    `learner.hyperparameters()` gives as a dict, with `num_items`, `max_len` and `hidden` among them. A process that
    reads files of such learners has to register the class first.

    Raises:
        ValueError: the name is that of another class.
    """
    name = learner.__name__
    if any(known.lower() == name.lower() and LEARNERS[known][0] is not learner for known in LEARNERS):
        raise ValueError(f"there is a learner of the name {name} already: name the class otherwise")
    LEARNERS[name] = (learner, config)


def learner_named(name: str) -> str:
    """The name of the learner's class, from one that may differ from it in upper and lower case."""
    for known in LEARNERS:
        if known.lower() == name.lower():
            return known
    raise ValueError(f"unknown learner {name!r}: expected one of {', '.join(LEARNERS)}")


def build_learner(name: str, hyperparameters: dict[str, Any], *, seed: int) -> Learner:
    """A learner by the name of its class and its `hyperparameters()`."""
    learner_class, config_class = LEARNERS[learner_named(name)]
    return learner_class(config_class(**hyperparameters), seed=seed)


def all_hyperparameters(name: str, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """The same with the defaults of those that are left out."""
    _, config_class = LEARNERS[learner_named(name)]
    return asdict(config_class(**hyperparameters))


def as_written(name: str, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """The `hyperparameters()` that a file has of a learner, with those that the revision it is from had no name for."""
    if name.lower() == "bert4rec":
        return {"positions_from": "first", **hyperparameters}
    return hyperparameters


__all__ = [
    "LEARNERS",
    "NARM",
    "BERT4Rec",
    "BERT4RecConfig",
    "CrossEntropy",
    "FlatParameters",
    "GRU4Rec",
    "GRU4RecConfig",
    "Learner",
    "NARMConfig",
    "SASRec",
    "SASRecConfig",
    "all_hyperparameters",
    "as_written",
    "build_learner",
    "check_encoder_dtype",
    "learner_named",
    "predicts_next_item",
    "register_learner",
]
