"""The commands `td3-fast data`, and the options that say which data are meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from td3_fast.terminal import console, guarded, say

data_app = typer.Typer(no_args_is_help=True, help="Known data sets, and what a file holds.")

Data = Annotated[str, typer.Argument(help="A file, or a name from `td3-fast data list`.", show_default=False)]
Format = Annotated[
    str | None, typer.Option("--format", help="The format of a file whose name does not tell.")
]
Columns = Annotated[
    str | None, typer.Option("--columns", help="Names of columns, as in user=uid,item=iid,timestamp=time.")
]
Seed = Annotated[int, typer.Option("--seed", help="All randomness comes from it.")]


@data_app.command("list")
@guarded
def data_list() -> None:
    """List the data sets that are known by name, and on which terms they are offered."""
    from td3_fast.data import DATASETS

    table = Table(box=None, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("what")
    table.add_column("terms")
    for entry in DATASETS.values():
        table.add_row(entry.name, f"{entry.title}, {entry.publisher}: {entry.description}", entry.terms)
    console.print(table, highlight=False, markup=False)
    say("and amazon-2018-CATEGORY, amazon-2023-CATEGORY by the publisher's names of categories")


@data_app.command("fetch")
@guarded
def data_fetch(
    name: Annotated[str, typer.Argument(help="A name from `td3-fast data list`.")],
    cache: Annotated[Path | None, typer.Option("--cache", help="The folder of all data sets.")] = None,
) -> None:
    """Download a data set, check it and say where it is."""
    from td3_fast.data import fetch, find_dataset

    try:
        find_dataset(name)
    except LookupError as error:
        raise ValueError(str(error)) from None
    say(str(fetch(name, cache=cache)))


@data_app.command("check")
@guarded
def data_check(data: Data, format: Format = None, columns: Columns = None) -> None:
    """Read DATA, and count; a malformed line is named by file, line and column."""
    from td3_fast.data import absent, check_interactions, fetch, find_dataset, resolve

    source = Path(data)
    if not source.exists():
        try:
            entry = find_dataset(data)
        except LookupError as error:
            raise absent(data, error) from None
        if entry.url is None and entry.name == "synthetic":
            say(repr(resolve(data)))
            return
        source, format = fetch(data), format or entry.format
    report = check_interactions(source, format=format, columns=parse_columns(columns))
    say(
        f"{report.name}: {report.num_users:,} users, {report.num_items:,} items, "
        f"{report.num_interactions:,} interactions\n"
        f"interactions of a user: {report.shortest:,} to {report.longest:,}, mean {report.mean_length:.1f}, median "
        f"{report.median_length:g}\n"
        f"users with fewer than 3, who cannot be tested: {report.short_users:,}\n"
        f"interactions with an item met before: {report.repeats:,}"
    )
    if report.has_times:
        say(f"neighbours in a sequence at the same time, in the order of the file: {report.ties:,}")
    else:
        say("no times: the order of the file is the order of the sequences")


@data_app.command("generate")
@guarded
def data_generate(
    out: Annotated[Path, typer.Argument(help="The file to write, such as made.inter or made.inter.gz.")],
    users: Annotated[int, typer.Option(min=1, help="Users.")] = 600,
    items: Annotated[int, typer.Option(min=1, help="Items.")] = 400,
    mean_length: Annotated[float, typer.Option(min=1, help="Mean interactions of a user.")] = 30.0,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write sequences with planted structure."""
    from td3_fast.data import generate_interactions, write_interactions

    check_inter("FILE", out)
    check_place(out, overwrite=overwrite)
    made = generate_interactions(
        num_users=users,
        num_items=items,
        mean_length=mean_length,
        seed=seed,
        num_clusters=min(10, items),
        min_length=int(min(5, mean_length)),
    )
    write_interactions(made, out)
    say(f"{out}: {made!r}")


def check_inter(what: str, out: Path) -> None:
    """Refuse a name that says another format than the one that is written."""
    if not out.name.endswith((".inter", ".inter.gz")):
        raise ValueError(f"{what} is a RecBole file, .inter or .inter.gz, got {str(out)!r}")


def check_place(out: Path, *, overwrite: bool) -> None:
    """Refuse a file that cannot be written before anything is computed for it; its folder is made."""
    if out.is_dir():
        raise ValueError(f"{out} is a folder: name a file")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: choose another file, or --overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)


def parse_columns(text: str | None) -> dict[str, str | None] | None:
    """The mapping that `load_interactions` takes, from "user=uid,item=iid"."""
    if text is None:
        return None
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(separator and name for name, separator, _ in pairs):
        raise ValueError(f"--columns is like user=uid,item=iid,timestamp=time, got {text!r}")
    return {name.strip(): column or None for name, _, column in pairs}


def parse_bytes(text: str) -> int:
    """Bytes, from "2GiB", "1.5 GB", "512MiB" or a plain number."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(?:([kmgt])(i?)b?|b?)", text.strip().lower())
    if found is None:
        raise ValueError(f"a size of memory is like 2GiB, 512MiB or 1.5GB, got {text!r}")
    number, prefix, binary = found.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** (" kmgt".index(prefix) if prefix else 0))
