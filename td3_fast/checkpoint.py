"""Where a run stands, in files to go on from: checked, and bound to the settings they were made with.

Tensors come back with the bits they went in with, so a run that is continued ends as an unbroken one does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

from td3_fast.artefact import ArtefactError, from_json, read_artefact, write_artefact
from td3_fast.distill_state import DistillState
from td3_fast.ensemble import Member
from td3_fast.learners import LEARNERS, Learner, as_written, build_learner, learner_named
from td3_fast.pretrain import PretrainState
from td3_fast.training import FitState, Pretrained
from td3_fast.unroll import AdamState

CHECKPOINT_KIND = "td3_fast.Checkpoint"
PRETRAINED_KIND = "td3_fast.Pretrained"
LEARNER_KIND = "td3_fast.Learner"
FORMAT_VERSION = 1

Settings: TypeAlias = Mapping[str, Any]  # JSON values, nested by name


class CheckpointError(ValueError):
    """A file of a run cannot be used; the message names it, what is wrong and what to do."""


class PretrainedDescription(NamedTuple):
    """What a pretrained learner is, and what it was made with."""

    learner_name: str
    learner_config: dict[str, Any]
    pool_size: int  # checkpoints beside the best one
    settings: Settings


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A run in progress."""

    state: PretrainState | DistillState
    settings: Settings  # that the result depends on
    seconds: dict[str, float] = field(default_factory=dict)  # spent so far, by step
    environment: dict[str, Any] = field(default_factory=dict)  # what else bits may depend on


def differences(then: Settings, now: Settings) -> list[str]:
    """Which settings differ, in words: "distill.epochs was 30 and is now 10"."""
    return list(_differences(_plain(then), _plain(now), ""))


def check_settings(path: str | os.PathLike[str], then: Settings, now: Settings) -> None:
    """CheckpointError, naming the settings that differ, unless a file's settings are those asked for."""
    found = differences(then, now)
    if found:
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise CheckpointError(
            f"{path} belongs to a run with other settings: {'; '.join(found[:3])}{more}; "
            "give the settings that it was begun with, or another folder, or --overwrite"
        )


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Write a run in progress, atomically."""
    state = checkpoint.state
    tensors: dict[str, Tensor] = {}
    document: dict[str, Any] = {
        "settings": _plain(checkpoint.settings),
        "seconds": checkpoint.seconds,
        "environment": checkpoint.environment,
    }
    if isinstance(state, PretrainState):
        fit = state.fit
        steps = _put_adam(tensors, "optimiser", fit.optimiser)
        _put(tensors, "best", fit.best)
        for index, entry in enumerate(state.pool):
            _put(tensors, f"pool.{index}", entry)
        for index, member in enumerate(state.members):
            _put(tensors, f"members.{index}", member)
        document |= {
            "stage": "pretrain",
            "progress": {
                "optimiser_steps": steps,
                "epoch": fit.epoch,
                "batch": fit.batch,
                "loss_sum": fit.loss_sum,
                "best_epoch": fit.best_epoch,
                "best_score": _finite(fit.best_score),
                "history": fit.history,
                "pool": len(state.pool),
            },
        }
    else:
        steps = _put_adam(tensors, "factors", state.factors)
        _put(tensors, "carried", state.carried or ())
        _put(tensors, "validation_items", () if state.validation_items is None else (state.validation_items,))
        _put(tensors, "best", state.best or ())
        document |= {
            "stage": "distill",
            "progress": {
                "optimiser_steps": steps,
                "step": state.step,
                "best_epoch": state.best_epoch,
                "best_score": _finite(state.best_score),
                "history": state.history,
                "losses": state.losses,
            },
        }
    _write(path, tensors, document, kind=CHECKPOINT_KIND)


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The run in progress that `save_checkpoint` wrote. No code in the file is ever run.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
    """
    tensors, document = _read(path, kind=CHECKPOINT_KIND)
    try:
        contents: _CheckpointDocument = from_json(_CheckpointDocument, document, "metadata")
        state: PretrainState | DistillState
        if contents.stage == "pretrain":
            state = _pretrain_state(tensors, from_json(_PretrainProgress, contents.progress, "progress"))
        else:
            state = _distill_state(tensors, from_json(_DistillProgress, contents.progress, "progress"))
        _check_empty(tensors)
    except ValueError as error:
        raise CheckpointError(f"{path} is not a valid checkpoint, {error}: start anew") from error
    return Checkpoint(
        state=state,
        settings=contents.settings,
        seconds=contents.seconds,
        environment=contents.environment,
    )


