"""What a summary stands for, and the file that holds a summary together with it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from td3_fast.artefact import (
    DTYPES,
    ArtefactError,
    check_keys,
    from_json,
    read_artefact,
    tensor_sha256,
    write_artefact,
)
from td3_fast.learners import as_written

ITEM_FACTORS_KIND = "td3_fast.ItemFactors"
FORMAT_VERSION = 1
ID_TENSORS = ("item_ids.bytes", "item_ids.ends")  # the ids in UTF-8 one after the other, and where each ends


class SummaryError(ValueError):
    """A summary cannot be read or written; the message names the file, what is wrong and what to do."""


def installed_versions() -> dict[str, str]:
    """Versions of td3_fast, torch and Python at work."""
    try:
        package = version("td3-fast")
    except PackageNotFoundError:
        package = "unknown"
    return {"td3_fast": package, "torch": torch.__version__, "python": platform.python_version()}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Which data a summary stands for."""

    data: str  # name of the data set
    filters: dict[str, Any]  # what was left out of the log, as JSON values
    fingerprint: str  # of the interactions after filtering, `Interactions.fingerprint`


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """The training run that a summary was distilled for; `Summary.fit` repeats it."""

    learner: str  # class name
    learner_config: dict[str, Any]  # its hyperparameters, as JSON values
    learning_rate: float
    steps: int
    batch_size: int  # synthetic users per step
    item_embedding: Literal["frozen", "trained"]
    augmentation: bool = True
    middle_positions: int = 1
    dropout: bool = True
    separate_passes: bool = False
    optimiser: Literal["adam"] = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 5e-5

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "middle_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")

    def fit_options(self) -> dict[str, Any]:
        """The recipe as keyword arguments of `td3_fast.unroll.fit_on_summary`.

        Raises:
            ValueError: the recipe has other betas than that function, which takes none.
        """
        if self.betas != (0.9, 0.999):
            raise ValueError(f"training on a summary uses Adam with betas (0.9, 0.999), not {self.betas}")
        numbers = ("steps", "learning_rate", "batch_size", "weight_decay", "middle_positions")
        choices = ("item_embedding", "augmentation", "dropout", "separate_passes")
        return {name: getattr(self, name) for name in (*numbers, *choices)}


@dataclass(frozen=True, kw_only=True)
class SummaryMetadata:
    """What a summary stands for and how to use it: all of a saved summary but the tensors."""

    item_ids: tuple[str, ...]  # (n,), the data's own name of each item, item 0 being the padding
    preprocessing: Preprocessing
    training: TrainingRecipe
    metrics: dict[str, float] = field(default_factory=dict)  # on validation data, fractions
    settings: dict[str, Any] = field(default_factory=dict)  # of the run that made it, as JSON values
    versions: dict[str, str] = field(default_factory=installed_versions)  # of the programs that made it

    def check_items(self, item_ids: Sequence[str]) -> None:
        """ValueError unless `item_ids` (n,) are the summary's, in the same order."""
        source = self.preprocessing
        remedy = (
            f"read {source.data!r} with the filters {source.filters or 'none'}; data of that name from elsewhere may "
            "differ"
        )
        if len(item_ids) != len(self.item_ids):
            raise ValueError(
                f"the summary is over {len(self.item_ids)} items, padding included, and the data has "
                f"{len(item_ids)}: {remedy}"
            )
        for index, (own, other) in enumerate(zip(self.item_ids, item_ids, strict=True)):
            if own != other and set(item_ids) == set(self.item_ids):
                raise ValueError(
                    f"item {index} is {own!r} in the summary and {str(other)!r} in the data, which have the same items "
                    "in another order: they are numbered as they appear in the file, so give it with its rows in "
                    "their first order"
                )
            if own != other:
                raise ValueError(
                    f"item {index} is {own!r} in the summary and {str(other)!r} in the data: {remedy}"
                )


@dataclass(frozen=True, kw_only=True)
class _ItemFactors:
    file: str | None  # None: inside
    sha256: str


@dataclass(frozen=True, kw_only=True)
class _Document:
    normalize: Literal["softmax", "none"]
    item_factors: _ItemFactors
    preprocessing: Preprocessing
    training: TrainingRecipe
    metrics: dict[str, float]
    settings: dict[str, Any]
    versions: dict[str, str]


def write_summary(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],  # the factors, "item_factors" and perhaps "position_embeddings"
    metadata: SummaryMetadata,
    *,
    kind: str,
    normalize: str,
    item_factors: Literal["inside", "reference"],
) -> None:
    """Write a summary atomically as `Summary.save` describes; `kind` goes into the header."""
    table = tensors["item_factors"]
    try:
        stored = {**tensors, **_encode_ids(metadata.item_ids)}
        if item_factors not in ("inside", "reference"):
            raise ValueError(f'item_factors must be "inside" or "reference", got {item_factors!r}')
        _check_ids(metadata.item_ids, len(table))
        _check_values(stored)
        entry = _ItemFactors(file=None, sha256=tensor_sha256(table))
        if item_factors == "reference":
            entry = _ItemFactors(file=f"item_factors-{entry.sha256[:16]}.safetensors", sha256=entry.sha256)
            del stored["item_factors"]
        document = {
            "normalize": normalize,
            "item_factors": asdict(entry),
            "preprocessing": asdict(metadata.preprocessing),
            "training": asdict(metadata.training),
            "metrics": metadata.metrics,
            "settings": metadata.settings,
            "versions": metadata.versions,
        }
        from_json(_Document, json.loads(json.dumps(document)), "metadata")  # what is written can be read
        if entry.file is not None:
            referenced = Path(path).parent / entry.file
            write_artefact(
                referenced, {"item_factors": table}, {}, kind=ITEM_FACTORS_KIND, version=FORMAT_VERSION
            )
        write_artefact(path, stored, document, kind=kind, version=FORMAT_VERSION)
    except ArtefactError as error:
        raise SummaryError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise SummaryError(f"{path} is not written, {error}: correct the summary or its metadata") from error


