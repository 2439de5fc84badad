"""The whole way with a true, if tiny, base: what is cached is what the base says."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from impasto.data.buckets import cut
from impasto.data.options import DataOptions, PriorOptions
from impasto.data.source import Source, prepare_source
from impasto.families.base import Base
from impasto.families.load import load_base
from impasto.objectives.denoise import Denoise
from tests.checkpoints import write_checkpoint
from tests.data.fakes import write_picture


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "mini.safetensors", family="sd1", size="mini")


@pytest.fixture(scope="module")
def base(checkpoint: Path) -> Base:
    return load_base(checkpoint)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    long = "a photo of a dog, " * 40  # several chunks
    for i, (size, caption) in enumerate([((64, 64), "short"), ((64, 64), long), ((96, 64), "wide")]):
        write_picture(tmp_path / "photos" / f"{i}.png", key=i, size=size, caption=caption)
    return tmp_path / "photos"


def prepare(base: Base, photos: Path, prior: PriorOptions | None = None, **keys: Any) -> Source:
    data = DataOptions(folder=str(photos), resolution=64, bucket_step=8, **keys)
    return prepare_source(base, data, prior, trains=frozenset({"unet"}), batch_size=2, accumulation=1, seed=0,
                          device="cpu")


def test_batches_hold_what_the_base_makes_of_the_pictures(base: Base, photos: Path) -> None:
    source = prepare(base, photos)
    items = {item.picture.name: item for item in source.pictures}
    for step in range(source.epoch_steps):
        ((batch,),) = source.micro_batches(step)
        assert batch.moments is not None and batch.text is not None
        chosen = [items[name] for name in batch.names]
        for row, item in enumerate(chosen):
            pixels = cut(item.picture.read(), item.placement)
            with torch.no_grad():
                assert batch.moments[row].equal(base.encode_images(pixels[None])[0])
        with torch.no_grad():
            expected = base.stack_text([base.encode_text([item.caption]) for item in chosen])
        assert batch.text.keys() == expected.keys()
        assert all(batch.text[name].equal(expected[name]) for name in expected)


def test_what_a_base_does_not_read_of_long_captions_is_told(base: Base, photos: Path, tmp_path: Path) -> None:
    flow = load_base(write_checkpoint(tmp_path / "base.safetensors", "sd3"))
    data = DataOptions(folder=str(photos), resolution=64, bucket_step=16)
    found = prepare_source(flow, data, None, trains=frozenset({flow.denoiser_name}), batch_size=1, accumulation=1,
                           seed=0, device="cpu").describe()
    (line,) = (line for line in found if "75 tokens" in line)
    assert line.startswith("captions of more than 75 tokens, of which CLIP reads no more in this family: 1; most is "
                           "lost of 1.png: 'a dog, a photo of")
    assert not any("75 tokens" in line for line in prepare(base, photos).describe())


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sdxl", "sdxl-refiner"])
def test_without_caption_is_what_is_drawn_without_negative_prompt(photos: Path, tmp_path: Path, family: str,
                                                                  live: bool) -> None:
    base = load_base(write_checkpoint(tmp_path / "base.safetensors", family))
    trains = frozenset({"unet", *(base.text_encoder_names if live else ())})
    data = DataOptions(folder=str(photos), resolution=64, bucket_step=8, caption_dropout=1.0)
    source = prepare_source(base, data, None, trains=trains, batch_size=2, accumulation=1, seed=0, device="cpu")
    with torch.no_grad():
        expected = base.encode_negatives([""])
        for batch in (one for batches in source.micro_batches(0) for one in batches):
            assert (batch.text is None) == live
            for name, states in Denoise.text(base, batch).items():
                assert states.equal(expected[name].expand_as(states))


def test_clip_skip_is_part_of_the_key(base: Base, checkpoint: Path, photos: Path) -> None:
    plain, skipped = prepare(base, photos), prepare(load_base(checkpoint, clip_skip=1), photos)
    assert plain.pictures[0].latent_keys == skipped.pictures[0].latent_keys
    assert plain.pictures[0].text_keys != skipped.pictures[0].text_keys


def test_class_pictures_are_drawn_the_same_again(base: Base, photos: Path) -> None:
    prior = PriorOptions(caption="a dog", images=3, steps=2, batch_size=2)
    source = prepare(base, photos, prior)
    paths = [item.picture.path for item in source.class_pictures]
    before = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert len(set(before)) == 3 and {item.picture.size for item in source.class_pictures} == {(64, 64)}
    paths[1].unlink()
    again = prepare(base, photos, prior)
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths] == before
    assert again.fingerprint == source.fingerprint
