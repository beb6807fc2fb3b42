import errno
import json
import os

import pytest

from td3_fast.files import make_folder, open_atomically, write_bytes, write_folder, write_json, write_text


def names(folder):
    return sorted(os.listdir(folder))


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    target = tmp_path / "a.bin"
    write_bytes(target, b"old")
    write_bytes(target, b"new")
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_no_temporary_one(tmp_path, error):
    target = tmp_path / "a.bin"
    write_bytes(target, b"old")

    def fail_half_way():
        with open_atomically(target) as file:
            file.write(b"half of the new")
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_the_old_file_is_whole_until_the_block_ends(tmp_path):
    target = tmp_path / "a.bin"
    write_bytes(target, b"old")
    with open_atomically(target) as file:
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"old"


def test_contents_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(os.fstat(descriptor).st_mode & 0o170000))
    replace = type(tmp_path).replace
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda self, to: (calls.append("rename"), replace(self, to))[1]
    )
    write_bytes(tmp_path / "a.bin", b"x")
    regular_file, folder = 0o100000, 0o040000
    assert calls == [regular_file, "rename", folder]


def test_the_mode_is_that_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").write_bytes(b"")
    write_bytes(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_symbolic_link_stays_and_its_file_is_replaced(tmp_path):
    write_bytes(tmp_path / "real", b"old")
    (tmp_path / "link").symlink_to("real")
    write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_name_of_the_greatest_length_can_be_written(tmp_path):
    name = "n" * 255
    write_bytes(tmp_path / name, b"x")
    assert names(tmp_path) == [name]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_bytes(tmp_path / "missing" / "a.bin", b"x")


def test_text_is_utf8_and_json_reads_back(tmp_path):
    write_text(tmp_path / "a.txt", "é\r\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\r\n"
    value = {"é": [1, None, 0.1], "b": {"c": True}}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value


def test_a_number_that_json_does_not_have_is_refused_and_the_old_file_stays(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_a_new_folder_appears_whole_with_its_parents(tmp_path):
    write_folder(tmp_path / "a" / "b", {"one": b"1", "two": b"2"})
    assert names(tmp_path / "a") == ["b"]
    assert names(tmp_path / "a" / "b") == ["one", "two"]


def test_in_an_existing_folder_only_the_named_files_change(tmp_path):
    write_folder(tmp_path / "a", {"one": b"1", "other": b"kept"})
    write_folder(tmp_path / "a", {"one": b"new", "two": b"2"})
    assert {name: (tmp_path / "a" / name).read_bytes() for name in names(tmp_path / "a")} == {
        "one": b"new",
        "other": b"kept",
        "two": b"2",
    }
    assert names(tmp_path) == ["a"]


def test_a_folder_cannot_take_the_place_of_a_file(tmp_path):
    write_bytes(tmp_path / "a", b"file")
    with pytest.raises(OSError, match="directory"):
        write_folder(tmp_path / "a", {"one": b"1"})
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"file"


def test_a_folder_is_made_with_those_around_it_unless_a_file_is_in_the_way(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(NotADirectoryError, match="file is a file: name a folder"):
            make_folder(place)


def test_what_is_no_text_is_written_as_json_has_it(tmp_path):
    name = b"donn\xe9es".decode(errors="surrogateescape")
    write_json(tmp_path / "a.json", name)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == name


def test_an_error_of_the_system_names_the_file(tmp_path):
    with pytest.raises(OSError, match="bin") as caught, open_atomically(tmp_path / "a.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []
