"""Batches from shards: the same pictures, captions and latents as from a folder, in an order that can be resumed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from impasto.core.errors import UserError
from impasto.data.items import Item
from impasto.data.options import DataOptions, PriorOptions, ValidationOptions
from impasto.data.pictures import pictures_of
from impasto.data.sets import one_or_several
from impasto.data.source import Source, prepare_source
from impasto.objectives.batch import Batch
from tests.data.fakes import FakeBase, noise_picture, write_picture
from tests.data.sharded import aged, sample, serving, write_shard, write_shards

SIZES = [[(64, 64)] * 5, [(64, 96), (64, 96), (64, 96), (64, 64)], [(90, 64)] * 3, [(64, 64)] * 4]
COUNT = sum(map(len, SIZES))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", SIZES)
    return tmp_path / "shards"


def options(spec: Path | str | list[str], **keys: Any) -> DataOptions:
    return DataOptions.model_validate({"source": "shards", "shards": str(spec) if isinstance(spec, Path) else spec,
                                       "resolution": 64, "bucket_step": 8, "shuffle_window": 6, **keys})


def prepare(data: DataOptions, *, base: FakeBase | None = None, trains: str = "unet", batch_size: int = 2,
            **keys: Any) -> Source:
    return prepare_source(base or FakeBase.make(), data, keys.pop("prior", None), trains=frozenset({trains}),
                          batch_size=batch_size, **{"accumulation": 1, "seed": 0, "device": "cpu", **keys})


def flat(batches: list[list[Batch]]) -> list[Batch]:
    return [batch for micro in batches for batch in micro]


def rows(batches: list[Batch]) -> dict[int, tuple[str, torch.Tensor, torch.Tensor]]:
    return {place: (batch.names[i], batch.moments[i], batch.text["states"][i]) for batch in batches
            if batch.moments is not None and batch.text is not None for i, place in enumerate(batch.samples)}


def same(one: list[Batch], two: list[Batch]) -> bool:
    a, b = rows(one), rows(two)
    return a.keys() == b.keys() and all(a[k][0] == b[k][0] and a[k][1].equal(b[k][1]) and a[k][2].equal(b[k][2])
                                        for k in a)


@pytest.mark.parametrize("over_http", [False, True])
def test_each_picture_is_there_once_with_the_latents_that_a_folder_gives(over_http: bool, folder: Path,
                                                                        tmp_path: Path) -> None:
    sizes = [size for own in SIZES for size in own]
    for i, size in enumerate(sizes):
        write_picture(tmp_path / "photos" / f"{i:06d}.png", i, size, f"caption {i}")
    plain = prepare(DataOptions.model_validate({"folder": str(tmp_path / "photos"), "resolution": 64,
                                                "bucket_step": 8}))
    by_name: dict[str, tuple[torch.Tensor, torch.Tensor, list[list[int]]]] = {}
    for step in range(plain.epoch_steps):
        for batch in flat(plain.micro_batches(step)):
            assert batch.moments is not None and batch.text is not None and batch.geometry is not None
            for i, name in enumerate(batch.names):
                by_name[name] = (batch.moments[i], batch.text["states"][i], [
                    part[i].tolist() for part in (batch.geometry.original, batch.geometry.crop, batch.geometry.target)])
    with serving(folder) as server:
        source = prepare(options(server.url("shard-{0000..0003}.tar") if over_http else folder))
    seen: Counter[str] = Counter()
    for step in range(source.epoch_steps):
        for batch in flat(source.micro_batches(step)):
            assert batch.moments is not None and batch.text is not None and batch.geometry is not None
            for i, name in enumerate(batch.names):
                moments, states, geometry = by_name[name.rpartition("/")[2]]
                assert batch.moments[i].equal(moments) and batch.text["states"][i].equal(states)
                assert geometry == [part[i].tolist() for part in (batch.geometry.original, batch.geometry.crop,
                                                                  batch.geometry.target)]
            seen.update(batch.names)
    assert len(seen) == COUNT and source.epoch_steps == plain.epoch_steps
    assert sum(seen.values()) - COUNT == 2 * source.epoch_steps - COUNT


def test_augmented_pictures_are_those_that_a_folder_gives(folder: Path, tmp_path: Path) -> None:
    for i, size in enumerate(size for own in SIZES for size in own):
        write_picture(tmp_path / "photos" / f"{i:06d}.png", i, size, f"caption {i}")
    chance = {"zoom": 0.2, "brightness": 0.1, "variants": 2, "flip": True, "loss_weight": 0.5}
    plain = prepare(DataOptions.model_validate({"folder": str(tmp_path / "photos"), "resolution": 64, "bucket_step": 8,
                                                **chance}))
    sharded = prepare(options(folder, **chance))
    keys = {item.picture.name: item.latent_keys for item in plain.pictures}
    assert {item.picture.name.rpartition("/")[2]: item.latent_keys for item in sharded.pictures} == keys
    for item in plain.pictures:
        assert len(item.latent_keys) == 4
        for one, other in zip(*(source.cache.load_all(item.latent_keys) for source in (plain, sharded)), strict=True):
            assert one["moments"].equal(other["moments"])
    assert all(batch.weight.tolist() == [0.5] * len(batch.names) for step in range(sharded.epoch_steps)
               for batch in flat(sharded.micro_batches(step)))
    assert any("in 2 versions, by brightness, zoom" in line for line in sharded.describe())
    assert sharded.fingerprint != prepare(options(folder, **{**chance, "zoom": 0.1})).fingerprint


def test_holes_are_those_that_a_folder_gives(folder: Path, tmp_path: Path) -> None:
    for i, size in enumerate(size for own in SIZES for size in own):
        write_picture(tmp_path / "photos" / f"{i:06d}.png", i, size, f"caption {i}")
    reads = frozenset({"pictures", "captions", "extras"})
    plain, sharded = (prepare(data, base=FakeBase.make(shows=("mask", "masked")), reads=reads) for data in (
        DataOptions.model_validate({"folder": str(tmp_path / "photos"), "resolution": 64, "bucket_step": 8}),
        options(folder)))
    keys = {item.picture.name: item.extra_keys for item in plain.pictures}
    assert {item.picture.name.rpartition("/")[2]: item.extra_keys for item in sharded.pictures} == keys
    for own in keys.values():
        for one, other in zip(*(source.cache.load_all(own) for source in (plain, sharded)), strict=True):
            assert one["moments"].equal(other["moments"]) and one["mask"].equal(other["mask"])
    assert all(set(batch.extras) == {"mask", "masked"} for batch in flat(sharded.micro_batches(0)))


def test_another_augmentation_that_leaves_the_first_sample_alone_is_encoded_too(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", [[(64, 64), (64, 70)]])
    for chance in ({"brightness": 0.1}, {"brightness": 0.1, "random_crop": True}):
        source = prepare(options(tmp_path / "shards", variants=2, **chance))
        assert all(source.cache.load_all(item.latent_keys) for item in source.pictures)


def test_held_out_samples_weigh_one(folder: Path) -> None:
    found = pictures_of(options(folder, loss_weight=0.5), None, ValidationOptions(fraction=0.2), 0)
    assert {item.weight for item in found.learned} == {0.5} and {item.weight for item in found.held_out} == {1.0}


@pytest.mark.parametrize(("keys", "why"), [
    ({"resolutions": [64, 128], "resolution": None}, "one resolution: give resolution in place of resolutions"),
    ({"repeats": 2}, "once in an epoch: leave repeats out"),
])
def test_what_shards_cannot_do_is_refused(keys: dict[str, Any], why: str) -> None:
    tree = {"source": "shards", "shards": "a.tar", **{key: value for key, value in keys.items() if value is not None}}
    with pytest.raises(ValueError, match=why):
        DataOptions.model_validate(tree)


def test_shards_are_the_only_set_of_a_run() -> None:
    with pytest.raises(ValueError, match=r"data\.1 has source = .shards., which is a run's only set: put all shards"):
        one_or_several([{"folder": "a"}, {"source": "shards", "shards": "a.tar"}])
    assert isinstance(one_or_several([{"source": "shards", "shards": "a.tar"}]), DataOptions)


def test_a_step_is_a_function_of_its_number(folder: Path) -> None:
    first = [flat(prepare(options(folder, flip=True), accumulation=3).micro_batches(step)) for step in range(6)]
    source = prepare(options(folder, flip=True), accumulation=3)
    for step in (3, 3, 0, 5, 4, 5, 2, 1):
        assert same(flat(source.micro_batches(step)), first[step])
    assert not same(first[0], first[1])
    assert not same(first[0], flat(prepare(options(folder, flip=True), accumulation=3, seed=1).micro_batches(0)))


def test_two_ranks_share_the_batch_of_one(folder: Path, tmp_path: Path) -> None:
    for i in range(3):
        write_picture(tmp_path / "class" / f"c{i}.png", key=50 + i)
    prior = PriorOptions.model_validate({"caption": "a dog", "folder": str(tmp_path / "class")})
    one = prepare(options(folder), batch_size=4, accumulation=2, prior=prior)
    two = [prepare(options(folder), batch_size=2, accumulation=2, prior=prior, rank=rank, world=2)
           for rank in range(2)]
    assert one.fingerprint == two[0].fingerprint
    for step in range(5):
        parts = [source.micro_batches(step) for source in two]
        for micro, whole in enumerate(one.micro_batches(step)):
            assert same(whole, parts[0][micro] + parts[1][micro])


def test_nothing_is_encoded_twice_and_a_new_shard_is_only_its_own_pictures(folder: Path) -> None:
    base = FakeBase.make()
    prepare(options(folder), base=base)
    assert base.encoded_pictures == COUNT and len(base.encoded_captions) == COUNT
    prepare(options(folder), base=base)
    prepare(options([str(folder / "shard-0002.tar"), str(folder / "shard-0000.tar")]), base=base)
    assert base.encoded_pictures == COUNT and len(base.encoded_captions) == COUNT
    write_shard(folder / "shard-0002b.tar", sample("new", 99) | sample("copy", 0, caption="caption 5"))
    prepare(options(folder), base=base)
    assert base.encoded_pictures == COUNT + 1 and base.encoded_captions[COUNT:] == ["caption 99"]


def test_what_the_step_encodes_is_read_from_the_shards(folder: Path) -> None:
    cached = prepare(options(folder))
    with serving(folder) as server:
        source = prepare(options(server.url("shard-{0000..0003}.tar")), trains="vae")
        for step in range(3):
            for batch, other in zip(flat(source.micro_batches(step)), flat(cached.micro_batches(step)), strict=True):
                assert batch.pixels is not None and other.moments is not None and batch.names == other.names
                torch.testing.assert_close(FakeBase.make().encode_images(batch.pixels), other.moments)
    trained = prepare(options(folder, shuffle_tags=True))
    (batch,) = flat(trained.micro_batches(0))
    assert batch.captions == [f"caption {int(name.rpartition('/')[2][:6])}" for name in batch.names]


@pytest.mark.parametrize("damage", ["changed", "cut"])
def test_a_picture_that_breaks_in_the_middle_of_a_run_is_one_line(damage: str, folder: Path) -> None:
    source = prepare(options(folder / "shard-0000.tar"), trains="vae", batch_size=1)
    flat(source.micro_batches(0))
    path = folder / "shard-0000.tar"
    data = bytearray(path.read_bytes())
    with open(path, "r+b") as file:  # under the open file
        if damage == "cut":
            file.truncate(700)
        else:
            file.write(bytes(byte ^ 1 for byte in data))
    says = "shard-0000.tar/00000[0-4].png: " + (
        "is not whole any more" if damage == "cut" else "has changed, or is damaged") + ".*start it again"
    with pytest.raises(UserError, match=says):
        for step in range(1, 5):
            source.micro_batches(step)


def test_the_fingerprint_follows_what_is_learned_from(folder: Path) -> None:
    def print_of(**keys: Any) -> str:
        return prepare(options(folder, **keys)).fingerprint

    plain = print_of()
    moved = folder.parent / "moved"
    folder.rename(moved)
    assert prepare(options(moved)).fingerprint == plain
    moved.rename(folder)
    others = [print_of(flip=True), print_of(buckets=False), print_of(caption="x"), print_of(shuffle_window=5)]
    path = folder / "shard-0001.tar"
    path.write_bytes(path.read_bytes().replace(b"caption 7", b"caption 8"))
    aged(path)
    others.append(print_of())
    assert len({plain, *others}) == 6


def digests(items: Sequence[Item]) -> list[str]:
    return sorted(item.picture.digest for item in items)


def test_held_out_pictures_are_those_of_a_folder(folder: Path, tmp_path: Path) -> None:
    for i, size in enumerate(size for own in SIZES for size in own):
        write_picture(tmp_path / "photos" / f"{i:06d}.png", i, size, f"caption {i}")
    write_shard(folder / "shard-0009.tar", sample("copy", 3))
    write_picture(tmp_path / "photos" / "copy.png", 3, caption="caption 3")
    plain = DataOptions.model_validate({"folder": str(tmp_path / "photos"), "resolution": 64, "bucket_step": 8})
    for fraction in (None, 0.3, 0):
        validation = ValidationOptions.model_validate({"fraction": fraction})
        for seed in range(4):
            found = pictures_of(options(folder), None, validation, seed)
            other = pictures_of(plain, None, validation, seed)
            assert digests(found.held_out) == digests(other.held_out)
            assert digests(found.learned) == digests(other.learned)
            assert len(found.notes) == bool(found.held_out)
    apart = ValidationOptions.model_validate({"folder": str(tmp_path / "own")})
    write_picture(tmp_path / "own" / "x.png", 3, caption="x")
    found = pictures_of(options(folder), None, apart, 0)
    assert len(found.learned) == COUNT - 1 and [item.picture.name for item in found.held_out] == ["x.png"]
    source = prepare(options(folder), validation=ValidationOptions.model_validate({"fraction": 0.3}))
    batch = source.validation_batch([0])
    assert batch.moments is not None and batch.names == [source.held_out[0].picture.name]
    assert not {item.picture.name for item in source.held_out} & {item.picture.name for item in source.pictures}


def test_every_sample_is_accounted_for_as_in_a_folder(folder: Path, tmp_path: Path) -> None:
    write_shard(folder / "shard-0009.tar", sample("copy", 0, caption="again") | sample("small", 70, (32, 32)))
    for i, size in enumerate(size for own in SIZES for size in own):
        write_picture(tmp_path / "photos" / f"{i:06d}.png", i, size, f"caption {i}")
    write_picture(tmp_path / "photos" / "copy.png", 0, caption="again")
    write_picture(tmp_path / "photos" / "small.png", 70, (32, 32), caption="caption 70")
    keys = {"caption_template": "see {}", "max_tokens": 3}
    plain = prepare(DataOptions.model_validate({"folder": str(tmp_path / "photos"), "resolution": 64,
                                                "bucket_step": 8, **keys})).describe()
    source = prepare(options(folder, **keys))
    inside = {item.picture.name.rpartition("/")[2]: item.picture.name for item in source.pictures}
    assert source.describe() == [re.sub(r"\w+\.png", lambda name: inside[name[0]], line) for line in plain]
    (folder / "shard-0008.tar").write_bytes((folder / "shard-0003.tar").read_bytes()[:700])
    aged(folder / "shard-0008.tar")
    with pytest.raises(UserError, match="cut short"):
        prepare(options(folder))
    told = prepare(options(folder, bad_samples="skip")).describe()
    assert "samples that are left out: 1 cut short with their shard" in told


def test_items_are_made_when_they_are_asked_for(folder: Path) -> None:
    source = prepare(options(folder))
    items = source.pictures
    assert len(items) == COUNT and len(list(items)) == COUNT
    assert items[-1].picture.name == "shard-0003.tar/000015.png" and items[3].caption == "caption 3"
    assert [item.picture.name for item in items[:2]] == ["shard-0000.tar/000000.png", "shard-0000.tar/000001.png"]
    assert items[3].picture.read().tobytes() == noise_picture(3).tobytes() and items[0] != items[1]
    with pytest.raises(IndexError):
        items[COUNT]
