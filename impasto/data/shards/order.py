"""The order of samples in shards: a pure function of (seed, epoch) that reads them nearly in sequence.

In each epoch the shards come in another order. Along it, every `window` samples are shuffled among each other. Of the
samples in this order each bucket's are taken `group` at a time, wherever windows end, and the micro-batches of a window
are shuffled among each other. A bucket's last micro-batch is filled up from the bucket's first samples of the epoch, as
in `order`: nothing is dropped, and no more than group - 1 samples a bucket come twice.

An epoch is made whole, as numbers: 4 bytes a sample, a fraction of a second for a million.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch

from impasto.core.rng import generator, permutation

#: epochs that are kept: a step may reach over into the next one, and the next step is read ahead
KEPT = 2


class ShardOrder:
    """The stream of micro-batches over samples 0, 1, … that lie in shards.

    `sizes`: how many of them each shard has. `bucket`: (N,) the number of each one's bucket. `group`: samples in a
    micro-batch, over all ranks. `stream`: as in `Order`.
    """

    def __init__(self, sizes: Sequence[int], bucket: np.ndarray, window: int, group: int, seed: int,
                 stream: str) -> None:
        self.sizes, self.bucket, self.window = list(sizes), bucket, window
        self.group, self.seed, self.stream = group, seed, stream
        assert sum(sizes) == len(bucket)
        self.epoch_length = int(sum(-(-np.bincount(bucket) // group)))
        self._epochs: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def micro_batch(self, index: int) -> Sequence[int]:
        """The `group` samples of the stream's micro-batch `index`."""
        epoch, place = divmod(index, self.epoch_length)
        with self._lock:
            if epoch not in self._epochs:
                while len(self._epochs) >= KEPT:
                    del self._epochs[min(self._epochs, key=lambda known: (abs(known - epoch) < KEPT, known))]
                self._epochs[epoch] = self.epoch(epoch)
            return self._epochs[epoch][place].tolist()

    def epoch(self, epoch: int) -> np.ndarray:
        """All micro-batches of an epoch: (epoch_length, group) int32."""
        samples = self._shuffled(epoch)
        found = np.empty((self.epoch_length, self.group), np.int32)
        last = np.empty(self.epoch_length, np.int64)  # place of a micro-batch's last sample along the epoch
        bucket = self.bucket[samples]
        begin = 0
        for number in np.flatnonzero(np.bincount(bucket)).tolist():
            places = np.flatnonzero(bucket == number)
            count = -(-len(places) // self.group)
            turns = np.arange(count * self.group).reshape(count, self.group)
            found[begin:begin + count] = samples[places[turns % len(places)]]
            last[begin:begin + count] = places[np.minimum(turns[:, -1], len(places) - 1)]
            begin += count
        draws = self._draws(self.epoch_length, "batches", epoch)
        return found[np.lexsort((draws, last // self.window))]

    def _shuffled(self, epoch: int) -> np.ndarray:
        """The samples, shards in the epoch's order, shuffled within windows: (N,) int32."""
        starts = np.cumsum([0, *self.sizes])
        turn = permutation(len(self.sizes), self.seed, self.stream, "shards", epoch)
        samples = np.concatenate([np.arange(starts[i], starts[i + 1], dtype=np.int32) for i in turn])
        windows = np.arange(len(samples)) // self.window
        return samples[np.lexsort((self._draws(len(samples), "samples", epoch), windows))]

    def _draws(self, count: int, use: str, epoch: int) -> np.ndarray:
        return torch.randint(0, 2**62, (count,), generator=generator(self.seed, self.stream, use, epoch)).numpy()
