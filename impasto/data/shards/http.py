"""A shard on a web server: its samples by Range requests over connections that are kept, and all of it as a stream.

A request that fails for a passing reason (a lost connection, a busy server) is made again a few times; a stream goes on
at the byte where it was broken off.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

from impasto.core.errors import UserError
from impasto.data.shards.connection import LOGIN, PATIENCE, connect, headers_of, is_hub, path_of
from impasto.data.shards.pool import Pool

#: a request is made so often at most, seconds before the second try (then twice as long each time), and the longest of
#: these waits
TRIES, PAUSE, LONGEST_PAUSE = 6, 0.5, 20.0
#: answers that another try may better, answers that lead elsewhere, and how often in a row they may
PASSING, ELSEWHERE, MOST_HOPS = frozenset({408, 425, 429, 500, 502, 503, 504}), (301, 302, 303, 307, 308), 8
#: what goes wrong with a connection
BROKEN = (OSError, http.client.HTTPException)

R = TypeVar("R")

_CONNECTIONS: Pool[http.client.HTTPConnection] = Pool(16)


@dataclass(frozen=True)
class About:
    """What a server says of a file. Without `ranges` it can only be fetched whole."""

    length: int | None
    ranges: bool
    etag: str
    modified: str

    @property
    def stamp(self) -> list[object] | None:
        """What changes with the file; None where the server says nothing that would."""
        return [self.length, self.etag, self.modified] if self.etag or self.modified else None


class HttpFile:
    """A file at a URL. All errors are `UserError`s that name it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.shown = _without_secrets(url)
        self._target = url  # where the server sent us last: links of large stores are good for a while

    def about(self) -> About:
        """Ask for the first byte alone, which tells everything else."""
        def once() -> About:
            with self._asked({"Range": "bytes=0-0"}, {200, 206, 416}) as answer:
                _, total = _content_range(answer)
                if answer.status == 200:
                    length = answer.getheader("Content-Length")
                    total = int(length) if length and length.isdigit() else None
                else:
                    answer.read()
                return About(total, answer.status != 200, answer.getheader("ETag") or "",
                             answer.getheader("Last-Modified") or "")

        return self._persistently(once)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer where the file has become shorter."""
        if size == 0:
            return b""

        def once() -> bytes:
            with self._asked({"Range": f"bytes={offset}-{offset + size - 1}"}, {206, 416}) as answer:
                if answer.status == 416:
                    return b""
                if _content_range(answer)[0] != offset:
                    raise http.client.HTTPException("another range than was asked for")
                data, told = answer.read(size), answer.getheader("Content-Length")
                if told and told.isdigit() and len(data) < min(size, int(told)):
                    raise http.client.HTTPException(f"broken off at byte {offset + len(data):,}")
                return data

        return self._persistently(once)

    @contextlib.contextmanager
    def stream(self, *, ranges: bool) -> Iterator[_Stream]:
        """The whole file, to be read once; `ranges`: whether a broken one can go on in the middle."""
        stream = _Stream(self, ranges)
        try:
            yield stream
        finally:
            stream.close()

    # --- requests ----------------------------------------------------------------------------------------
    def _persistently(self, attempt: Callable[[], R]) -> R:
        """What `attempt` gives, tried again where it fails for a passing reason."""
        for number in range(TRIES):
            try:
                return attempt()
            except BROKEN as error:
                self._target = self.url
                if number == TRIES - 1 or isinstance(error, ssl.SSLCertVerificationError):
                    raise UserError(f"cannot be read ({_reason(error)})", where=self.shown,
                                    fix="see whether the server can be reached, and run the same command again") \
                        from error
                wait = min(LONGEST_PAUSE, getattr(error, "wait", None) or PAUSE * 2**(number - 1))
                time.sleep(0 if number == 0 and not isinstance(error, _Busy) else wait)
        raise AssertionError("the last try has returned or raised")

    @contextlib.contextmanager
    def _asked(self, headers: Mapping[str, str], expected: set[int]) -> Iterator[http.client.HTTPResponse]:
        """The answer to one GET, redirects followed. Its connection is kept if it is read to its end."""
        url = self._target
        for _ in range(MOST_HOPS):
            parts = urlsplit(url)
            key = (parts.scheme, parts.hostname, parts.port)
            kept: http.client.HTTPResponse | None = None
            with contextlib.suppress(_NotKept), _CONNECTIONS.taken(key, lambda parts=parts: connect(parts)) as line:
                line.request("GET", path_of(parts), headers=headers_of(parts, headers))
                answer = line.getresponse()
                if answer.status in ELSEWHERE:
                    url = urljoin(url, answer.getheader("Location") or "")
                    if urlsplit(url).scheme not in ("http", "https"):
                        raise UserError(f"leads to {_without_secrets(url)}, which is not on the web", where=self.shown)
                    raise _NotKept
                if answer.status in expected:
                    self._target = url
                    kept = answer
                    yield answer
                elif answer.status in PASSING or url != self.url and self._target == url:
                    raise _Busy(answer)
                else:
                    fix = {401: "it asks for a password", 403: "it is not open to everyone"}.get(answer.status)
                    if is_hub(parts) and answer.status in (401, 403, 404):  # of what is private, it says 404
                        fix = f"see whether the address is right; if it is private or gated: {LOGIN}"
                    raise UserError(f"the server answers {answer.status} {answer.reason}", where=self.shown,
                                    fix=fix or "see whether the address is right: data.shards=…")
                if not answer.isclosed() or answer.will_close:
                    raise _NotKept
            if kept is not None:
                return
        raise UserError(f"the server leads elsewhere more than {MOST_HOPS} times", where=self.shown)


class _Stream:
    """A file from its first byte on, taken up again where the connection breaks."""

    def __init__(self, file: HttpFile, ranges: bool) -> None:
        self.file, self.ranges, self.position = file, ranges, 0
        self._open: contextlib.ExitStack | None = None
        self._answer: http.client.HTTPResponse | None = None
        self._left: int | None = None

    def read(self, size: int) -> bytes:
        """The next bytes; fewer only at the end."""
        parts = []
        while size:
            piece = self.file._persistently(lambda wanted=size: self._piece(wanted))
            if not piece:
                break
            parts.append(piece)
            size -= len(piece)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _piece(self, size: int) -> bytes:
        if self._left == 0:
            return b""
        try:
            if self._answer is None:
                self._begin()
            assert self._answer is not None
            piece = self._answer.read(size)
            if not piece and self._left:
                raise http.client.HTTPException(f"broken off at byte {self.position:,}")
        except BROKEN:
            self.close()
            if not self.ranges and self.position:
                raise UserError(f"the connection broke off at byte {self.position:,}", where=self.file.shown,
                                fix="run the same command again") from None
            raise
        self.position += len(piece)
        if self._left is not None:
            self._left -= len(piece)
        return piece

    def _begin(self) -> None:
        self._open = contextlib.ExitStack()
        wanted = {"Range": f"bytes={self.position}-"} if self.position else {}
        self._answer = self._open.enter_context(self.file._asked(wanted, {206} if wanted else {200, 206}))
        length = self._answer.getheader("Content-Length")
        self._left = int(length) if length and length.isdigit() else None

    def close(self) -> None:
        """Let go of the connection."""
        stack, self._open, self._answer = self._open, None, None
        if stack is not None:
            with contextlib.suppress(*BROKEN):
                stack.close()


class _NotKept(Exception):
    """The connection cannot be used again."""


class _Busy(http.client.HTTPException):
    """An answer that another try may better."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        after = answer.getheader("Retry-After") or ""
        self.wait = float(after) if after.isdigit() else None
        super().__init__(f"the server answers {answer.status} {answer.reason}")


def _content_range(answer: http.client.HTTPResponse) -> tuple[int | None, int | None]:
    """First byte and total length in "bytes 5-9/100"."""
    told = (answer.getheader("Content-Range") or "").removeprefix("bytes ")
    span, _, total = told.partition("/")
    first = span.partition("-")[0]
    return int(first) if first.isdigit() else None, int(total) if total.isdigit() else None


def _without_secrets(url: str) -> str:
    """The address for messages: without password and signature."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _reason(error: BaseException) -> str:
    if isinstance(error, socket.gaierror):
        return "there is no such server, or no network"
    if isinstance(error, TimeoutError):
        return f"no answer in {PATIENCE:.0f} seconds"
    return str(error) or type(error).__name__
