from __future__ import annotations

import hashlib
import io
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest

from td3_fast.data import DATASETS, FetchError, catalogue, fetch, find_dataset, generate_interactions, resolve

RATINGS = b"1\t10\t5\t100\n1\t11\t5\t200\n2\t10\t5\t100\n"
AMAZON = b"B00005N7P0,AH2IFH762VY5U,5.0,1005177600\n"


def zipped(member: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, content)
    return buffer.getvalue()


class Server:
    """Stands in for pooch: hands out `content` by address, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, content: dict[str, bytes]) -> None:
        self.content, self.asked = content, 0
        pooch = types.SimpleNamespace(HTTPDownloader=lambda progressbar, headers: self.download)
        monkeypatch.setattr(catalogue, "_pooch", lambda: pooch)

    def download(self, url: str, stream: Any, pooch: Any) -> None:
        self.asked += 1
        content = self.content.get(url.rpartition("/")[2])
        if content is None:
            stream.write(b"half of it")
            raise OSError("the line went dead")
        stream.write(content)


@pytest.fixture
def ml_100k(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small archive, with its own checksum in the catalogue."""
    archive = zipped("ml-100k/u.data", RATINGS)
    entry = {name: getattr(DATASETS["ml-100k"], name) for name in DATASETS["ml-100k"].__dataclass_fields__}
    entry["checksum"] = "md5:" + hashlib.md5(archive, usedforsecurity=False).hexdigest()
    monkeypatch.setattr(catalogue, "DATASETS", {**DATASETS, "ml-100k": catalogue.Dataset(**entry)})
    return archive


def test_a_fetched_archive_is_checked_unpacked_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ml_100k: bytes
) -> None:
    server = Server(monkeypatch, {"ml-100k.zip": ml_100k})
    log = resolve("ml-100k", cache=tmp_path)
    assert (log.name, log.num_users, log.num_interactions) == ("ml-100k", 2, 3)
    assert resolve("ml-100k", cache=tmp_path, format=None, name=None).name == "ml-100k"
    assert fetch("ml-100k", cache=tmp_path) == tmp_path / "ml-100k" / "u.data"
    assert server.asked == 1
    assert sorted(path.name for path in (tmp_path / "ml-100k").iterdir()) == [
        "ml-100k.zip",
        "u.data",
        "u.data.sha256",
    ]


def test_an_archive_with_another_checksum_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Server(monkeypatch, {"ml-100k.zip": zipped("ml-100k/u.data", RATINGS)})
    with pytest.raises(FetchError, match="damaged or another version: its md5 checksum is"):
        fetch("ml-100k", cache=tmp_path)
    assert list((tmp_path / "ml-100k").iterdir()) == []


def test_the_first_download_is_pinned_where_no_checksum_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(monkeypatch, {"Magazine_Subscriptions.csv": AMAZON})
    log = resolve("magazine-2018", cache=tmp_path)
    assert log.user_ids.tolist() == ["AH2IFH762VY5U"]
    file = fetch("magazine-2018", cache=tmp_path)
    record = file.with_name(file.name + ".sha256").read_text()
    assert record == f"{hashlib.sha256(AMAZON).hexdigest()}  Magazine_Subscriptions.csv\n"
    file.write_bytes(AMAZON + AMAZON)
    with pytest.raises(FetchError, match="is not what was fetched"):
        fetch("magazine-2018", cache=tmp_path)
    assert server.asked == 1


def test_a_broken_download_leaves_nothing_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ml_100k: bytes
) -> None:
    server = Server(monkeypatch, {})
    with pytest.raises(FetchError) as caught:
        fetch("ml-100k", cache=tmp_path)
    message = str(caught.value)
    for part in (
        "the line went dead",
        "ml-100k.zip",
        "GroupLens",
        str(tmp_path / "ml-100k"),
        "MovieLens 100K",
    ):
        assert part in message
    assert "\n" not in message
    assert list((tmp_path / "ml-100k").iterdir()) == []
    server.content["ml-100k.zip"] = ml_100k
    assert fetch("ml-100k", cache=tmp_path).exists()


def test_without_pooch_the_way_by_hand_is_named_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ml_100k: bytes
) -> None:
    monkeypatch.setattr(catalogue, "_pooch", lambda: None)
    with pytest.raises(FetchError, match=r"pooch, .* is not installed.* put it into .*ml-100k"):
        fetch("ml-100k", cache=tmp_path)
    with pytest.raises(FetchError, match="give the path of the data file instead"):
        fetch("ml-100k")
    folder = tmp_path / "ml-100k"
    folder.mkdir()
    (folder / "ml-100k.zip").write_bytes(ml_100k)
    assert resolve("ml-100k", cache=tmp_path).num_interactions == 3


def test_a_file_put_there_by_hand_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_pooch", lambda: None)
    (tmp_path / "ml-100k").mkdir()
    (tmp_path / "ml-100k" / "u.data").write_bytes(RATINGS)
    assert resolve("ml-100k", cache=tmp_path).num_interactions == 3


@pytest.mark.parametrize("name", ["synthetic", "epinions"])
def test_what_is_no_file_is_not_fetched(name: str) -> None:
    with pytest.raises(FetchError, match=f"there is no file to fetch for {name}"):
        fetch(name)


def test_synthetic_needs_nothing_and_takes_filters() -> None:
    assert (
        resolve("synthetic").fingerprint == generate_interactions(seed=catalogue.SYNTHETIC_SEED).fingerprint
    )
    assert resolve("synthetic", min_user_interactions=10).lengths.min() >= 10


def test_an_existing_path_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("synthetic").write_bytes(RATINGS)
    assert resolve("synthetic").num_interactions == 3
    assert resolve("synthetic", min_item_interactions=2).num_items == 2


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no file 'ml-2k', and no data set 'ml-2k'; known are .*ml-100k"
    ):
        resolve("ml-2k")


def test_a_name_that_lacks_an_ending_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "log.inter.gz").touch()
    with pytest.raises(FileNotFoundError, match=r"there is .*log\.inter\.gz"):
        resolve(tmp_path / "log.inter")


def test_any_amazon_category_has_an_entry() -> None:
    entry = find_dataset("amazon-2023-Video_Games")
    assert entry.url is not None
    assert entry.url.endswith("/Video_Games.csv.gz")
    assert find_dataset("amazon-2018-Video_Games").format == "csv-item-user"
    with pytest.raises(LookupError, match="known are"):
        find_dataset("amazon-2023-../x")


def test_every_entry_says_whose_it_is_and_on_which_terms() -> None:
    for name, entry in DATASETS.items():
        assert entry.name == name
        assert entry.title
        assert entry.publisher
        assert entry.terms
        assert entry.description
        assert entry.url is None or entry.page


def test_downloads_over_http_arrive_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pooch")
    import http.server
    import threading

    content = b"user_id,parent_asin,rating,timestamp\na,x,5.0,1\n"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        entry = catalogue.Dataset(
            name="local",
            title="Local",
            description="a test",
            publisher="nobody",
            terms="none",
            url=f"http://127.0.0.1:{server.server_address[1]}/local.csv",
        )
        monkeypatch.setattr(catalogue, "DATASETS", {"local": entry})
        try:
            assert fetch("local", cache=tmp_path).read_bytes() == content
        finally:
            server.shutdown()
            thread.join()