def save_pretrained(path: str | os.PathLike[str], pretrained: Pretrained, settings: Settings) -> None:
    """Write a pretrained learner and its pool with the settings it was made with, atomically."""
    tensors = {f"best.{name}": value for name, value in pretrained.best.items()}
    for index, entry in enumerate(pretrained.pool):
        tensors |= {f"pool.{index}.{name}": value for name, value in entry.items()}
    document = {
        "settings": _plain(settings),
        "learner_name": pretrained.learner_name,
        "learner_config": pretrained.learner_config,
        "history": pretrained.history,
        "best_epoch": pretrained.best_epoch,
        "pool": len(pretrained.pool),
    }
    _write(path, tensors, document, kind=PRETRAINED_KIND)


def load_pretrained(
    path: str | os.PathLike[str], *, items: slice | None = None
) -> tuple[Pretrained, Settings]:
    """What `save_pretrained` wrote: the learner, and its settings. No code in the file is ever run.

    items: the rows of the item tables that are wanted, as by `Pretrained.cut`; no others come to lie in memory.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
    """

    def rows(name: str) -> slice | None:
        return items if name.endswith(".item_embeddings") else None

    tensors, document = _read(path, kind=PRETRAINED_KIND, rows=None if items is None else rows)
    try:
        contents: _PretrainedDocument = from_json(_PretrainedDocument, document, "metadata")
        here = {} if items is None else {"num_items": len(tensors["best.item_embeddings"])}
        pretrained = Pretrained(
            learner_name=contents.learner_name,
            learner_config={**as_written(contents.learner_name, contents.learner_config), **here},
            best=_take_named(tensors, "best"),
            pool=[_take_named(tensors, f"pool.{index}") for index in range(contents.pool)],
            history=list(contents.history),
            best_epoch=contents.best_epoch,
        )
        _check_empty(tensors)
        pretrained.learner(share_items=True)
    # load_state_dict, a config's missing or unknown field
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is not a valid pretrained learner, {reason}: make it anew") from error
    return pretrained, contents.settings


def describe_pretrained(path: str | os.PathLike[str]) -> PretrainedDescription:
    """What is in a file of `save_pretrained`; no tensor comes to lie in memory, nor is tried in the learner.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
    """
    _, document = _read(path, kind=PRETRAINED_KIND, rows=lambda name: slice(0, 0))
    try:
        contents: _PretrainedDocument = from_json(_PretrainedDocument, document, "metadata")
        _, config = LEARNERS[learner_named(contents.learner_name)]
        sizes = as_written(contents.learner_name, contents.learner_config)
        config(**sizes)
    except (ValueError, TypeError) as error:  # a config with another version's fields
        raise CheckpointError(f"{path} is not a valid pretrained learner, {error}: make it anew") from error
    return PretrainedDescription(contents.learner_name, sizes, contents.pool, contents.settings)


def load_item_factors(path: str | os.PathLike[str]) -> Tensor:
    """The item table (n, d) of the best checkpoint, alone, of what `save_pretrained` wrote.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
    """
    wanted = "best.item_embeddings"
    tensors, _ = _read(path, kind=PRETRAINED_KIND, rows=lambda name: None if name == wanted else slice(0, 0))
    if wanted not in tensors:
        raise CheckpointError(f"{path} is not a valid pretrained learner, it has no item table: make it anew")
    return tensors[wanted]


def save_learner(path: str | os.PathLike[str], learner: Learner, *, item_ids: Sequence[str]) -> None:
    """Write a learner and the ids of its items (num_items,), atomically."""
    document = {
        "learner_name": type(learner).__name__,
        "learner_config": learner.hyperparameters(),
        "item_ids": list(item_ids),
    }
    _write(
        path,
        {name: value.detach() for name, value in learner.state_dict().items()},
        document,
        kind=LEARNER_KIND,
    )


def load_learner(path: str | os.PathLike[str]) -> tuple[Learner, tuple[str, ...]]:
    """What `save_learner` wrote: the learner, and the ids of its items. No code in the file is ever run.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
    """
    tensors, document = _read(path, kind=LEARNER_KIND)
    try:
        contents: _LearnerDocument = from_json(_LearnerDocument, document, "metadata")
        sizes = as_written(contents.learner_name, contents.learner_config)
        learner = build_learner(contents.learner_name, sizes, seed=0)
        for name, parameter in learner.named_parameters():
            if name in tensors:
                parameter.data = parameter.data.to(tensors[name].dtype)
        learner.load_state_dict(tensors)
        if contents.item_ids and len(contents.item_ids) != len(learner.item_embeddings):
            raise ValueError(f"{len(contents.item_ids)} ids for {len(learner.item_embeddings)} items")
    except (ValueError, RuntimeError, TypeError) as error:  # load_state_dict, a config without such a field
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is not a valid learner, {reason}: make it anew") from error
    return learner, contents.item_ids


