"""Options that several commands have, what they turn into, and how a command at work is watched and stopped."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from td3_fast.cli_data import parse_columns
from td3_fast.terminal import Display, Interrupted, Interrupts, console

if TYPE_CHECKING:
    import torch

    from td3_fast.data import Split
    from td3_fast.run import Watcher
    from td3_fast.summary import Summary

SummaryFile = Annotated[Path, typer.Argument(help="A summary.safetensors.", show_default=False)]
MaxEpochs = Annotated[
    int | None, typer.Option("--max-epochs", min=1, help="Most epochs of training on real data.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of torch; its own choice if left out.")
]
Device = Annotated[
    str, typer.Option("--device", help="Where it is computed: cpu, cuda, or cuda:1 for the second GPU.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there already.")]


@contextmanager
def watching(when_stopped: str) -> Iterator[Watcher]:
    """Progress on the terminal; an interruption ends in the words `when_stopped`."""
    from td3_fast.run import Stopped, Watcher

    with Display(console) as display:

        def announce() -> None:
            display.say("stopping after the step in progress; once more stops at once")

        with Interrupts(announce) as interrupts:
            watcher = Watcher(
                progress=display.progress, say=display.say, stop=lambda: bool(interrupts.requested)
            )
            try:
                yield watcher
            except (Stopped, KeyboardInterrupt):
                raise Interrupted(f"stopped; {when_stopped}") from None


def go_on(*, without: str | None = None, also: str | None = None) -> str:
    """The command that takes up what this one has begun."""
    words = [word for word in sys.argv[1:] if word != without]
    if also is not None and also not in words:
        words.append(also)
    program = ["td3-fast"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        program = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "td3_fast.cli"]
    return f"what is done is kept. Go on with:\n  {shlex.join([*program, *words])}"


def set_threads(threads: int | None) -> None:
    """Torch's threads, its own choice where None."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def device_named(name: str) -> torch.device:
    """A device that is here; of the GPUs, where torchrun has started several processes, each takes its own.

    Raises:
        ValueError: it is none, or not here.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device takes cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: PyTorch {torch.__version__} sees no GPU here; leave it out")
    index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: GPU {index} is asked for, there are {torch.cuda.device_count()}")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def names_in(text: str) -> tuple[str, ...]:
    """The distinct names in "a, b"."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def filters_of(summary: Summary) -> dict[str, Any]:
    """The filters of the log that a summary was distilled from."""
    return {} if summary.metadata is None else summary.metadata.preprocessing.filters


def read_split(data: str, *, format: str | None, columns: str | None, **filters: Any) -> Split:
    """The parts of a file or of a data set known by name."""
    from td3_fast.data import leave_one_out, resolve

    extra: dict[str, Any] = {"format": format, "columns": parse_columns(columns)}
    log = resolve(data, **{name: value for name, value in extra.items() if value is not None}, **filters)
    return leave_one_out(log)
