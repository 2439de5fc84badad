"""Where shards are: patterns, files, and web servers with and without Range, that fail and come back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from impasto.core.errors import UserError
from impasto.data.shards import http as shards_http
from impasto.data.shards.access import HttpShard, LocalShard, expanded, reached
from impasto.data.shards.connection import headers_of
from impasto.data.shards.http import HttpFile
from tests.data.sharded import Server, serving
from tests.heard import Heard

DATA = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_http, "PAUSE", 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.tar").write_bytes(DATA)
    return tmp_path / "web"


# --- patterns ----------------------------------------------------------------------------------------------


def test_numbers_and_choices_in_braces() -> None:
    assert expanded(["http://x/s-{0008..0011}.tar"]) == [f"http://x/s-{i:04d}.tar" for i in range(8, 12)]
    assert expanded(["https://x/{train,val}-{1..2}.tar", "https://y/a.tar"]) == [
        "https://x/train-1.tar", "https://x/train-2.tar", "https://x/val-1.tar", "https://x/val-2.tar",
        "https://y/a.tar"]


def test_files_globs_and_folders(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / name).write_bytes(b"")
    both = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    assert expanded([str(tmp_path)]) == expanded([str(tmp_path / "*.tar")]) == \
        expanded([str(tmp_path / "{a,b}.tar")]) == expanded(both) == both


@pytest.mark.parametrize(("pattern", "says"), [
    ("{dir}/none.tar", "no such shard"), ("{dir}/*.zip", "no file is called so"), ("{dir}", "no .tar files"),
    ("pipe:cat a.tar", "neither a file nor a web address"), ("s3://x/a.tar", "neither a file nor a web address"),
    ("http://x/{{5..3}}.tar", "no range"), ("http://x/{{0..99999999}}.tar", "no range"),
    ("http://x/{{a,a}}.tar", "named twice"),
])
def test_patterns_that_find_nothing(pattern: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        expanded([pattern.format(dir=tmp_path)])


# --- reading -----------------------------------------------------------------------------------------------


def test_parts_of_a_file(folder: Path) -> None:
    shard = LocalShard(folder / "a.tar")
    assert shard.read(300, 50) == DATA[300:350] and shard.read(len(DATA) - 5, 50) == DATA[-5:]
    with ThreadPoolExecutor(8) as pool:
        places = [i * 97 % len(DATA) for i in range(400)]
        assert list(pool.map(lambda place: shard.read(place, 64), places)) == [DATA[p:p + 64] for p in places]
    with pytest.raises(UserError, match="no such shard"):
        LocalShard(folder / "b.tar").read(0, 5)


def test_parts_over_http_on_connections_that_are_kept(folder: Path, tmp_path: Path) -> None:
    with serving(folder) as server:
        shard = reached(server.url("a.tar"), tmp_path)
        assert isinstance(shard, HttpShard) and shard.label == "a.tar" and shard.about.length == len(DATA)
        assert shard.read(300, 50) == DATA[300:350] and shard.read(len(DATA) - 5, 50) == DATA[-5:]
        assert shard.read(len(DATA) + 5, 50) == b"" and shard.read(0, 0) == b""
        with ThreadPoolExecutor(8) as pool:
            places = [i * 97 % len(DATA) for i in range(200)]
            assert list(pool.map(lambda place: shard.read(place, 64), places)) == [DATA[p:p + 64] for p in places]
        with shard.stream() as read:
            assert read(100) == DATA[:100] and read(10**6) == DATA[100:] and read(5) == b""
        assert shard.stamp() == HttpFile(shard.name).about().stamp is not None
        (folder / "a.tar").write_bytes(DATA[:-1] + b"!")
        assert shard.stamp() != HttpFile(shard.name).about().stamp


def test_a_stream_goes_on_where_it_was_broken_off(folder: Path, tmp_path: Path) -> None:
    with serving(folder) as server:
        shard = reached(server.url("a.tar"), tmp_path)
        server.break_off = [4000, 100, 0, 3000]
        with shard.stream() as read:
            assert read(10**6) == DATA
        assert [wanted for _, wanted in server.asked if wanted and wanted.endswith("-")][:2] == \
            ["bytes=4000-", "bytes=4100-"]
        server.break_off = [10]
        assert shard.read(100, 500) == DATA[100:600]


def test_a_busy_server_is_asked_again_and_a_broken_one_named(folder: Path, tmp_path: Path) -> None:
    with serving(folder) as server:
        shard = reached(server.url("a.tar"), tmp_path)
        server.busy = 3
        assert shard.read(5, 5) == DATA[5:10] and not server.busy
        server.busy = 100
        with pytest.raises(UserError, match=r"a\.tar: cannot be read \(the server answers 503"):
            shard.read(5, 5)
        server.busy = 0
        with pytest.raises(UserError, match="answers 404"):
            reached(server.url("b.tar"), tmp_path)
        address = server.url("a.tar")
    with pytest.raises(UserError, match="cannot be read .*see whether the server can be reached"):
        reached(address, tmp_path)


def test_redirects_are_followed_and_remembered(folder: Path, tmp_path: Path) -> None:
    with serving(folder) as server:
        shard = reached(server.url("moved/a.tar"), tmp_path)
        server.asked.clear()
        assert shard.read(0, 10) == DATA[:10] and [path for path, _ in server.asked] == ["/a.tar"]


def test_passwords_in_addresses_are_not_told() -> None:
    assert HttpFile("https://me:secret@x.org/a.tar?token=abc").shown == "https://x.org/a.tar"


# --- the hub's token ---------------------------------------------------------------------------------------

TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that stands for the hub, and asks for the token."""
    with serving(folder, token=TOKEN) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder.parent / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_the_hub_is_shown_the_token_and_nobody_else(hub: Server, folder: Path, tmp_path: Path) -> None:
    with serving(folder) as other:
        hub.elsewhere = other.address
        shard = reached(hub.url("moved/a.tar"), tmp_path)
        assert shard.read(0, 10) == DATA[:10] and shard.read(300, 5) == DATA[300:305]
        with shard.stream() as read:
            assert read(10**6) == DATA
        assert reached(other.url("a.tar"), tmp_path).read(0, 9) == DATA[:9]
        assert set(hub.shown) == {f"Bearer {TOKEN}"} and len(other.shown) > 4 and set(other.shown) == {None}
    assert TOKEN not in f"{shard.name} {shard.shown} {vars(shard)} {vars(shard.file)}"