@dataclass(frozen=True, kw_only=True)
class _LearnerDocument:
    learner_name: str
    learner_config: dict[str, Any]
    item_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _CheckpointDocument:
    stage: Literal["pretrain", "distill"]
    progress: dict[str, Any]
    settings: dict[str, Any]
    seconds: dict[str, float]
    environment: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _PretrainProgress:
    optimiser_steps: int
    epoch: int
    batch: int
    loss_sum: float
    best_epoch: int
    best_score: float | None  # None: nothing was validated yet
    history: tuple[dict[str, Any], ...]
    pool: int


@dataclass(frozen=True, kw_only=True)
class _DistillProgress:
    optimiser_steps: int
    step: int
    best_epoch: int
    best_score: float | None
    history: tuple[dict[str, Any], ...]
    losses: tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class _PretrainedDocument:
    settings: dict[str, Any]
    learner_name: str
    learner_config: dict[str, Any]
    history: tuple[dict[str, Any], ...]
    best_epoch: int
    pool: int


def _pretrain_state(tensors: dict[str, Tensor], progress: _PretrainProgress) -> PretrainState:
    fit = FitState(
        optimiser=_take_adam(tensors, "optimiser", progress.optimiser_steps),
        best=_take(tensors, "best"),
        epoch=progress.epoch,
        batch=progress.batch,
        loss_sum=progress.loss_sum,
        best_epoch=progress.best_epoch,
        best_score=float("-inf") if progress.best_score is None else progress.best_score,
        history=list(progress.history),
    )
    pool = [_take(tensors, f"pool.{index}") for index in range(progress.pool)]
    members: list[Member] = []
    while member := _take(tensors, f"members.{len(members)}"):
        if len(member) != 2:
            raise ValueError(f"member {len(members)} of its ensemble has {len(member)} tensors instead of 2")
        members.append((member[0], member[1]))
    return PretrainState(fit=fit, pool=pool, members=members)


def _distill_state(tensors: dict[str, Tensor], progress: _DistillProgress) -> DistillState:
    return DistillState(
        factors=_take_adam(tensors, "factors", progress.optimiser_steps),
        step=progress.step,
        carried=_take(tensors, "carried") or None,
        validation_items=next(iter(_take(tensors, "validation_items")), None),
        best=_take(tensors, "best") or None,
        best_epoch=progress.best_epoch,
        best_score=float("-inf") if progress.best_score is None else progress.best_score,
        history=list(progress.history),
        losses=list(progress.losses),
    )


def _write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], document: Mapping[str, Any], *, kind: str
) -> None:
    try:
        write_artefact(path, tensors, document, kind=kind, version=FORMAT_VERSION)
    except ArtefactError as error:
        raise CheckpointError(str(error)) from error


def _read(
    path: str | os.PathLike[str], *, kind: str, rows: Callable[[str], slice | None] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors, document = read_artefact(path, kind=kind, version=FORMAT_VERSION, rows=rows)
    except ArtefactError as error:
        raise CheckpointError(str(error)) from error
    # copies, because a matrix product may round otherwise where its operands are aligned otherwise
    return {name: tensor.clone() for name, tensor in tensors.items()}, document


def _put(tensors: dict[str, Tensor], name: str, group: Sequence[Tensor]) -> None:
    for index, tensor in enumerate(group):
        tensors[f"{name}.{index}"] = tensor


def _put_adam(tensors: dict[str, Tensor], name: str, state: AdamState) -> int:
    for part, group in zip(AdamState._fields, state[:3], strict=False):
        _put(tensors, f"{name}.{part}", group)
    return state.step


def _take(tensors: dict[str, Tensor], name: str) -> tuple[Tensor, ...]:
    group: list[Tensor] = []
    while (tensor := tensors.pop(f"{name}.{len(group)}", None)) is not None:
        group.append(tensor)
    return tuple(group)


def _take_adam(tensors: dict[str, Tensor], name: str, step: int) -> AdamState:
    p, m, v = (_take(tensors, f"{name}.{part}") for part in AdamState._fields[:3])
    if not p or any([t.shape for t in moments] != [t.shape for t in p] for moments in (m, v)):
        raise ValueError(f"parameters and moments of the {name} do not agree")
    return AdamState(p, m, v, step)


def _take_named(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    found = [key for key in tensors if key.startswith(f"{name}.")]
    return {key.removeprefix(f"{name}."): tensors.pop(key) for key in found}


def _check_empty(tensors: Mapping[str, Tensor]) -> None:
    if tensors:
        raise ValueError(f"the tensor {next(iter(tensors))!r} has no place in it")


def _finite(score: float) -> float | None:
    return None if score == float("-inf") else score


def _plain(settings: Settings) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return plain


def _differences(then: Any, now: Any, where: str) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for name in {**then, **now}:
            inner = f"{where}.{name}" if where else name
            yield from _differences(then.get(name, "not set"), now.get(name, "not set"), inner)
    elif then != now:
        yield f"{where} was {_short(then)} and is now {_short(now)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:12] + "…"
