"""Encoded pictures and captions of large sets: many entries in one tar, each a safetensors member, found by an index.

The keys and the bytes of entries are those of `cache.Cache`, so that none is ever stale; a set of a million is some
thousand files instead of two million. Each tar is written atomically and stays as it is; the index (SQLite) knows which
tar holds an entry, and where. A tar or an index that is lost costs time, never correctness: entries are made again,
or found again in the tars. Webdataset reads the tars too: a sample's key is the entry's, its extension safetensors.
"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.files import atomic_write, cache_dir, disk_error, key_of
from impasto.core.progress import Reporter
from impasto.data.cache import Cache, packed, unpacked
from impasto.data.shards.access import read_at
from impasto.data.shards.tar import BLOCK, CutShort, members

#: a tar is closed at so many bytes, so many entries or after so many seconds: no more than that is lost in a kill
PACK_BYTES, PACK_ENTRIES, PACK_SECONDS = 64 << 20, 1024, 60.0
#: items whose keys are looked up at once, and threads that load what is to be encoded
AT_ONCE, LOADERS = 256, 4
#: seconds that a process waits while another writes to the index
WAIT = 300.0

_TABLES = """
create table if not exists packs (id integer primary key, name text unique not null, size integer not null);
create table if not exists entries (key blob primary key, pack integer not null, offset integer not null,
                                    size integer not null) without rowid;
create index if not exists of_pack on entries (pack);
create table if not exists complete (name text primary key);
"""


@dataclass(frozen=True)
class Making:
    """How an entry comes about: `load` in another thread and ahead of time, `encode` what it gives."""

    load: Callable[[], Any]
    encode: Callable[[Any], Mapping[str, Tensor]]


class Packs(Cache):
    """A folder of tars with an index."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._lock = threading.Lock()
        self._index: sqlite3.Connection | None = None

    @classmethod
    def at(cls, folder: str | None) -> Packs:
        """In that folder, or in the user's cache directory."""
        return cls((Path(folder) if folder else cache_dir()) / "shards" / "encoded")

    # --- entries -----------------------------------------------------------------------------------------
    def path(self, key: str) -> Path:
        """The tar that holds an entry, or the folder where there is none."""
        found = self._ask("select name from packs join entries on pack = id where key = ?", bytes.fromhex(key))
        return self.folder / found[0][0] if found else self.folder

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The entry's tensors, on the CPU; None where it is absent or damaged, and the next `fill` makes it again."""
        return next(self._load([key]))

    def load_all(self, keys: Sequence[str]) -> list[dict[str, Tensor]]:
        """As `Cache.load_all`."""
        return [self._there(key, entry) for key, entry in zip(keys, self._load(keys), strict=True)]

    def _load(self, keys: Sequence[str]) -> Iterator[dict[str, Tensor] | None]:
        """`load` of each, with one question for all."""
        some = [bytes.fromhex(key) for key in keys]
        places = {key: place for key, *place in self._ask(
            "select key, name, offset, entries.size from packs join entries on pack = id where key in "
            f"({','.join('?' * len(some))})", *some)}
        for key in some:
            name, offset, size = places.get(key, ("", 0, 0))
            entry = None
            with contextlib.suppress(FileNotFoundError):
                entry = unpacked(read_at(self.folder / name, offset, size)) if name else None
            if entry is None and name:
                with self._changing() as index:
                    index.execute("delete from entries where key = ?", (key,))
                    index.execute("delete from complete")
            yield entry

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a tar of one entry. Raises `UserError` on a full disk."""
        self._write([(key, packed(tensors))])

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys under which there is no entry, in their order."""
        keys = list(keys)
        known = set()
        for start in range(0, len(keys), 500):  # SQLite's own limit is 999 in old versions
            some = [bytes.fromhex(key) for key in keys[start:start + 500]]
            known |= {key.hex() for key, in self._ask(
                f"select key from entries where key in ({','.join('?' * len(some))})", *some)}
        return [key for key in keys if key not in known]

    def fill(self, makers: Mapping[str, Callable[[], Mapping[str, Tensor]]], title: str, unit: str,
             report: Reporter, rank: int = 0, world: int = 1) -> int:
        """As `Cache.fill`."""
        keys = list(makers)

        def making(i: int) -> dict[str, Making]:
            return {keys[i]: Making(lambda: None, lambda _: makers[keys[i]]())}

        return self.fill_many(len(keys), making, "", title, unit, report, rank, world)

    def fill_many(self, count: int, making: Callable[[int], Mapping[str, Making]], name: str, title: str, unit: str,
                  report: Reporter, rank: int = 0, world: int = 1) -> int:
        """Make what is absent of the entries that `making` tells of items 0, 1, …; returns how many were made here.

        Under a `name`, an order that was once complete is not gone through again. Each process begins at its own share
        and goes once around, passing over what others made meanwhile.
        """
        self._verify()
        if name and self._ask("select 1 from complete where name = ?", name):
            return 0
        start = rank * count // world
        order = itertools.chain(range(start, count), range(start))
        made = 0
        with report.phase(title, count, unit) as advance, _Writer(self) as writer, \
                ThreadPoolExecutor(LOADERS, thread_name_prefix="loading") as pool:
            for some in iter(lambda: list(itertools.islice(order, AT_ONCE)), []):
                wanted: dict[str, Making] = {}
                owner: dict[str, int] = {}
                for i in some:
                    for key, one in making(i).items():
                        wanted[key], owner[key] = one, i
                absent = [key for key in self.missing(wanted) if not writer.holds(key)]
                last = {owner[key]: key for key in absent}  # of each item that lacks any
                advance(len(some) - len(last))
                for key, loaded in _ahead(pool, [(key, wanted[key].load) for key in absent]):
                    if world == 1 or self.missing([key]):
                        writer.add(key, packed(wanted[key].encode(loaded)))
                        made += 1
                    advance(last[owner[key]] == key)
        if name:
            with self._changing() as index:
                index.execute("insert or ignore into complete values (?)", (name,))
        return made

    # --- tars and their index ----------------------------------------------------------------------------
    def _write(self, entries: Sequence[tuple[str, bytes]]) -> None:
        """One more tar, then its entries in the index."""
        name = f"{key_of([key for key, _ in entries], time.time_ns())[:16]}.tar"
        rows, offset = [], 0
        with atomic_write(self.folder / name) as file:
            for key, data in entries:
                header = tarfile.TarInfo(f"{key}.safetensors")
                header.size = len(data)
                file.write(header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK))
                rows.append((bytes.fromhex(key), offset + BLOCK, len(data)))
                offset += BLOCK + len(data) + -len(data) % BLOCK
            file.write(bytes(2 * BLOCK))
        self._enter(name, offset + 2 * BLOCK, rows)

    def _enter(self, name: str, size: int, rows: Sequence[tuple[bytes, int, int]]) -> None:
        with self._changing() as index:
            index.execute("insert or ignore into packs (name, size) values (?, ?)", (name, size))
            pack, = index.execute("select id from packs where name = ?", (name,)).fetchone()
            index.executemany("insert or replace into entries values (?, ?, ?, ?)",
                              [(key, pack, offset, length) for key, offset, length in rows])

    def _verify(self) -> None:
        """Forget what tars held that are gone or not whole, and take up those that the index does not know."""
        self.folder.mkdir(parents=True, exist_ok=True)
        there = {path.name: path.stat().st_size for path in self.folder.glob("*.tar")}
        known = dict(self._ask("select name, size from packs"))
        for name in [name for name, size in known.items() if there.get(name) != size]:
            with self._changing() as index:
                pack = index.execute("select id from packs where name = ?", (name,)).fetchone()
                if pack is not None:
                    index.execute("delete from entries where pack = ?", pack)
                    index.execute("delete from packs where id = ?", pack)
                index.execute("delete from complete")
        for name in there.keys() - known.keys():
            self._take_up(name, there[name])

    def _take_up(self, name: str, size: int) -> None:
        """A tar whose entries a kill, or the index's loss, kept out of it; or one of another process, just written."""
        rows = []
        with open(self.folder / name, "rb") as file, contextlib.suppress(CutShort, ValueError):
            for member in members(file.read, lambda name, size: False):
                key, _, kind = member.name.partition(".")
                if kind == "safetensors" and len(key) == 40:
                    rows.append((bytes.fromhex(key), member.offset, member.size))
        self._enter(name, size, rows)

    def _ask(self, question: str, *values: object) -> list[Any]:
        with self._lock, self._told():
            return self._connection().execute(question, values).fetchall()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """The index in a transaction."""
        with self._lock, self._told():
            connection = self._connection()
            with connection:
                connection.execute("begin immediate")
                yield connection

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if "full" in str(error):
                raise disk_error(OSError(28, str(error)), self.folder) from error
            raise UserError(f"the index of the cache cannot be used ({error})", where=self.folder / "index.sqlite",
                            fix="delete that file: it is made again from the tars beside it") from error

    def _connection(self) -> sqlite3.Connection:
        if self._index is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._index = sqlite3.connect(self.folder / "index.sqlite", timeout=WAIT, isolation_level=None,
                                          check_same_thread=False)
            self._index.executescript(_TABLES)
        return self._index


