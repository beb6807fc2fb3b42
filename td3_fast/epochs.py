"""The summaries after each epoch of a distillation, kept for a run that compares them in another way."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from td3_fast.checkpoint import Settings, differences
from td3_fast.distill_config import DistillConfig
from td3_fast.files import write_bytes
from td3_fast.report import read_results
from td3_fast.run_folder import EPOCHS, RESULTS, SUMMARY, RunError
from td3_fast.summary import load_summary

Factors = tuple[Tensor, ...]


def add_epoch(folder: Path, epoch: int, factors: Factors) -> None:
    """Keep the factors after an epoch beside those of the epochs before; what there is of later ones goes."""
    path = folder / EPOCHS
    kept = _read(path) if epoch > 1 and path.exists() else {}
    kept = {name: tensor for name, tensor in kept.items() if int(name.partition(".")[0]) < epoch}
    kept |= {f"{epoch}.{index}": factor.detach().cpu() for index, factor in enumerate(factors)}
    write_bytes(path, safetensors.torch.save(kept))


@dataclass(frozen=True, kw_only=True)
class KeptEpochs:
    """The epochs of a complete run: the factors after each, and its history."""

    factors: list[Factors]
    history: list[dict[str, float]]


def kept_epochs(folder: Path, config: DistillConfig, settings: Settings) -> KeptEpochs | None:
    """Those of the run in a folder; None where it is not complete, or has not kept them.

    settings: of the run that asks, with its `config`.

    Raises:
        RunError: the two differ in more than how epochs are compared.
    """
    if not all((folder / name).exists() for name in (EPOCHS, RESULTS, SUMMARY)):
        return None
    metadata = load_summary(folder / SUMMARY).metadata
    then: dict[str, Any] = {} if metadata is None else dict(metadata.settings)
    plain = replace(config, semantics=config.semantics.but_for_comparing)
    found = differences(then, {**settings, "distill": plain.settings()})
    if found:
        raise RunError(
            f"the run in {folder} differs in more than how epochs are compared: {'; '.join(found[:3])}"
        )
    history = read_results(folder / RESULTS)["distillation"]["history"]
    kept = _read(folder / EPOCHS)
    epochs = [
        [kept[name] for name in sorted(kept, key=_place) if _place(name)[0] == epoch]
        for epoch in range(1, len(history) + 1)
    ]
    return (
        KeptEpochs(factors=[tuple(factors) for factors in epochs], history=history) if all(epochs) else None
    )


def _place(name: str) -> tuple[int, int]:
    epoch, _, index = name.partition(".")
    return int(epoch), int(index)


def _read(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load(path.read_bytes())
