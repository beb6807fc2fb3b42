import dataclasses
import hashlib
import json
from typing import Any, Literal

import pytest
import safetensors.torch
import torch

from td3_fast.artefact import (
    DTYPES,
    HEADER_START,
    ArtefactError,
    from_json,
    read_artefact,
    tensor_sha256,
    write_artefact,
)


def write(path, tensors, document=None):
    write_artefact(path, tensors, document or {}, kind="test", version=3)
    return path


def read(path):
    return read_artefact(path, kind="test", version=3)


def sign(content):
    """`content` with the checksum that it should have."""
    first = 8 + len(HEADER_START)
    zeroed = content[:first] + b"0" * 64 + content[first + 64 :]
    return content[:first] + hashlib.sha256(zeroed).hexdigest().encode() + content[first + 64 :]


def forge(path, document_text, entries=None, body=b""):
    """A file with a right checksum around whatever is given."""
    text = '{"sha256":"' + "0" * 64 + '",' + document_text
    header = json.dumps(
        {"__metadata__": {"td3_fast": text}, **(entries or {})}, separators=(",", ":")
    ).encode()
    path.write_bytes(sign(len(header).to_bytes(8, "little") + header + body))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 3), (2, 3)])
def test_tensors_and_document_come_back(tmp_path, dtype, shape):
    tensors = {"a": torch.arange(torch.Size(shape).numel()).to(dtype).view(shape), "b": torch.zeros(1)}
    document = {"text": 'é"\\', "numbers": [1, 0.1, None, True], "nested": {"a": {}}}
    found, found_document = read(write(tmp_path / "a", tensors, document))
    assert found_document == document
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_any_safetensors_reader_reads_the_tensors(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(5), "c": torch.tensor([1, 2], dtype=torch.uint8)}
    found = safetensors.torch.load_file(write(tmp_path / "a", tensors))
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_tensors_may_be_views_of_one_storage(tmp_path):
    base = torch.randn(4, 6)
    tensors = {"columns": base[:, ::2], "transposed": base.T, "all": base}
    found, _ = read(write(tmp_path / "a", tensors))
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_equal_contents_give_equal_bytes(tmp_path):
    tensors = {"a": torch.randn(3), "b": torch.randn(2).double()}
    first = write(tmp_path / "a", tensors, {"x": 1}).read_bytes()
    assert write(tmp_path / "b", dict(reversed(tensors.items())), {"x": 1}).read_bytes() == first


def test_another_kind_or_version_is_refused(tmp_path):
    path = write(tmp_path / "a", {"a": torch.zeros(1)})
    with pytest.raises(ArtefactError, match=r"holds 'test', not 'other'"):
        read_artefact(path, kind="other", version=3)
    with pytest.raises(ArtefactError, match=r"version 3 .* reads version 4"):
        read_artefact(path, kind="test", version=4)


@pytest.mark.parametrize(
    "document", [{"a": float("nan")}, {"a": float("inf")}, {"a": object()}, {"a": {1, 2}}]
)
def test_a_document_that_is_not_json_is_not_written(tmp_path, document):
    with pytest.raises(ArtefactError, match=r"not written"):
        write(tmp_path / "a", {}, document)
    assert not list(tmp_path.iterdir())


def test_a_dtype_outside_the_format_is_not_written(tmp_path):
    with pytest.raises(ArtefactError, match=r"complex"):
        write(tmp_path / "a", {"a": torch.zeros(1, dtype=torch.complex64)})


