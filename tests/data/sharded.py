"""Shards to read: tar files as webdataset writes them, and a web server that counts what it is asked."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import os
import re
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from impasto.data.options import DataOptions
from impasto.data.shards.table import Survey, open_table, surveyed
from tests.data.fakes import noise_picture
from tests.data.photos import encoded

Members = Mapping[str, bytes]


def write_shard(path: Path, members: Members | Sequence[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar with these members in their order, old enough that its time stamp counts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return aged(path)


def aged(path: Path) -> Path:
    """The file with a time stamp of long ago, another one after each change."""
    stamp = 1_600_000_000 + int(hashlib.sha256(path.read_bytes()).hexdigest()[:6], 16)
    os.utime(path, (stamp, stamp))
    return path


def sample(key: str, number: int, size: tuple[int, int] = (64, 64), caption: str | None = "") -> dict[str, bytes]:
    """A random picture, a function of its number, and its caption ("caption 7" unless told)."""
    members = {f"{key}.png": encoded(noise_picture(number, size))}
    if caption is not None:
        members[f"{key}.txt"] = (caption or f"caption {number}").encode()
    return members


def write_shards(folder: Path, sizes: Sequence[Sequence[tuple[int, int]]]) -> list[Path]:
    """One shard for each list of sizes; pictures are numbered through."""
    paths, number = [], 0
    for i, own in enumerate(sizes):
        members: dict[str, bytes] = {}
        for size in own:
            members |= sample(f"{number:06d}", number, size)
            number += 1
        paths.append(write_shard(folder / f"shard-{i:04d}.tar", members))
    return paths


def bad_shard(folder: Path) -> Path:
    """Every kind of sample that cannot be used, and one that can."""
    good = sample("good", 1)
    members = [*good.items(), ("no-picture.txt", b"words"), ("heic.heic", b"x"), ("heic.txt", b"x"),
               ("broken.png", good["good.png"][:-40]), ("broken.txt", b"x"), ("bare.png", good["good.png"]),
               ("two.png", good["good.png"]), ("two.jpg", good["good.png"]), ("two.txt", b"x"),
               ("dot.png", sample("x", 1, (4, 4))["x.png"]), ("dot.txt", b"x"),
               ("latin.png", good["good.png"]), ("latin.txt", b"caf\xe9"), *sample("good", 2).items()]
    return write_shard(folder / "bad.tar", members)


def options(spec: object, **keys: Any) -> DataOptions:
    """Of a recipe that learns from shards: a path or patterns."""
    return DataOptions.model_validate({"source": "shards", "shards": str(spec) if isinstance(spec, Path) else spec,
                                       "resolution": 64, "bucket_step": 8, **keys})


def survey(spec: object, **keys: Any) -> Survey:
    """What is known of the shards of such a recipe."""
    data = options(spec, **keys)
    return surveyed(open_table(data), data)


@dataclass
class Server:
    """What a server did. `fail`: this many answers are broken off after so many bytes."""

    folder: Path
    ranges: bool = True
    validators: bool = True
    address: str = ""
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range
    sent: int = 0
    break_off: list[int] = field(default_factory=list)  # of the next answers, after so many bytes
    busy: int = 0  # of the next answers, so many are 503
    elsewhere: str = ""  # the server to which /moved/x leads, as /x there; else this one
    token: str = ""  # who does not show it is answered 401
    shown: list[str | None] = field(default_factory=list)  # Authorization, of each request

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"


@functools.lru_cache(maxsize=16)
def held(path: Path, size: int, time: int) -> tuple[bytes, str]:
    """A file's bytes and their digest, read once."""
    data = path.read_bytes()
    return data, hashlib.sha256(data).hexdigest()[:12]


@contextmanager
def serving(folder: Path, **options: object) -> Iterator[Server]:
    """A web server on this machine with the files of a folder."""
    server = Server(folder, **options)  # type: ignore[arg-type]

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are two writes

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            server.asked.append((self.path, wanted))
            server.shown.append(self.headers.get("Authorization"))
            if server.busy:
                server.busy -= 1
                self._plain(503)
                return
            if server.token and server.shown[-1] != f"Bearer {server.token}":
                self._plain(401)
                return
            if self.path.startswith("/moved/"):
                to = server.elsewhere or server.address
                self._plain(302, {"Location": f"{to}/{self.path.removeprefix('/moved/')}"})
                return
            path = server.folder / self.path.lstrip("/")
            if not path.is_file():
                self._plain(404)
                return
            info = path.stat()
            data, tag = held(path, info.st_size, info.st_mtime_ns)
            headers = {"ETag": f'"{tag}"'} if server.validators else {}
            status, body = 200, data
            if wanted and server.ranges:
                match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
                assert match is not None
                first = int(match[1])
                last = min(int(match[2]) if match[2] else len(data) - 1, len(data) - 1)
                if first >= len(data):
                    self._plain(416, {"Content-Range": f"bytes */{len(data)}"})
                    return
                status, body = 206, data[first:last + 1]
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if server.break_off and len(body) > 1:
                body = body[:server.break_off.pop(0)]
                self.close_connection = True
            server.sent += len(body)
            self.wfile.write(body)

        def _plain(self, status: int, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

    class Listening(http.server.ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that hangs up in the middle of an answer

    listening = Listening(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    server.address = f"http://127.0.0.1:{listening.server_port}"
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
