"""Class pictures: drawn once, each from its own seed, and an interrupted drawing goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from impasto.core.errors import UserError
from impasto.core.progress import SILENT
from impasto.data import prior as room
from impasto.data.options import DataOptions, PriorOptions, ValidationOptions
from impasto.data.prior import draw_prior, prior_folder
from impasto.data.source import prepare_source
from impasto.diffusion.process import DDPM
from impasto.families.sample_settings import SampleSettings
from tests.data.fakes import FakeBase, noise_picture, write_picture


class Sampler:
    """Stands for families.sampling.sample: a picture from its seed, and a record of what was asked."""

    def __init__(self) -> None:
        self.seeds: list[list[int]] = []
        self.settings: list[Any] = []
        self.dies_at: int | None = None

    def __call__(self, base: FakeBase, prompts: Sequence[str], negatives: Sequence[str], seeds: Sequence[int],
                 settings: Any, init_images: Any = None, masks: Any = None) -> list[Image.Image]:
        assert init_images is None and masks is None
        assert list(prompts) == ["a dog"] * len(seeds) and list(negatives) == [""] * len(seeds)
        if self.dies_at is not None and len(self.seeds) >= self.dies_at:
            raise KeyboardInterrupt
        self.seeds.append(list(seeds))
        self.settings.append(settings)
        return [noise_picture(seed, (settings.height, settings.width)) for seed in seeds]


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> Sampler:
    sampler = Sampler()
    monkeypatch.setattr(room, "sample", sampler)
    return sampler


def draw(images: int = 6, side: int = 64, rank: int = 0, world: int = 1, base: FakeBase | None = None,
         **keys: Any) -> list[Path]:
    base = base or FakeBase.make()
    prior = PriorOptions(caption="a dog", images=images, **{"batch_size": 4, **keys})
    listing = draw_prior(base, base.fingerprint(), prior, side, SILENT, rank, world)
    return [listing.folder / name for name in listing.pictures]


def test_numbered_files_of_their_own_seeds(sampler: Sampler) -> None:
    paths = draw(6, steps=3, guidance=2.0, scheduler="euler")
    assert [path.name for path in paths] == [f"{i:06d}.png" for i in range(6)]
    for i, path in enumerate(paths):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(noise_picture(i)))
    assert sampler.seeds == [[0, 1, 2, 3], [4, 5, 6, 7]]  # whole batches, always
    settings = sampler.settings[0]
    assert (settings.steps, settings.guidance, settings.scheduler) == (3, 2.0, "euler")
    assert (settings.width, settings.height) == (64, 64)
    assert sorted(p.suffix for p in paths[0].parent.iterdir()) == [".json"] + [".png"] * 6


def test_they_are_drawn_once(sampler: Sampler) -> None:
    first, again = draw(6), draw(6)
    assert first == again and len(sampler.seeds) == 2
    assert draw(3) == first[:3] and len(sampler.seeds) == 2


def test_an_interrupted_drawing_goes_on_in_the_same_batches(sampler: Sampler) -> None:
    sampler.dies_at = 2
    with pytest.raises(KeyboardInterrupt):
        draw(10)
    sampler.dies_at = None
    paths = draw(10)
    paths[1].unlink()
    paths[9].unlink()
    draw(12)
    assert sampler.seeds == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [0, 1, 2, 3], [8, 9, 10, 11]]


def test_a_second_rank_begins_elsewhere(sampler: Sampler) -> None:
    draw(12, rank=1, world=2)
    assert [seeds[0] for seeds in sampler.seeds] == [4, 8, 0]


def test_the_folder_follows_everything_they_depend_on() -> None:
    def folder(base: FakeBase | None = None, side: int = 64, **keys: Any) -> Path:
        base = base or FakeBase.make()
        prior = PriorOptions(**{"caption": "a dog", **keys})
        settings = SampleSettings(steps=prior.steps, guidance=prior.guidance, scheduler=prior.scheduler,
                                  width=side, height=side)
        return prior_folder(base, base.fingerprint(), prior, settings)

    plain = folder()
    assert folder(images=3, weight=0.5) == plain
    velocity = FakeBase.make()
    velocity.process = DDPM.from_scheduler_config({"prediction_type": "v_prediction"})
    half = FakeBase.make()
    half.components["unet"].half()
    others = [folder(caption="a cat"), folder(steps=3), folder(guidance=1.0), folder(scheduler="euler"),
              folder(batch_size=1), folder(side=128), folder(half), folder(velocity),
              folder(FakeBase.make(settings={"clip_skip": 1})),
              *(folder(FakeBase.make(names={**FakeBase.make().names, name: "other"}))
                for name in ("unet", "vae", "text_encoder"))]
    assert len({plain, *others}) == 13


def test_a_run_with_drawn_class_pictures(sampler: Sampler, tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", size=(96, 64), caption="a photo of sks dog")
    data = DataOptions(folder=str(tmp_path), resolution=64, bucket_step=8)
    prior = PriorOptions(caption="a dog", images=5, weight=0.25)
    source = prepare_source(FakeBase.make(), data, prior, trains=frozenset({"unet"}), batch_size=1, accumulation=1,
                            seed=0, device="cpu")
    assert len(source.class_pictures) == 5
    ((instance, drawn),) = source.micro_batches(0)  # of two shapes
    assert instance.names == ["a.png"] and drawn.weight.tolist() == [0.25] and drawn.samples == [1]


def test_none_are_drawn_where_other_pictures_cannot_be_used(sampler: Sampler, tmp_path: Path) -> None:
    write_picture(tmp_path / "photos" / "a.png", caption="x")
    (tmp_path / "photos" / "bad.png").write_text("x")
    data = DataOptions(folder=str(tmp_path / "photos"), resolution=64, bucket_step=8)
    with pytest.raises(UserError) as caught:
        prepare_source(FakeBase.make(), data, PriorOptions(caption="a dog", images=2), trains=frozenset({"unet"}),
                       batch_size=1, accumulation=1, seed=0, device="cpu",
                       validation=ValidationOptions(folder=str(tmp_path / "apart")))
    text = str(caught.value)
    assert "2 sets of pictures" in text and "bad.png" in text and "validation.folder=…" in text
    assert not sampler.seeds