@pytest.mark.parametrize(
    "text",
    [
        '"kind":"test","version":3,"a":1e999}',
        '"kind":"test","version":3,"a":NaN}',
        '"kind":"test","version":3,"a":' + "[" * 100_000 + "]" * 100_000 + "}",
        '"kind":"test","version":3,"a":' + "1" * 5000 + "}",
        '"kind":"test","version":3',
        '"kind":"test","version":3}}',
        '"kind":["test"],"version":3}',
        '"kind":"test","version":"3"}',
        '"kind":"test","version":3.0}',
        '"kind":"test","version":true}',
        '"kind":"test"}',
        '"version":3}',
    ],
)
def test_a_forged_document_is_refused(tmp_path, text):
    forge(tmp_path / "a", text)
    with pytest.raises(ArtefactError, match=r"/a "):
        read(tmp_path / "a")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]},
        {"dtype": "F32", "shape": [100], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
        {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        {},
        None,
    ],
)
def test_a_forged_tensor_entry_is_refused(tmp_path, entry):
    forge(tmp_path / "a", '"kind":"test","version":3}', {"a": entry}, b"\0" * 4)
    with pytest.raises(ArtefactError, match=r"/a is not a valid artefact"):
        read(tmp_path / "a")


def test_bytes_after_the_tensors_are_refused_even_under_a_right_checksum(tmp_path):
    path = write(tmp_path / "a", {"a": torch.zeros(2)})
    path.write_bytes(sign(path.read_bytes() + b"\x80\x04K\x01."))
    with pytest.raises(ArtefactError, match=r"not a valid artefact"):
        read(path)


@pytest.mark.parametrize("length", [0, 1, 2**31, 100_000_001, 2**63, 2**64 - 1])
def test_a_header_length_out_of_bounds_is_refused_without_reading_on(tmp_path, length):
    path = write(tmp_path / "a", {"a": torch.zeros(2)})
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(ArtefactError, match=r"truncated|not a safetensors file"):
        read(path)


def test_the_sum_of_a_tensor_depends_on_dtype_shape_and_values():
    base = torch.zeros(2, 3)
    others = [base.double(), base.view(3, 2), base + 1, base.to(torch.int32)]
    assert len({tensor_sha256(t) for t in [base, *others]}) == 5
    assert tensor_sha256(base) == tensor_sha256(torch.zeros(3, 2).T)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    x: float
    name: str = "p"


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (float, 1, 1.0),
        (int, 3, 3),
        (bool, True, True),
        (str | None, None, None),
        (str | None, "a", "a"),
        (Literal["a", "b"], "b", "b"),
        (dict[str, float], {"a": 1}, {"a": 1.0}),
        (tuple[float, float], [1, 2], (1.0, 2.0)),
        (tuple[str, ...], ["a"], ("a",)),
        (Any, [1, {"a": None}], [1, {"a": None}]),
        (Point, {"x": 1, "name": "q"}, Point(x=1.0, name="q")),
    ],
)
def test_json_values_become_the_asked_type(hint, value, expected):
    assert from_json(hint, value, "here") == expected


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (float, True),
        (float, "1"),
        (float, float("nan")),
        (float, 10**400),
        (int, 1.0),
        (int, True),
        (bool, 1),
        (str, None),
        (str | None, 1),
        (Literal["a"], "c"),
        (Literal["a"], ["a"]),
        (Literal[1], True),
        (dict[str, float], {"a": "x"}),
        (dict[str, float], [1]),
        (tuple[float, float], [1]),
        (tuple[float, float], {"a": 1}),
        (tuple[str, ...], [1]),
        (Point, {"x": 1}),
        (Point, {"x": 1, "name": "q", "y": 1}),
        (Point, {"x": None, "name": "q"}),
        (Point, [1]),
    ],
)
def test_json_values_of_another_type_are_refused_with_their_place(hint, value):
    with pytest.raises(ValueError, match=r"^here"):
        from_json(hint, value, "here")


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    for padding in range(0x480 - 200, 0x480):
        write(tmp_path / "a", {}, {"text": " " * padding})
        length = (tmp_path / "a").read_bytes()[:2]
        if length == b"\x80\x04":
            break
    assert length == b"\x80\x04"
    assert read(tmp_path / "a") == ({}, {"text": " " * padding})
