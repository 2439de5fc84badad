"""Batches: which pictures, whose caption, which draws; and that they are a function of the step alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from impasto.core.errors import UserError
from impasto.core.progress import SILENT, Reporter
from impasto.data.options import DataOptions, PriorOptions
from impasto.data.source import Source, prepare_source
from impasto.objectives.batch import Batch
from tests.data.fakes import FakeBase, noise_picture, write_picture

SIZES = [(64, 64), (64, 64), (64, 96), (64, 96), (64, 96), (90, 64), (64, 64)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i, size in enumerate(SIZES):
        write_picture(tmp_path / "photos" / f"{i}.png", key=i, size=size, caption=f"caption {i}")
    return tmp_path / "photos"


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    for i in range(3):
        write_picture(tmp_path / "class" / f"c{i}.png", key=50 + i)
    return tmp_path / "class"


def prepare(photos: Path, *, prior: PriorOptions | None = None, trains: str = "unet", batch_size: int = 2,
            accumulation: int = 1, seed: int = 0, rank: int = 0, world: int = 1, base: FakeBase | None = None,
            report: Reporter = SILENT, **keys: Any) -> Source:
    data = DataOptions(**{"folder": str(photos), "resolution": 64, "bucket_step": 8, **keys})
    return prepare_source(base or FakeBase.make(), data, prior, trains=frozenset({trains}), batch_size=batch_size,
                          accumulation=accumulation, seed=seed, device="cpu", rank=rank, world=world, report=report)


def flat(batches: list[list[Batch]]) -> list[Batch]:
    return [batch for micro in batches for batch in micro]


def test_a_batch_holds_what_its_pictures_say(photos: Path) -> None:
    """Moments and states are those of the named picture, computed here by hand."""
    source, by_hand = prepare(photos), FakeBase.make()
    seen = set()
    for step in range(source.epoch_steps):
        ((batch,),) = source.micro_batches(step)
        assert batch.pixels is None and batch.captions is None and batch.moments is not None and batch.text
        assert batch.weight.tolist() == [1, 1] and batch.samples == [0, 1]
        for row, name in enumerate(batch.names):
            i = int(name[0])
            seen.add(i)
            if SIZES[i] == (64, 64):  # untouched by its bucket
                pixels = torch.from_numpy(np.array(noise_picture(i))).permute(2, 0, 1) / 127.5 - 1
                torch.testing.assert_close(batch.moments[row], by_hand.encode_images(pixels[None])[0])
            assert batch.text["states"][row].equal(by_hand.encode_text([f"caption {i}"])["states"][0])
            assert batch.geometry is not None and tuple(batch.geometry.original[row].tolist()) == SIZES[i]
            assert (batch.geometry.target[row] // 8).tolist() == list(batch.moments.shape[-2:])
    assert seen == set(range(len(SIZES)))


def same(one: list[list[Batch]], two: list[list[Batch]]) -> bool:
    pairs = list(zip(flat(one), flat(two), strict=True))
    return all(a.samples == b.samples and a.names == b.names and a.moments is not None and b.moments is not None
               and a.moments.equal(b.moments) for a, b in pairs)


def test_a_step_is_a_function_of_its_number(photos: Path) -> None:
    first = [prepare(photos, flip=True, accumulation=3).micro_batches(step) for step in range(6)]
    source = prepare(photos, flip=True, accumulation=3)
    for step in (3, 3, 0, 5, 4, 5, 2, 1):  # in any order, read ahead or not
        assert same(source.micro_batches(step), first[step])
    assert not same(first[0], first[1])


@pytest.mark.parametrize("prior", [False, True])
def test_two_ranks_share_the_batch_of_one(photos: Path, class_folder: Path, prior: bool) -> None:
    options = PriorOptions(caption="a dog", folder=str(class_folder)) if prior else None
    one = prepare(photos, prior=options, batch_size=4, accumulation=2, flip=True)
    two = [prepare(photos, prior=options, batch_size=2, accumulation=2, flip=True, rank=rank, world=2)
           for rank in range(2)]

    def rows(batches: list[Batch]) -> dict[int, tuple[str, torch.Tensor]]:
        return {sample: (batch.names[i], batch.moments[i]) for batch in batches if batch.moments is not None
                for i, sample in enumerate(batch.samples)}

    for step in range(5):
        whole = one.micro_batches(step)
        parts = [source.micro_batches(step) for source in two]
        for micro in range(2):
            expected, found = rows(whole[micro]), rows(parts[0][micro] + parts[1][micro])
            assert expected.keys() == found.keys()
            assert all(expected[s][0] == found[s][0] and expected[s][1].equal(found[s][1]) for s in expected)
        assert sorted(s for b in flat(whole) for s in b.samples) == list(range(16 if prior else 8))


def test_class_pictures_come_on_top(photos: Path, class_folder: Path) -> None:
    prior = PriorOptions(caption="a dog", folder=str(class_folder), weight=0.5)
    with_prior, without = prepare(photos, prior=prior, accumulation=2), prepare(photos, accumulation=2)
    uses: list[str] = []
    for step in range(6):
        for micro, (more, fewer) in enumerate(zip(with_prior.micro_batches(step), without.micro_batches(step),
                                                  strict=True)):
            pairs = [(s, n, w) for b in more for s, n, w in zip(b.samples, b.names, b.weight.tolist(), strict=True)]
            plain = [(s, n) for b in fewer for s, n in zip(b.samples, b.names, strict=True)]
            assert [(s, n) for s, n, w in pairs if w == 1] == plain
            ours = [(s, n) for s, n, w in pairs if w == 0.5]
            assert [s for s, _ in ours] == [4 + 2 * micro, 5 + 2 * micro]
            assert all(n.startswith("c") for _, n in ours)
            uses += [n for _, n in ours]
            shapes = [tuple(b.moments.shape[-2:]) for b in more if b.moments is not None]
            assert len(set(shapes)) == len(shapes)  # one batch where shapes agree
    assert len(uses) == 24 and set(uses) == {"c0.png", "c1.png", "c2.png"}
    assert min(uses.count(name) for name in set(uses)) >= 6  # once in each of their six epochs
    for batch in flat(with_prior.micro_batches(0)):
        assert batch.text is not None
        for row, name in enumerate(batch.names):
            caption = "a dog" if name.startswith("c") else f"caption {name[0]}"
            assert batch.text["states"][row].equal(FakeBase.make().encode_text([caption])["states"][0])


def test_steps_reach_over_epochs(photos: Path) -> None:
    """Five micro-batches an epoch, two a step: three steps to have seen everything, and nothing is dropped."""
    source, single = prepare(photos, accumulation=2), prepare(photos)
    assert single.epoch_steps == 5 and source.epoch_steps == 3
    stream = [batch.names for step in range(10) for batch in flat(source.micro_batches(step))]
    assert stream == [batch.names for step in range(20) for batch in flat(single.micro_batches(step))]


def test_flips_are_drawn_for_each_use(photos: Path) -> None:
    source, plain = prepare(photos, flip=True), prepare(photos)
    flipped = []
    for step in range(60):
        for batch, upright in zip(flat(source.micro_batches(step)), flat(plain.micro_batches(step)), strict=True):
            assert batch.names == upright.names and batch.moments is not None and upright.moments is not None
            for one, other in zip(batch.moments, upright.moments, strict=True):
                assert one.equal(other) or torch.allclose(one.flip(-1), other, atol=1e-6)
                flipped.append(not one.equal(other))
    assert 0.35 < sum(flipped) / len(flipped) < 0.65


def test_what_the_step_encodes(photos: Path) -> None:
    cached, source = prepare(photos), prepare(photos, trains="vae")
    assert source.needs == {"vae"} and not cached.needs
    for batch, other in zip(flat(source.micro_batches(0)), flat(cached.micro_batches(0)), strict=True):
        assert batch.moments is None and batch.pixels is not None and other.moments is not None
        torch.testing.assert_close(FakeBase.make().encode_images(batch.pixels), other.moments)
    source = prepare(photos, trains="text_encoder")
    assert source.needs == {"text_encoder"}
    (batch,) = flat(source.micro_batches(0))
    assert batch.text is None and batch.captions == [f"caption {name[0]}" for name in batch.names]


def test_the_fingerprint_follows_what_is_learned_from(photos: Path, class_folder: Path) -> None:
    def print_of(**keys: Any) -> str:
        return prepare(photos, **keys).fingerprint

    plain = print_of()
    assert print_of(batch_size=1, seed=3, trains="text_encoder") == plain
    prior = PriorOptions(caption="a dog", folder=str(class_folder))
    others = [print_of(flip=True), print_of(buckets=False), print_of(caption="x"), print_of(prior=prior),
              print_of(background="red")]
    (photos / "3.txt").write_text("another")
    others.append(print_of())
    write_picture(photos / "3.png", key=33, size=SIZES[3], caption="caption 3")
    others.append(print_of())
    write_picture(photos / "3.png", key=3, size=SIZES[3])
    assert print_of() == plain and len({plain, *others}) == 8


def test_every_picture_is_accounted_for(photos: Path, class_folder: Path) -> None:
    (photos / "phone.heic").write_bytes(b"x")
    write_picture(photos / "copy.png", key=0, caption="again")
    write_picture(photos / "small.png", key=9, size=(32, 32), caption="small")
    source = prepare(photos, prior=PriorOptions(caption="a dog", folder=str(class_folder)))
    text = "\n".join(source.describe())
    assert "9 pictures: 5 at 64x64, 3 at 80x48, 1 at 56x72" in text
    assert "phone.heic" in text and "that are enlarged: 1, at most 2.00 times (small.png)" in text
    assert "copies of others: 1" in text and "3 class pictures: 3 at 64x64" in text
    facts = {item.picture.name: item for item in source.pictures}
    assert facts["2.png"].picture.size == (64, 96) and facts["2.png"].placement.bucket == (48, 80)
    assert 0 <= facts["2.png"].placement.cropped < 0.2 and len(source.class_pictures) == 3
    text = "\n".join(prepare(photos, caption="x").describe())
    assert "9 .txt files are not read" in text


# --- bad inputs --------------------------------------------------------------------------------------------


def test_all_that_is_wrong_is_said_before_anything_is_encoded(photos: Path) -> None:
    (photos / "text.png").write_text("x")
    (photos / "lonely.txt").write_text("x")
    write_picture(photos / "dot.png", size=(1, 1), caption="dot")
    write_picture(photos / "bare.png")
    base = FakeBase.make()
    with pytest.raises(UserError) as caught:
        prepare(photos, base=base)
    for line in ["text.png: is not a picture", "lonely.txt: is a caption without a picture",
                 "dot.png: is too small (1x1 pixels)", "bare.png: has no caption (bare.txt)"]:
        assert line in str(caught.value)
    assert base.encoded_pictures == 0 and not base.encoded_captions


@pytest.mark.parametrize(("keys", "says"), [
    ({"folder": "nowhere/photos"}, "no such folder"),
    ({"bucket_step": 12}, r"data\.bucket_step.*multiple of 8"),
    ({"resolution": 68, "buckets": False}, r"data\.resolution.*multiple of 8.*64 or 72"),
    ({"resolution": 100, "bucket_step": 64, "bucket_min": 90}, "no bucket"),
])
def test_options_that_cannot_be(photos: Path, keys: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        prepare(photos, **keys)


class Heard(Reporter):
    def __init__(self) -> None:
        self.phases: dict[str, list[int]] = {}

    @contextmanager
    def phase(self, title: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[int], None]]:
        assert total is not None and unit
        done = self.phases[title] = [total, 0]

        def advance(n: int) -> None:
            done[1] += n

        yield advance


def test_phases_have_names_and_end(photos: Path, class_folder: Path) -> None:
    heard = Heard()
    prepare(photos, report=heard, flip=True, prior=PriorOptions(caption="a dog", folder=str(class_folder)))
    assert heard.phases == {"looking at the pictures": [7, 7], "looking at the class pictures": [3, 3],
                            "encoding pictures": [20, 20], "encoding captions": [8, 8]}


def test_moving_a_batch(photos: Path) -> None:
    (batch,) = flat(prepare(photos).micro_batches(0))
    moved = batch.to("meta")
    assert moved.moments is not None and moved.moments.is_meta and moved.weight.is_meta
    assert moved.text is not None and moved.text["states"].is_meta and moved.samples == batch.samples
    assert moved.geometry is not None and moved.geometry.crop.is_meta
    assert batch.moments is not None and not batch.moments.is_meta
