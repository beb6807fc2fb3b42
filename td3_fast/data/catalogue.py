"""Known data sets: what they are, on which terms, and how to get them."""

from __future__ import annotations

import glob
import hashlib
import importlib
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from td3_fast.data.generator import generate_interactions
from td3_fast.data.interactions import Interactions, filter_interactions, load_interactions
from td3_fast.files import open_atomically, write_text

SYNTHETIC_SEED = 0
_UCSD = "https://mcauleylab.ucsd.edu/public_datasets/data"
_GROUPLENS_TERMS = (
    "research use with acknowledgement; no redistribution without separate permission; "
    "no commercial use without permission"
)
_CITATION_TERMS = "offered for research with citation; no explicit licence"
_AMAZON_NAME = re.compile(r"amazon-(2018|2023)-([A-Za-z]+(?:_[A-Za-z]+)*)")


class FetchError(RuntimeError):
    """A data set could not be had; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """An entry of the catalogue.

    `checksum` is the `algorithm:digest` of the download. Where it is None the publisher gives none: the first
    download is trusted, its SHA-256 is kept beside the file, and later uses are checked against that.
    """

    name: str
    title: str
    description: str
    publisher: str
    terms: str
    page: str | None = None  # the publisher's, for people
    url: str | None = None  # None: cannot be fetched by name
    member: str | None = None  # the file inside the archive at `url`
    format: str | None = None
    checksum: str | None = None

    @property
    def download_name(self) -> str:
        return "" if self.url is None else self.url.rpartition("/")[2]

    @property
    def file_name(self) -> str:
        """The file that is read in the end."""
        return self.download_name if self.member is None else self.member.rpartition("/")[2]


def _amazon(release: str, category: str, name: str | None = None) -> Dataset:
    shared = {
        "name": name or f"amazon-{release}-{category}",
        "title": f"Amazon reviews {release}, {category.replace('_', ' ')}",
        "description": "ratings only, unfiltered",
        "terms": _CITATION_TERMS,
    }
    if release == "2018":
        return Dataset(
            **shared,
            publisher="Jianmo Ni, Jiacheng Li, Julian McAuley, UCSD (EMNLP 2019)",
            page="https://nijianmo.github.io/amazon/index.html",
            url=f"{_UCSD}/amazon_v2/categoryFilesSmall/{category}.csv",
            format="csv-item-user",
        )
    return Dataset(
        **shared,
        publisher="McAuley Lab, UCSD (2024)",
        page="https://amazon-reviews-2023.github.io/",
        url=f"{_UCSD}/amazon_2023/benchmark/0core/rating_only/{category}.csv.gz",
        format="csv",
    )


_ENTRIES = (
    Dataset(
        name="synthetic",
        title="Built-in data",
        description="600 users who walk along planted transitions between 400 items; made, not read",
        publisher="this package",
        terms="none",
    ),
    Dataset(
        name="ml-100k",
        title="MovieLens 100K",
        description="943 users, 1,682 films, 100,000 ratings (1997-1998)",
        publisher="GroupLens, University of Minnesota",
        terms=_GROUPLENS_TERMS,
        page="https://grouplens.org/datasets/movielens/100k/",
        url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        member="ml-100k/u.data",
        format="u.data",
        checksum="md5:0e33842e24a9c977be4e0107933c0723",  # the publisher's ml-100k.zip.md5
    ),
    Dataset(
        name="ml-1m",
        title="MovieLens 1M",
        description="6,040 users, 3,706 films, 1,000,209 ratings (2000-2003)",
        publisher="GroupLens, University of Minnesota",
        terms=_GROUPLENS_TERMS,
        page="https://grouplens.org/datasets/movielens/1m/",
        url="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        member="ml-1m/ratings.dat",
        format="ratings.dat",
        checksum="md5:c4d9eecfca2ab87c1945afe126590906",  # the publisher's ml-1m.zip.md5
    ),
    _amazon("2023", "Magazine_Subscriptions", "magazine"),
    _amazon("2018", "Magazine_Subscriptions", "magazine-2018"),
    Dataset(
        name="epinions",
        title="Epinions",
        description=(
            "the paper's Epinions; its archive is in no format that is read here, so turn users, items and "
            "times into a csv file with the header user_id,item_id,timestamp and give its path"
        ),
        publisher="Tong Zhao, Julian McAuley, Irwin King (CIKM 2014), UCSD",
        terms=_CITATION_TERMS,
        page="https://cseweb.ucsd.edu/~jmcauley/datasets.html#social_data",
    ),
)
DATASETS: Mapping[str, Dataset] = MappingProxyType({entry.name: entry for entry in _ENTRIES})


def find_dataset(name: str) -> Dataset:
    """The entry of that name: one of `DATASETS`, or `amazon-2018-CATEGORY` or `amazon-2023-CATEGORY` with the
    publisher's spelling of the category (`amazon-2023-Video_Games`).

    Raises:
        LookupError: no such name.
    """
    if name in DATASETS:
        return DATASETS[name]
    if match := _AMAZON_NAME.fullmatch(name):
        return _amazon(match[1], match[2])
    known = ", ".join((*DATASETS, "amazon-2018-CATEGORY"))
    raise LookupError(f"no data set {name!r}; known are {known} and amazon-2023-CATEGORY")


def absent(name_or_path: str, error: LookupError) -> FileNotFoundError:
    """What to raise where neither a path nor a data set has this name; `error` is of `find_dataset`."""
    path = Path(name_or_path)
    longer = sorted(str(other) for other in path.parent.glob(f"{glob.escape(path.name)}.*"))
    hint = f"; there is {' and '.join(longer)}" if longer else ""
    return FileNotFoundError(f"no file {name_or_path!r}, and {error}{hint}")


def resolve(
    name_or_path: str | Path,
    *,
    cache: str | Path | None = None,
    progressbar: Any = False,
    **options: Any,
) -> Interactions:
    """Load what is named: an existing path wins, then a name of the catalogue, fetched where needed.

    Args:
        name_or_path: a file, or a name as in `find_dataset`.
        cache, progressbar: as in `fetch`.
        options: as in `load_interactions`.

    Raises:
        FileNotFoundError: neither an existing path nor a known name.
        FetchError, DataError, ValueError: as `fetch` and `load_interactions`.
    """
    if Path(name_or_path).exists():
        return load_interactions(name_or_path, **options)
    try:
        entry = find_dataset(str(name_or_path))
    except LookupError as error:
        raise absent(str(name_or_path), error) from None
    if entry.name == "synthetic":
        filters = {key: value for key, value in options.items() if key not in ("format", "columns")}
        return filter_interactions(generate_interactions(seed=SYNTHETIC_SEED), **filters)
    file = fetch(entry.name, cache=cache, progressbar=progressbar)
    options["format"] = options.get("format") or entry.format
    options["name"] = options.get("name") or entry.name
    return load_interactions(file, **options)


def fetch(name: str, *, cache: str | Path | None = None, progressbar: Any = False) -> Path:
    """The file of a data set in the cache, downloaded where it is missing (by pooch, the extra `fetch`).

    Files appear whole and checked or not at all, so a fetch that was broken off is simply run again. What was
    put into the folder by hand is used: an archive is checked and unpacked, another file is taken as it is.

    Args:
        name: as in `find_dataset`.
        cache: the folder of all data sets, each in a subfolder of its name; the platform's when None.
        progressbar: as of `pooch.HTTPDownloader`: True for a bar by tqdm, or an object to drive.

    Raises:
        LookupError: no such name.
        FetchError: what went wrong and what to do about it.
    """
    entry = find_dataset(name)
    if entry.url is None:
        see = f" ({entry.page})" if entry.page else ""
        raise FetchError(f"there is no file to fetch for {name}: {entry.description}{see}")
    pooch = _pooch()
    if cache is None and pooch is not None:
        cache = pooch.os_cache("td3-fast")
    if cache is None:
        raise FetchError(_advice(entry, None, _NO_POOCH))
    folder = Path(cache).expanduser() / entry.name
    file, download = folder / entry.file_name, folder / entry.download_name
    if file.exists():
        _check_record(file)
        return file
    if not download.exists():
        if pooch is None:
            raise FetchError(_advice(entry, folder, _NO_POOCH))
        # else a server may announce a .gz file as compressed on the way, and it would arrive unpacked
        as_it_is = {"Accept-Encoding": "identity"}
        _download(entry, download, pooch.HTTPDownloader(progressbar, headers=as_it_is))
    if entry.member is not None:
        _unpack(entry, download, file)
    _write_record(file)
    return file


_NO_POOCH = "pooch, the extra `fetch` of td3-fast, is not installed"


def _pooch() -> Any:
    try:
        return importlib.import_module("pooch")
    except ImportError:
        return None


def _advice(entry: Dataset, folder: Path | None, reason: str) -> str:
    where = f"put it into {folder}" if folder else "give the path of the data file instead of the name"
    return (
        f"could not fetch {entry.name} ({reason}); download {entry.download_name} by hand from the page of "
        f"{entry.title}, {entry.publisher} ({entry.page}), and {where}"
    )


def _download(entry: Dataset, path: Path, downloader: Any) -> None:
    assert entry.url is not None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_atomically(path) as stream:
            downloader(entry.url, stream, None)
            stream.flush()
            _check_download(entry, Path(stream.name))
    except OSError as error:  # requests raises kinds of OSError
        reason = str(error).partition("\n")[0] or type(error).__name__
        if type(error).__name__ == "ConnectionError":  # the text of requests is a nest of representations
            reason = f"no connection to {entry.url.split('/')[2]}"
        raise FetchError(_advice(entry, path.parent, reason)) from error


def _check_download(entry: Dataset, path: Path) -> None:
    if entry.checksum is None:
        return
    algorithm, _, expected = entry.checksum.partition(":")
    found = _digest(path, algorithm)
    if found != expected:
        raise FetchError(
            f"this {entry.download_name} is damaged or another version: its {algorithm} checksum is {found}, "
            f"the publisher's is {expected}; remove it where it was put by hand, and fetch again"
        )


def _unpack(entry: Dataset, archive: Path, file: Path) -> None:
    assert entry.member is not None
    _check_download(entry, archive)
    with (
        zipfile.ZipFile(archive) as content,
        content.open(entry.member) as member,
        open_atomically(file) as out,
    ):
        shutil.copyfileobj(member, out, 1 << 20)


def _digest(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _record_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _write_record(file: Path) -> None:
    write_text(_record_of(file), f"{_digest(file, 'sha256')}  {file.name}\n")


def _check_record(file: Path) -> None:
    record = _record_of(file)
    # no record: it was put there by hand
    if record.exists() and record.read_text().split()[:1] != [_digest(file, "sha256")]:
        raise FetchError(
            f"{file} is not what was fetched: its SHA-256 is not that in {record.name}; remove both"
        )
