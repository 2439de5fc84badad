"""What each of several processes does to one cache, in a module that a spawned process imports quickly."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch

from impasto.core.progress import SILENT
from impasto.data.cache import Cache, key_of
from impasto.data.shards import cache as shards_cache
from impasto.data.shards.cache import Packs


def together(task: Callable[[Path, int], None], folder: Path) -> None:
    """Have two processes do a task of this module to one folder; both must end well."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=task, args=(folder, rank)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def fill_and_take(folder: Path, rank: int) -> None:
    """Fill the cache, take entries away under the other's eyes, fill it again."""
    cache, keys = Cache(folder), [key_of(i) for i in range(20)]
    makers = {key: (lambda i=i: {"x": torch.full((100,), float(i))}) for i, key in enumerate(keys)}
    for _ in range(5):
        cache.fill(makers, "filling", "entries", SILENT, rank, 2)
        for key in keys[rank::2]:
            cache.path(key).unlink(missing_ok=True)
    for _ in range(3):
        cache.fill(makers, "filling", "entries", SILENT, rank, 2)


def fill_packs(folder: Path, rank: int) -> None:
    """Fill a cache of tars beside another process."""
    keys = [key_of(i) for i in range(200)]
    makers = {key: (lambda i=i: {"x": torch.full((100,), float(i))}) for i, key in enumerate(keys)}
    shards_cache.PACK_ENTRIES = 16
    packs = Packs(folder)
    packs.fill(makers, "filling", "entries", SILENT, rank, 2)
    packs.load_all(keys)
