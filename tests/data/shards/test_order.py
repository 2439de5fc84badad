"""The order of samples in shards: a function of (seed, epoch), each once, buckets apart, shards nearly in sequence."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from impasto.data.shards.order import ShardOrder


def order(sizes: list[int], bucket: list[int] | np.ndarray | None = None, window: int = 8, group: int = 2,
          seed: int = 0) -> ShardOrder:
    bucket = np.zeros(sum(sizes), np.int32) if bucket is None else np.array(bucket, np.int32)
    return ShardOrder(sizes, bucket, window, group, seed, "pictures")


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.integers(1, 5),
       st.integers(1, 20))
def test_each_sample_is_there_once_and_buckets_are_apart(data: st.DataObject, sizes: list[int], group: int,
                                                         window: int) -> None:
    bucket = data.draw(st.lists(st.integers(0, 3), min_size=sum(sizes), max_size=sum(sizes)))
    made = order(sizes, bucket, window, group)
    for epoch in range(2):
        batches = [made.micro_batch(epoch * made.epoch_length + i) for i in range(made.epoch_length)]
        counts = Counter(sample for batch in batches for sample in batch)
        assert set(counts) == set(range(sum(sizes)))
        assert all(len(batch) == group and len({bucket[sample] for sample in batch}) == 1 for batch in batches)
        for number in set(bucket):
            own = sum(counts[sample] for sample in counts if bucket[sample] == number)
            assert own < bucket.count(number) + group  # filled up, no more
    assert made.epoch_length == sum(-(-bucket.count(number) // group) for number in set(bucket))


def test_it_is_a_function_of_seed_and_epoch_whatever_was_asked_before() -> None:
    sizes = [50, 30, 20, 40]
    whole = [order(sizes).micro_batch(i) for i in range(300)]
    made = order(sizes)
    for place in (250, 3, 140, 71, 70, 299, 0):  # epochs of 70
        assert made.micro_batch(place) == whole[place]
    assert whole[:70] != whole[70:140] and whole[:70] != [order(sizes, seed=1).micro_batch(i) for i in range(70)]


def test_reading_stays_within_two_windows() -> None:
    """Along the epoch's order of shards, no micro-batch lies more than a window behind the furthest one before it."""
    sizes, window = [1000] * 20, 256
    made = order(sizes, window=window, group=4)
    for epoch in range(2):
        batches = made.epoch(epoch)
        turn = list(dict.fromkeys((batches.reshape(-1) // 1000).tolist()))
        place = {shard: i * 1000 for i, shard in enumerate(turn)}
        along = np.array([[place[sample // 1000] + sample % 1000 for sample in batch] for batch in batches.tolist()])
        reached = np.maximum.accumulate(along.max(axis=1))
        assert (reached - along.min(axis=1)).max() < 2 * window
        assert turn != list(range(20))


def test_windows_shuffle() -> None:
    """Neighbours in a shard do not stay neighbours, and a window of 1 leaves each shard as it is."""
    batches = order([4096], window=1024, group=1).epoch(0).reshape(-1)
    assert (np.abs(np.diff(batches)) == 1).mean() < 0.01
    assert order([64], window=1, group=1).epoch(0).reshape(-1).tolist() == list(range(64))


def test_a_rare_bucket_over_all_shards_fills_its_batches() -> None:
    bucket = np.zeros(4000, np.int32)
    bucket[::100] = 1  # 40 samples far apart
    made = order([1000] * 4, bucket, window=50, group=8)
    rare = [batch for batch in made.epoch(0).tolist() if bucket[batch[0]]]
    assert len(rare) == 5 and len({sample for batch in rare for sample in batch}) == 40


@pytest.mark.parametrize("count", [1, 2])
def test_few_samples(count: int) -> None:
    made = order([count], group=4)
    assert made.epoch_length == 1 and set(made.micro_batch(0)) == set(range(count)) and len(made.micro_batch(5)) == 4


def test_a_million_samples_take_a_few_bytes_each() -> None:
    import tracemalloc

    sizes = [10_000] * 100
    made = order(sizes, np.arange(1_000_000) % 7, window=4096, group=8)
    tracemalloc.start()
    made.micro_batch(0)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 6 * 10**6 and peak < 120 * 10**6