def test_a_server_that_leads_to_the_hub_never_sees_the_token(hub: Server, folder: Path, tmp_path: Path) -> None:
    with serving(folder, elsewhere=hub.address) as other:
        assert reached(other.url("moved/a.tar"), tmp_path).read(0, 10) == DATA[:10]
        assert set(other.shown) == {None} and set(hub.shown) == {f"Bearer {TOKEN}"}


def test_the_token_of_a_login_counts_and_an_address_may_have_its_own(
        hub: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (folder.parent / "token").write_text(f"{TOKEN}\n", encoding="utf-8")
    assert reached(hub.url("a.tar"), tmp_path).read(0, 10) == DATA[:10]
    hub.shown.clear()
    with pytest.raises(UserError, match="answers 401"):
        reached(hub.url("a.tar").replace("http://", "http://me:word@"), tmp_path)
    assert hub.shown == ["Basic bWU6d29yZA=="]


@pytest.mark.parametrize("token", ["", "hf_wrongwrong", "hf_wröng", "hf_wrong…"])
def test_a_token_that_does_not_do_is_one_line_without_it(token: str, hub: Server, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match="hf auth login.*HF_TOKEN") as raised:
        reached(hub.url("a.tar"), tmp_path)
    assert "\n" not in str(raised.value) and "hf_" not in str(raised.value)


@pytest.mark.parametrize("address", ["https://huggingface.co.evil.org/a", "http://huggingface.co/a",
                                     "https://huggingface.co:444/a", "https://evil.org/https://huggingface.co/a",
                                     "https://evil.org@evil.org/huggingface.co"])
def test_what_only_looks_like_the_hub_gets_no_token(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert TOKEN not in str(headers_of(urlsplit(address), {}))
    for own in ("https://huggingface.co/datasets/me/x/resolve/main/a.tar", "https://HuggingFace.co:443/a"):
        assert headers_of(urlsplit(own), {})["Authorization"] == f"Bearer {TOKEN}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert "Authorization" not in headers_of(urlsplit(own), {})


def test_without_range_a_shard_is_fetched_once_and_said_so(folder: Path, tmp_path: Path) -> None:
    with serving(folder, ranges=False) as server:
        heard = Heard()
        shard = reached(server.url("a.tar"), tmp_path / "copies", heard)
        assert isinstance(shard, LocalShard) and shard.name == server.url("a.tar") and shard.label == "a.tar"
        assert len(heard.notes) == 1 and "fetched whole" in heard.notes[0]
        asked = len(server.asked)
        assert shard.read(300, 50) == DATA[300:350] and len(server.asked) == asked
        again = reached(server.url("a.tar"), tmp_path / "copies", heard)
        assert again.read(0, 9) == DATA[:9] and len(heard.notes) == 1 and again.stamp() == shard.stamp() is not None
        (folder / "a.tar").write_bytes(DATA[:-1] + b"!")
        changed = reached(server.url("a.tar"), tmp_path / "copies", heard)
        assert changed.read(0, 10**6) == DATA[:-1] + b"!" and len(heard.notes) == 2
        server.break_off = [500, 500, 500]
        (folder / "b.tar").write_bytes(DATA)
        with pytest.raises(UserError, match="broke off at byte 500"):
            reached(server.url("b.tar"), tmp_path / "copies", heard)
        assert not list((tmp_path / "copies").glob("*.part"))


def test_a_server_that_never_says_what_changed_is_never_believed(folder: Path, tmp_path: Path) -> None:
    with serving(folder, validators=False) as server:
        assert reached(server.url("a.tar"), tmp_path).stamp() is None


def test_a_file_just_written_is_not_believed_either(folder: Path) -> None:
    assert time.time() - (folder / "a.tar").stat().st_mtime < 2 and LocalShard(folder / "a.tar").stamp() is None