class _Writer:
    """Entries on their way into tars."""

    def __init__(self, packs: Packs) -> None:
        self.packs = packs
        self.waiting: dict[str, bytes] = {}
        self.bytes, self.since = 0, 0.0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *raised: object) -> None:
        self.flush()  # after an error too: what is encoded is encoded

    def holds(self, key: str) -> bool:
        """Whether an entry is among those not yet written."""
        return key in self.waiting

    def add(self, key: str, data: bytes) -> None:
        """One more entry; a tar is written when it is time."""
        if not self.waiting:
            self.since = time.monotonic()
        self.waiting[key] = data
        self.bytes += len(data)
        full = self.bytes >= PACK_BYTES or len(self.waiting) >= PACK_ENTRIES
        if full or time.monotonic() - self.since > PACK_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if self.waiting:
            self.packs._write(list(self.waiting.items()))
            self.waiting, self.bytes = {}, 0


def _ahead(pool: ThreadPoolExecutor, loads: Sequence[tuple[str, Callable[[], Any]]]) -> Iterator[tuple[str, Any]]:
    """Each key with what its `load` gives, in order; a few are loaded ahead."""
    waiting: list[tuple[str, Future[Any]]] = []
    rest = iter(loads)
    while True:
        waiting += [(key, pool.submit(load)) for key, load in itertools.islice(rest, 2 * LOADERS - len(waiting))]
        if not waiting:
            return
        key, future = waiting.pop(0)
        yield key, future.result()
