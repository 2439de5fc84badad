"""The order: everything comes, nothing is dropped, ranks share it out, and the step's number is all it takes."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from impasto.data.order import Order

SQUARE, WIDE, TALL = (64, 64), (64, 128), (128, 64)


@given(sizes=st.lists(st.sampled_from([SQUARE, WIDE, TALL]), min_size=1, max_size=40), group=st.integers(1, 7),
       seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_an_epoch_holds_every_picture_in_batches_of_one_shape(sizes, group: int, seed: int, epoch: int) -> None:
    order = Order.over(sizes, group, seed, "pictures")
    batches = [order.micro_batch(epoch * order.epoch_length + i) for i in range(order.epoch_length)]
    uses = Counter(picture for batch in batches for picture in batch)
    assert set(uses) == set(range(len(sizes)))
    for batch in batches:
        assert len(batch) == group and len({sizes[i] for i in batch}) == 1
    for size, count in Counter(sizes).items():
        members = [i for i in uses if sizes[i] == size]
        surplus = -count % group
        assert sum(uses[i] for i in members) == count + surplus
        assert max(uses[i] for i in members) - min(uses[i] for i in members) <= 1  # spread evenly


def test_it_is_a_function_of_seed_and_epoch() -> None:
    sizes = [SQUARE] * 9 + [WIDE] * 6
    one, two = Order.over(sizes, 3, 0, "pictures"), Order.over(sizes, 3, 0, "pictures")
    forward = [one.micro_batch(i) for i in range(40)]
    assert [two.micro_batch(i) for i in reversed(range(40))][::-1] == forward
    length = one.epoch_length
    assert length == 5
    assert forward[:length] != forward[length:2 * length]
    assert [Order.over(sizes, 3, 1, "pictures").micro_batch(i) for i in range(length)] != forward[:length]
    assert [Order.over(sizes, 3, 0, "class pictures").micro_batch(i) for i in range(length)] != forward[:length]


def test_a_small_bucket_is_filled_up_by_going_round() -> None:
    batch = Order.over([SQUARE] * 2, 5, 0, "pictures").micro_batch(0)
    assert batch[0::2] == [batch[0]] * 3 and batch[1::2] == [batch[1]] * 2 and set(batch) == {0, 1}


def test_buckets_are_mixed_within_an_epoch() -> None:
    sizes = [SQUARE] * 20 + [WIDE] * 20
    order = Order.over(sizes, 2, 0, "pictures")
    shapes = [sizes[order.micro_batch(i)[0]] for i in range(order.epoch_length)]
    assert shapes != sorted(shapes) and shapes != sorted(shapes, reverse=True)
