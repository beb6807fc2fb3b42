"""Tensors and one JSON document in a single safetensors file, checked before anything in it is believed.

The document lies in the header's `__metadata__`. It begins with the SHA-256 of the whole file, in which the
digits of that sum itself count as zeros, so no bit of a file can change unseen. Reading never runs code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import safetensors.torch
import torch
from torch import Tensor

from td3_fast.files import open_atomically

SHA256_ZEROS = "0" * 64
HEADER_START = b'{"__metadata__":{"td3_fast":"{\\"sha256\\":\\"'
MAX_HEADER_BYTES = 100_000_000  # as safetensors has it
PIECE_BYTES = 1 << 24
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
PICKLE_STARTS = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
COPY_AGAIN = "copy it again from where it was made, or make it anew"


class ArtefactError(ValueError):
    """A file cannot be read or written; the message names it, what is wrong and what to do."""


def write_artefact(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    document: Mapping[str, Any],
    *,
    kind: str,
    version: int,
) -> None:
    """Write `tensors` and `document` as one file, atomically; equal contents give equal bytes.

    kind, version: what `read_artefact` will insist on; document: JSON values, without the keys "sha256",
    "kind" and "version". Tensors may share memory and lie on any device.

    Raises:
        ArtefactError: the document is not JSON, or a tensor's dtype has no place in the format.
    """
    try:
        text = json.dumps(
            {"sha256": SHA256_ZEROS, "kind": kind, "version": version, **document},
            allow_nan=False,
            separators=(",", ":"),
        )
    except (TypeError, ValueError) as error:
        raise ArtefactError(f"{path} is not written, its metadata is not JSON: {error}") from error
    # the widest first, as safetensors orders them: every tensor starts at a multiple of its item size
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, Any] = {"__metadata__": {"td3_fast": text}}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise ArtefactError(f"{path} is not written: tensor {name!r} is {tensor.dtype}; convert it first")
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    size = len(header).to_bytes(8, "little")
    parts = [_content(tensors[name]) for name in names]
    digest = hashlib.sha256(size + header)
    for part in parts:
        digest.update(part)
    first = len(HEADER_START)
    with open_atomically(path) as file:
        file.write(size + header[:first] + digest.hexdigest().encode() + header[first + len(SHA256_ZEROS) :])
        for part in parts:
            file.write(part)


def read_artefact(
    path: str | os.PathLike[str],
    *,
    kind: str,
    version: int,
    rows: Callable[[str], slice | None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the document of a file that `write_artefact` wrote, without the keys that it added.

    rows: which rows of the tensor of a name are wanted, None for all. With it the file is checked piece by piece, and
    no more of it than those rows comes to lie in memory.

    Raises:
        ArtefactError: the file cannot be read, is no such artefact, or is not the one that was written.
    """
    try:
        with open(path, "rb") as file:
            content_start = _check_start(path, file.read(4096), os.fstat(file.fileno()).st_size)
            file.seek(0)
            content = file.read(-1 if rows is None else content_start)
            _check_sum(path, itertools.chain([content], iter(lambda: file.read(PIECE_BYTES), b"")))
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror}): check its name and place") from error
    try:
        header = json.loads(content[8:content_start])
        document = json.loads(
            header["__metadata__"]["td3_fast"], parse_constant=_refuse_constant, parse_float=_finite
        )
        tensors = safetensors.torch.load(content) if rows is None else _read_rows(path, rows)
    except (
        Exception
    ) as error:  # the sum is right, so these are a forger's bytes: no telling what they set off
        raise ArtefactError(f"{path} is not a valid artefact ({error!r}): make it anew") from error
    if not isinstance(document, dict):
        raise ArtefactError(f"{path} is not a valid artefact, its metadata is no JSON object: make it anew")
    found_kind, found_version = document.pop("kind", None), document.pop("version", None)
    if found_kind != kind:
        raise ArtefactError(f"{path} holds {found_kind!r}, not {kind!r}: name a file of the right kind")
    if type(found_version) is not int or found_version != version:
        raise ArtefactError(
            f"{path} has version {found_version!r} of its format and this program reads version {version}: "
            "read it with the release of td3_fast that wrote it"
        )
    del document["sha256"]
    return tensors, document


