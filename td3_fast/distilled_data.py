"""The folder format of the paper's released program: `config.json` beside a pickled `data_dict`.

Names and fields are those of its class `DistilledData` (repository Maitouer/TD3), so that either program
reads the other's folders.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from td3_fast.artefact import check_keys, from_json
from td3_fast.files import write_folder

LETTERS = ("G", "U", "V", "T")  # core, user factors, item factors, position factors


@dataclass(frozen=True, kw_only=True)
class DistilledDataConfig:
    """Sizes of a summary, by the released program's names."""

    pretrained_data_path: str | None = None
    seq_num: int  # users
    seq_len: int  # positions
    seq_dim1: int
    seq_dim2: int
    seq_dim3: int
    farzi_dim: int = 32  # rank of a Farzi summary; a Tucker summary does not use it
    fix_order: bool = True  # batches go round in order, else each is a random draw


@dataclass(frozen=True, kw_only=True)
class LearnerTrainConfig:
    """How a learner meets the summary, by the released program's names."""

    train_step: int = 200  # steps of training
    batch_size: int  # users per step

    def __post_init__(self) -> None:
        if self.train_step < 1 or self.batch_size < 1:
            raise ValueError("train_step and batch_size must be at least 1")


def write_distilled_data(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],  # one for each of LETTERS
    config: DistilledDataConfig,
    train_config: LearnerTrainConfig,
) -> None:
    """Write the folder that the released program's `from_pretrained` reads, atomically for each file."""
    document = {
        "config": asdict(config),
        "train_config": asdict(train_config),
        "item_num": tensors["V"].shape[0],
        "item_emb": None,
    }
    content = io.BytesIO()
    # clones: torch.save writes the whole storage behind a view
    torch.save({letter: tensors[letter].detach().cpu().clone() for letter in LETTERS}, content)
    files = {"data_dict": content.getvalue(), "config.json": json.dumps(document, indent=4).encode()}
    write_folder(path, files)


def read_distilled_data(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Tensor], DistilledDataConfig, LearnerTrainConfig]:
    """The tensors by letter, on the CPU, and both configurations of a folder of the released program.

    torch loads `data_dict` with `weights_only=True`, which builds tensors and runs nothing else.

    Raises:
        ValueError: a file is missing, damaged or not of the format; the message begins with its path.
    """
    folder = Path(path)
    config, train_config, item_num = _read_config(folder / "config.json")
    file = folder / "data_dict"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whatever is odd about the file is an error below
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: name a folder with config.json and data_dict") from None
    except Exception as error:  # the unpickler raises nearly anything on damaged input
        reason = str(error).strip().partition("\n")[0] or repr(error)
        raise ValueError(
            f"{file} cannot be loaded without running code or is damaged ({reason[:200]}): "
            "only a dict of plain tensors is read"
        ) from error
    shapes = {
        "G": (config.seq_dim1, config.seq_dim2, config.seq_dim3),
        "U": (config.seq_num, config.seq_dim1),
        "V": (item_num, config.seq_dim3),
        "T": (config.seq_len, config.seq_dim2),
    }
    try:
        check_keys(loaded, list(LETTERS), "its dict")
        for letter, shape in shapes.items():
            _check_tensor(letter, loaded[letter], shape)
    except ValueError as error:
        raise ValueError(
            f"{file} does not hold a Tucker summary, {error}: write it anew with save_pretrained"
        ) from error
    return {letter: loaded[letter].detach() for letter in LETTERS}, config, train_config


def _read_config(file: Path) -> tuple[DistilledDataConfig, LearnerTrainConfig, int]:
    try:
        document = json.loads(file.read_bytes())
        check_keys(document, ["config", "train_config", "item_num", "item_emb"], "the document")
        sizes = document["config"]
        if isinstance(sizes, dict):
            sizes.setdefault("farzi_dim", DistilledDataConfig.farzi_dim)  # earlier versions do not have it
        config: DistilledDataConfig = from_json(DistilledDataConfig, sizes, "config")
        train_config: LearnerTrainConfig = from_json(
            LearnerTrainConfig, document["train_config"], "train_config"
        )
        item_num: int = from_json(int, document["item_num"], "item_num")
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: name a folder with config.json and data_dict") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is not a configuration of distilled data ({error}): write it anew"
        ) from error
    return config, train_config, item_num


def _check_tensor(letter: str, value: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        raise ValueError(f"{letter} is not a dense tensor")
    if value.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise ValueError(f"{letter} is {value.dtype}, not floating")
    if tuple(value.shape) != shape:
        raise ValueError(f"{letter} has the shape {tuple(value.shape)} where config.json says {shape}")
    # a stride of 0 makes a tensor of any size out of one number
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{letter} repeats its memory")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{letter} has values that are not finite")
