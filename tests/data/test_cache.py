"""The cache: never stale, never twice, and a damaged entry is made again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from impasto.core.errors import UserError
from impasto.core.progress import SILENT
from impasto.data.cache import Cache, key_of
from impasto.data.options import DataOptions, PriorOptions
from impasto.data.source import Source, prepare_source
from tests.data.fakes import FakeBase, write_picture
from tests.data.filling import fill_and_take, together


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for i, size in enumerate([(64, 64), (64, 96), (80, 64)]):
        write_picture(folder / f"{i}.png", key=i, size=size, caption=f"caption {i}")
    return folder


def prepare(photos: Path, base: FakeBase | None = None, trains: set[str] | None = None,
            **keys) -> tuple[FakeBase, Source]:
    base = base or FakeBase.make()
    prior = keys.pop("prior", None)
    data = DataOptions(folder=str(photos), resolution=64, bucket_step=8, **keys)
    source = prepare_source(base, data, prior, trains=frozenset(trains or {"unet"}), batch_size=1, accumulation=1,
                            seed=0, device="cpu", report=SILENT)
    return base, source


def test_nothing_is_encoded_twice(photos: Path) -> None:
    first, _ = prepare(photos)
    assert first.encoded_pictures == 3 and sorted(first.encoded_captions) == [f"caption {i}" for i in range(3)]
    again, _ = prepare(photos)
    assert again.encoded_pictures == 0 and not again.encoded_captions


def test_a_new_picture_is_one_encoding_wherever_it_stands(photos: Path) -> None:
    prepare(photos)
    write_picture(photos / "00.png", key=7, caption="new")
    base, _ = prepare(photos)
    assert base.encoded_pictures == 1 and base.encoded_captions == ["new"]


def test_a_renamed_picture_is_none(photos: Path) -> None:
    prepare(photos)
    (photos / "0.png").rename(photos / "z.png")
    (photos / "0.txt").rename(photos / "z.txt")
    base, _ = prepare(photos)
    assert base.encoded_pictures == 0 and not base.encoded_captions


@pytest.mark.parametrize(("change", "pictures", "texts"), [
    (lambda p: write_picture(p / "1.png", key=9, size=(64, 96)), 1, 0),
    (lambda p: (p / "1.txt").write_text("other"), 0, 1),
])
def test_what_has_changed_is_encoded_again(photos: Path, change: Callable, pictures: int, texts: int) -> None:
    prepare(photos)
    change(photos)
    base, _ = prepare(photos)
    assert (base.encoded_pictures, len(base.encoded_captions)) == (pictures, texts)


def names(**changes: str) -> dict[str, str]:
    return {"unet": "u", "vae": "v", "text_encoder": "t", **changes}


@pytest.mark.parametrize(("base", "pictures", "texts"), [
    ({"names": names(vae="other")}, 3, 0),
    ({"names": names(text_encoder="other")}, 0, 3),
    ({"names": names(unet="other")}, 0, 0),
    ({"settings": {"clip_skip": 1}}, 0, 3),
])
def test_another_encoder_encodes_again(photos: Path, base: dict, pictures: int, texts: int) -> None:
    prepare(photos)
    other, _ = prepare(photos, FakeBase.make(**base))
    assert (other.encoded_pictures, len(other.encoded_captions)) == (pictures, texts)


def test_another_precision_encodes_again(photos: Path) -> None:
    prepare(photos)
    for component, expected in (("vae", (3, 0)), ("text_encoder", (0, 3))):
        base = FakeBase.make()
        base.components[component].to(torch.bfloat16)
        prepare(photos, base)
        assert (base.encoded_pictures, len(base.encoded_captions)) == expected


def test_another_cut_encodes_again(photos: Path) -> None:
    prepare(photos)
    base, _ = prepare(photos, buckets=False)
    assert base.encoded_pictures == 2  # the square one is cut as before
    base, _ = prepare(photos, background="black")
    assert base.encoded_pictures == 3


def test_flips_are_encoded_apart(photos: Path) -> None:
    prepare(photos)
    base, source = prepare(photos, flip=True)
    assert base.encoded_pictures == 3
    cache = Cache.at(None)
    plain, mirrored = source.pictures[1].latent_keys
    torch.testing.assert_close(cache.load_all([plain])[0]["moments"].flip(-1), cache.load_all([mirrored])[0]["moments"])


def test_what_is_trained_is_not_cached(photos: Path) -> None:
    base, _ = prepare(photos, trains={"text_encoder"})
    assert base.encoded_pictures == 3 and not base.encoded_captions
    base, _ = prepare(photos, trains={"vae"})
    assert base.encoded_pictures == 0 and len(base.encoded_captions) == 3


def test_class_pictures_share_the_cache(photos: Path, tmp_path: Path) -> None:
    write_picture(tmp_path / "class" / "a.png", key=1, size=(64, 96))  # photos/1.png once more
    write_picture(tmp_path / "class" / "b.png", key=20)
    base, _ = prepare(photos, prior=PriorOptions(caption="a dog", folder=str(tmp_path / "class")))
    assert base.encoded_pictures == 4 and sorted(base.encoded_captions)[0] == "a dog"


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def flip_a_bit(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, lambda p: flip_a_bit(p, 4), lambda p: p.write_bytes(b""),
                                    lambda p: p.write_bytes(b"{}" * 50), Path.unlink])
def test_a_damaged_entry_is_made_again(photos: Path, damage: Callable[[Path], None]) -> None:
    _, source = prepare(photos)
    cache = Cache.at(None)
    (text_key,) = source.pictures[2].text_keys.values()
    paths = [cache.path(source.pictures[0].latent_keys[0]), cache.path(text_key)]
    before = [safetensors.torch.load(path.read_bytes()) for path in paths]
    for path in paths:
        damage(path)
    assert cache.load(source.pictures[0].latent_keys[0]) is None
    with pytest.raises(UserError, match="lost or damaged"):
        for step in range(3):
            source.micro_batches(step)
    base, _ = prepare(photos)
    assert base.encoded_pictures == 1 and base.encoded_captions == ["caption 2"]
    after = [safetensors.torch.load(path.read_bytes()) for path in paths]
    for old, new in zip(before, after, strict=True):
        assert all(old[name].equal(new[name]) for name in old)


def test_not_a_number_names_the_picture(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBase, "encode_images", lambda self, pixels: pixels * float("nan"))
    with pytest.raises(UserError, match=r"0\.png.*not finite.*base\.vae"):
        prepare(photos)


def test_dtypes_and_shapes_survive(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    tensors = {"a": torch.randn(1, 3).bfloat16(), "b": torch.tensor(3), "c": torch.randn(2, 3).t()}
    cache.save("ab" * 20, tensors)
    loaded = cache.load("ab" * 20)
    assert loaded is not None and loaded.keys() == tensors.keys()
    assert all(loaded[n].dtype == t.dtype and loaded[n].equal(t) for n, t in tensors.items())


def test_several_processes_fill_one_cache(tmp_path: Path) -> None:
    together(fill_and_take, tmp_path)
    for i in range(20):
        entry = Cache(tmp_path).load(key_of(i))
        assert entry is not None and entry["x"].equal(torch.full((100,), float(i)))
    assert not list(tmp_path.rglob("*.part"))


def test_each_rank_begins_at_its_own_share(tmp_path: Path) -> None:
    made: list[int] = []
    makers = {key_of(i): (lambda i=i: made.append(i) or {"x": torch.zeros(1)}) for i in range(6)}
    assert Cache(tmp_path).fill(makers, "", "", SILENT, rank=1, world=3) == 6
    assert made == [2, 3, 4, 5, 0, 1]