def _read_rows(path: str | os.PathLike[str], rows: Callable[[str], slice | None]) -> dict[str, Tensor]:
    with safetensors.safe_open(path, framework="pt") as file:
        wanted = {name: rows(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        return {
            name: file.get_tensor(name) if cut is None else file.get_slice(name)[cut]
            for name, cut in wanted.items()
        }


def artefact_kind(path: str | os.PathLike[str]) -> Any:
    """The kind that a file says it is of, before anything in it is checked; None where it does not say.

    Raises:
        ArtefactError: the file cannot be read, or does not begin as an artefact does.
    """
    try:
        with open(path, "rb") as file:
            content_start = _check_start(path, file.read(4096), os.fstat(file.fileno()).st_size)
            file.seek(8)
            header = file.read(content_start - 8)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror}): check its name and place") from error
    try:
        return json.loads(json.loads(header)["__metadata__"]["td3_fast"]).get("kind")
    except Exception:  # a damaged header, which `read_artefact` says with more care
        return None


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 (hex) over dtype, shape and values."""
    digest = hashlib.sha256(f"{DTYPES[tensor.dtype]} {list(tensor.shape)}\n".encode())
    digest.update(_content(tensor))
    return digest.hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over the names and the `tensor_sha256` of named tensors; their order does not count."""
    digests = {name: tensor_sha256(tensor) for name, tensor in sorted(tensors.items())}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def from_json(hint: Any, value: Any, where: str) -> Any:
    """`value`, as `json.loads` gives it, as an instance of the type `hint`; `where` names it in errors.

    Understands dataclasses (every field present, none besides), dict[str, T], tuples, Literal, T | None, Any,
    str, bool, int and float (finite; integers are taken).

    Raises:
        ValueError: the value is not of that type.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        fields = [field.name for field in dataclasses.fields(hint)]
        check_keys(value, fields, where)
        return hint(**{name: from_json(hints[name], value[name], f"{where}.{name}") for name in fields})  # type: ignore[operator]
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else from_json(inner, value, where)
    if origin is Literal and any(type(value) is type(a) and value == a for a in arguments):
        return value
    if origin is dict and isinstance(value, dict):
        return {name: from_json(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if origin is tuple and isinstance(value, list):
        if arguments[-1] is Ellipsis:
            arguments = (arguments[0],) * len(value)
        if len(arguments) == len(value):
            return tuple(
                from_json(a, item, f"{where}[{i}]")
                for i, (a, item) in enumerate(zip(arguments, value, strict=True))
            )
    if hint is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if hint in (str, bool, int) and type(value) is hint:
        return value
    expected = (
        hint.__name__ if isinstance(hint, type) and origin is None else str(hint).replace("typing.", "")
    )
    raise ValueError(f"{where} must be {expected}, got {_short(value)}")


def check_keys(value: Any, expected: list[str], where: str) -> None:
    """ValueError unless `value` is a dict with exactly the keys `expected`."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {_short(value)}")
    missing = [name for name in expected if name not in value]
    extra = [str(name) for name in value if name not in expected]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(map(repr, missing))}")
    if extra:
        raise ValueError(f"{where} has the unknown {_short(extra[0])}")


def _check_start(path: str | os.PathLike[str], start: bytes, size: int) -> int:
    """Where the tensors begin, from the first bytes of a file."""
    # the length of a header may look like the start of a pickle, so what follows it is asked first
    if start[8:9] != b"{" and (start[:4] == b"PK\x03\x04" or start[:2] in PICKLE_STARTS):
        raise ArtefactError(
            f"{path} is a pickle or a zip archive, such as torch.save writes; pickles can run code and are "
            "not read here: name a safetensors file written by td3_fast"
        )
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or (length > size - 8 and start[8:9] == b"{"):
        raise ArtefactError(f"{path} is truncated, it has only {size} bytes: {COPY_AGAIN}")
    if length > min(size - 8, MAX_HEADER_BYTES) or start[8:9] != b"{":
        raise ArtefactError(f"{path} is not a safetensors file: name one written by td3_fast")
    if not start[8:].startswith(HEADER_START):
        raise ArtefactError(
            f"{path} was not written by td3_fast, or it is damaged, its header does not begin with "
            "td3_fast's metadata: name another file or make this one anew"
        )
    return 8 + length


def _check_sum(path: str | os.PathLike[str], pieces: Iterator[bytes]) -> None:
    """pieces: the whole file, the first of them at least its header."""
    first = 8 + len(HEADER_START)
    last = first + len(SHA256_ZEROS)
    content = next(pieces)
    digest = hashlib.sha256(content[:first] + SHA256_ZEROS.encode())
    digest.update(memoryview(content)[last:])
    for piece in pieces:
        digest.update(piece)
    if content[first:last] != digest.hexdigest().encode():
        raise ArtefactError(f"{path} is truncated or damaged, its checksum does not match: {COPY_AGAIN}")


def _content(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large a number")
    return number


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a JSON number")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