def read_summary(
    path: str | os.PathLike[str],
    *,
    kind: str,
    factors: Sequence[str],
    item_factors: Tensor | str | os.PathLike[str] | None = None,
) -> tuple[dict[str, Tensor], Literal["softmax", "none"], SummaryMetadata]:
    """Tensors, normalisation and metadata of a summary that `write_summary` wrote.

    kind, factors: what the header and the names of the tensors have to say. The rest of the arguments, and the errors,
    are those of `Summary.load`, which checks the shapes of the factors besides.
    """
    try:
        tensors, document = read_artefact(path, kind=kind, version=FORMAT_VERSION)
        contents: _Document = from_json(_Document, document, "metadata")
        if contents.item_factors.file is not None:
            if "item_factors" in tensors:
                raise ValueError("it holds the item factors and refers to another file for them")
            tensors["item_factors"] = _referenced(Path(path), contents.item_factors.file, item_factors)
        names = [name for name in tensors if name != "position_embeddings"]
        check_keys(dict.fromkeys(names), [*factors, "item_factors", *ID_TENSORS], "the set of tensors")
        _check_values(tensors)
        if tensor_sha256(tensors["item_factors"]) != contents.item_factors.sha256:
            raise ValueError("the item factors are not those that it was saved with")
        ids = _decode_ids(*(tensors.pop(name) for name in ID_TENSORS))
        table = tensors["item_factors"]
        _check_ids(ids, len(table) if table.ndim else 0)
        training = contents.training
        sizes = as_written(training.learner, training.learner_config)
        training = replace(training, learner_config=sizes)
    except ArtefactError as error:
        raise SummaryError(str(error)) from error
    except ValueError as error:
        raise SummaryError(f"{path} is not a valid summary, {error}: save it anew") from error
    metadata = SummaryMetadata(
        item_ids=ids,
        preprocessing=contents.preprocessing,
        training=training,
        metrics=contents.metrics,
        settings=contents.settings,
        versions=contents.versions,
    )
    return tensors, contents.normalize, metadata


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if value.dtype not in DTYPES:
            raise ValueError(f"{name} is {value.dtype}, which the format does not have")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} has values that are not finite")


def _check_ids(ids: tuple[str, ...], num_items: int) -> None:
    if len(ids) != num_items:
        raise ValueError(f"there are {len(ids)} item ids for {num_items} items")
    if len(set(ids)) != len(ids):
        raise ValueError("an item id occurs twice")


def _encode_ids(ids: tuple[str, ...]) -> dict[str, Tensor]:
    encoded = [item.encode() for item in ids]
    content = bytearray(b"".join(encoded)) or bytearray(1)  # a buffer without a byte makes no tensor
    ends = torch.tensor([len(item) for item in encoded], dtype=torch.int64, device="cpu").cumsum(0)
    return dict(zip(ID_TENSORS, (torch.frombuffer(content, dtype=torch.uint8), ends), strict=True))


def _decode_ids(content: Tensor, ends: Tensor) -> tuple[str, ...]:
    if content.dtype != torch.uint8 or ends.dtype != torch.int64 or content.ndim != 1 or ends.ndim != 1:
        raise ValueError("the item ids are not one-dimensional uint8 and int64 tensors")
    starts = torch.cat([ends.new_zeros(1), ends])[:-1]
    if bool((starts > ends).any()) or bool((ends > len(content)).any()):
        raise ValueError("the ends of the item ids are out of order")
    text = content.numpy().tobytes()
    return tuple(text[a:b].decode() for a, b in zip(starts.tolist(), ends.tolist(), strict=True))


def _referenced(path: Path, name: str, given: Tensor | str | os.PathLike[str] | None) -> Tensor:
    if isinstance(given, Tensor):
        return given.detach().cpu()
    if given is None:
        if name in ("", "..") or Path(name).name != name:
            raise ValueError(f"the name of its file of item factors, {name!r}, leads out of its folder")
        given = path.parent / name
    try:
        tensors, _ = read_artefact(given, kind=ITEM_FACTORS_KIND, version=FORMAT_VERSION)
    except ArtefactError as error:
        raise ArtefactError(f"{error}; {path} takes its item factors from there") from error
    if set(tensors) != {"item_factors"}:
        raise ArtefactError(
            f"{given} does not hold item factors, which {path} takes from there: save both anew"
        )
    return tensors["item_factors"]
