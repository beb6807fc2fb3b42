"""Writing a file so that a reader, or a crash, only ever meets the whole old one or the whole new one."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def open_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends without an exception.

    It is written under a temporary name in the destination folder, which must exist, flushed to the disk and
    renamed; the folder is flushed too. After an exception `path` is as it was and the temporary file is gone.
    A symbolic link is followed: the file that it names is replaced.
    """
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.tmp")
    # "x": the mode bits come from the umask, and a file that is already there is an error
    file = temporary.open("xb")
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as error:
        with suppress(FileNotFoundError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            error.filename = str(target)  # as where a disk is full
        raise
    sync_folder(target.parent)


def make_folder(folder: str | os.PathLike[str]) -> None:
    """The folder and those that it lies in, where they are not there yet.

    Raises:
        NotADirectoryError: there is a file of that name, or of one that it would lie in.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        taken = next(
            (place for place in (Path(folder), *Path(folder).parents) if place.is_file()), Path(folder)
        )
        raise NotADirectoryError(f"{taken} is a file: name a folder for the results") from error


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flush the names in `folder` to the disk, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some file systems refuse it for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: str | os.PathLike[str], content: bytes | bytearray | memoryview) -> None:
    """Replace `path` by `content`, atomically."""
    with open_atomically(path) as file:
        file.write(content)


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """Replace `path` by `content` in UTF-8, atomically; line ends are written as they are."""
    write_bytes(path, encoded(content))


def encoded(text: str) -> bytes:
    """In UTF-8; what has no place there, as in names of files that are not, as JSON writes it."""
    return text.encode(errors="backslashreplace")


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 2) -> None:
    """Replace `path` by `value` as JSON, atomically; ValueError where a number is not finite."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def write_folder(path: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write `files` (contents by name) into the folder `path`; it and its parents are made where missing.

    A new folder appears with everything in it. In one that has files already each is replaced whole, in the
    order given, and files of other names stay.
    """
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.tmp")
    staging.mkdir()
    try:
        for name, content in files.items():
            write_bytes(staging / name, content)
        try:
            staging.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            for name in files:
                (staging / name).replace(target / name)
            staging.rmdir()
            sync_folder(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_folder(target.parent)
