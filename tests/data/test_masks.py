"""Masks: found, refused by name, cut as their pictures are, and laid on each latent cell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from impasto.core.errors import UserError
from impasto.data.augment import Augment, Variant
from impasto.data.buckets import bucket_sizes, place
from impasto.data.check import check
from impasto.data.dataset import list_folder
from impasto.data.findings import Level
from impasto.data.inventory import take_inventory
from impasto.data.masks import Mask, cell_weights, cells
from impasto.data.options import DataOptions, PriorOptions, ValidationOptions
from impasto.data.source import Source, prepare_source
from tests.data.fakes import FakeBase, noise_picture, write_picture
from tests.training.conftest import mini, recipe

__all__ = ["mini", "recipe"]

SMALL: dict[str, Any] = {"resolution": 64, "bucket_step": 8, "caption": "a dog"}


def grey(key: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A random mask of (height, width)."""
    return noise_picture(1000 + key, size).convert("L")


def blocks(key: int, size: tuple[int, int] = (64, 64), cell: int = 8) -> torch.Tensor:
    """Means of the mask's cells, (1, h, w), by numpy."""
    pixels = np.asarray(grey(key, size)).astype(np.float64) / 255
    height, width = size[0] // cell, size[1] // cell
    return torch.tensor([[[pixels[i * cell:(i + 1) * cell, j * cell:(j + 1) * cell].mean() for j in range(width)]
                          for i in range(height)]], dtype=torch.float32)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four pictures of one size, each with a mask beside it."""
    for i in range(4):
        write_picture(tmp_path / "photos" / f"{i}.png", key=i)
        grey(i).save(tmp_path / "photos" / f"{i}-masklabel.png")
    return tmp_path / "photos"


def prepare(photos: Path, prior: PriorOptions | None = None, validation: ValidationOptions | None = None,
            trains: str = "unet", batch_size: int = 2, base: FakeBase | None = None, **keys: Any) -> Source:
    data = DataOptions(**{"folder": str(photos), "mask": "files", "mask_floor": 0.0, **SMALL, **keys})
    return prepare_source(base or FakeBase.make(), data, prior, trains=frozenset({trains}), batch_size=batch_size,
                          accumulation=1, seed=0, device="cpu", validation=validation)


def by_name(source: Source, steps: int = 2) -> dict[str, torch.Tensor]:
    """The mask of each picture, (1, h, w), over some steps."""
    found = {}
    for step in range(steps):
        for batches in source.micro_batches(step):
            for batch in batches:
                assert batch.mask is not None and batch.mask.dtype == torch.float32
                found |= dict(zip(batch.names, batch.mask, strict=True))
    return found


# --- the way of a mask -------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [
    {}, {"random_crop": True}, {"zoom": 0.5}, {"rotate": 30}, {"random_crop": True, "zoom": 0.4, "rotate": 45},
    {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.3, "rotate": 10}])
@pytest.mark.parametrize("size", [(64, 64), (100, 77), (61, 140)])
def test_it_goes_the_way_of_its_picture(keys: dict[str, Any], size: tuple[int, int], tmp_path: Path) -> None:
    """A picture whose three channels are the mask, shown by the same variant, is what the mask becomes."""
    grey(0, size).save(tmp_path / "m.png")
    mask = Mask(tmp_path / "m.png", digest(tmp_path / "m.png"), False)
    data = DataOptions(folder="x", **SMALL, **keys)
    placement = place(size, data, bucket_sizes(data))
    assert placement is not None
    for number in range(3):
        shown = Augment.of(data).variant(placement, "digest", number)
        colourless = Variant(shown.placement, shown.angle)
        picture = grey(0, size).convert("RGB")
        for flip in (False, True):
            pixels = (colourless.show(picture, flip)[:1] + 1) / 2
            found = cells(mask, shown, 8)
            torch.testing.assert_close(found.flip(-1) if flip else found, torch.nn.functional.avg_pool2d(pixels, 8),
                                       rtol=0, atol=1e-6)


def digest(path: Path) -> str:
    import hashlib

    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def test_a_transparent_picture_is_cut_like_its_alpha(tmp_path: Path) -> None:
    image = noise_picture(0, (80, 72))
    image.putalpha(grey(0, (80, 72)))
    image.save(tmp_path / "a.png")
    grey(0, (80, 72)).save(tmp_path / "m.png")
    data = DataOptions(folder="x", **SMALL, zoom=0.3, rotate=20, random_crop=True)
    placement = place((80, 72), data, bucket_sizes(data))
    assert placement is not None
    shown = Augment.of(data).variant(placement, "digest", 1)
    own, other = (Mask(tmp_path / name, digest(tmp_path / name), alpha) for name, alpha in
                  (("a.png", True), ("m.png", False)))
    assert torch.equal(cells(own, shown, 8), cells(other, shown, 8))


def test_exif_turns_a_mask_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    grey(0, (64, 96)).save(tmp_path / "m.png", exif=exif)
    upright = grey(0, (64, 96)).transpose(Image.Transpose.ROTATE_270)
    mask = Mask(tmp_path / "m.png", digest(tmp_path / "m.png"), False)
    assert np.array_equal(np.asarray(mask.read()), np.asarray(upright))


def test_floor_and_mean() -> None:
    white = torch.tensor([[[0.0, 0.05], [0.4, 1.0]]])
    assert torch.equal(cell_weights(white, 0.0, False), white)
    torch.testing.assert_close(cell_weights(white, 0.1, False), torch.tensor([[[0.1, 0.1], [0.4, 1.0]]]))
    torch.testing.assert_close(cell_weights(white, 0.1, True), torch.tensor([[[0.25, 0.25], [1.0, 2.5]]]))
    assert not cell_weights(torch.zeros(1, 2, 2), 0.0, True).any()  # the window may lie beside all that is white


# --- in batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trains", ["unet", "vae"])
def test_batches_have_the_masks_of_their_pictures(photos: Path, trains: str) -> None:
    found = by_name(prepare(photos, trains=trains))
    assert sorted(found) == [f"{i}.png" for i in range(4)]  # no mask is a picture
    for i in range(4):
        torch.testing.assert_close(found[f"{i}.png"], blocks(i))


def test_floor_and_normalising_are_the_recipes(photos: Path) -> None:
    floored, equal = by_name(prepare(photos, mask_floor=0.5)), by_name(prepare(photos, mask_normalised=True))
    for i in range(4):
        torch.testing.assert_close(floored[f"{i}.png"], blocks(i).clamp(min=0.5))
        torch.testing.assert_close(equal[f"{i}.png"], blocks(i) / blocks(i).mean())


def test_mirrored_uses_have_mirrored_masks(photos: Path) -> None:
    """With pixels in the batch, whether it is mirrored can be seen."""
    source, seen = prepare(photos, trains="vae", flip=True), set()
    for step in range(8):
        ((batch,),) = source.micro_batches(step)
        assert batch.pixels is not None and batch.mask is not None
        for name, pixels, mask in zip(batch.names, batch.pixels, batch.mask, strict=True):
            plain = torch.from_numpy(np.array(noise_picture(int(name[0])))).permute(2, 0, 1).float() / 127.5 - 1
            flipped = not torch.equal(pixels, plain)
            seen.add(flipped)
            expected = blocks(int(name[0]))
            torch.testing.assert_close(mask, expected.flip(-1) if flipped else expected)
    assert seen == {True, False}


def test_variants_have_their_own_cuts(photos: Path) -> None:
    source = prepare(photos, random_crop=True, zoom=0.5, rotate=20, variants=3)
    masks = {(name, mask.sum().item()) for step in range(12) for batches in source.micro_batches(step)
             for batch in batches for name, mask in zip(batch.names, batch.mask, strict=True)}  # type: ignore[arg-type]
    assert 4 < len(masks) <= 12


def test_masks_leave_encoded_pictures_as_they_are(photos: Path) -> None:
    base = FakeBase.make()
    prepare(photos, mask="none", mask_floor=0.1, base=base)
    assert base.encoded_pictures == 4
    prepare(photos, base=base)
    assert base.encoded_pictures == 4


def test_class_pictures_have_none_and_held_out_ones_have(photos: Path, tmp_path: Path) -> None:
    for i in range(2):
        write_picture(tmp_path / "class" / f"c{i}.png", key=70 + i)
    source = prepare(photos, PriorOptions(folder=str(tmp_path / "class"), caption="a dog"),
                     ValidationOptions(fraction=0.25))
    for name, mask in by_name(source, 4).items():
        torch.testing.assert_close(mask, torch.ones(1, 8, 8) if name.startswith("c") else blocks(int(name[0])))
    (held_out,) = source.held_out
    batch = source.validation_batch([0])
    assert batch.mask is not None
    torch.testing.assert_close(batch.mask[0], blocks(int(held_out.picture.name[0])))


# --- where they are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_a_folder_of_masks(tmp_path: Path, inside: bool) -> None:
    masks = tmp_path / "photos" / "masks" if inside else tmp_path / "masks"
    for i, name in enumerate(["a.png", "inner/b.png", "c.jpg"]):
        write_picture(tmp_path / "photos" / name, key=i)
        path = masks / Path(name).with_suffix(".png" if i else ".webp")
        path.parent.mkdir(parents=True, exist_ok=True)
        grey(i).save(path, lossless=True)
    found = by_name(prepare(tmp_path / "photos", masks=str(masks), batch_size=1), 3)
    assert sorted(found) == ["a.png", "c.jpg", "inner/b.png"]
    for i, name in enumerate(["a.png", "inner/b.png", "c.jpg"]):
        torch.testing.assert_close(found[name], blocks(i))


def test_alpha_and_pictures_without(tmp_path: Path) -> None:
    write_picture(tmp_path / "photos" / "a.png", key=0)
    image = noise_picture(1)
    image.putalpha(grey(1))
    image.save(tmp_path / "photos" / "b.png")
    with pytest.raises(UserError, match="has no alpha channel, which is to be its mask") as error:
        prepare(tmp_path / "photos", mask="alpha")
    assert str(error.value.where).endswith("a.png")
    found = by_name(prepare(tmp_path / "photos", mask="alpha", missing_masks="whole"), 1)
    assert torch.equal(found["a.png"], torch.ones(1, 8, 8))
    torch.testing.assert_close(found["b.png"], blocks(1))


def test_a_smaller_mask_of_the_same_picture(tmp_path: Path) -> None:
    write_picture(tmp_path / "photos" / "a.png", size=(128, 128))
    Image.new("L", (32, 32), 255).save(tmp_path / "photos" / "a-masklabel.png")
    assert torch.equal(by_name(prepare(tmp_path / "photos", batch_size=1), 1)["a.png"], torch.ones(1, 8, 8))


def test_all_that_is_wrong_is_told_at_once(photos: Path) -> None:
    (photos / "0-masklabel.png").unlink()
    grey(1, (64, 96)).save(photos / "1-masklabel.png")
    (photos / "2-masklabel.png").write_bytes(b"no picture")
    Image.new("L", (64, 64), 0).save(photos / "3-masklabel.png")
    with pytest.raises(UserError) as error:
        prepare(photos)
    told = str(error.value)
    assert "4 files cannot be used" in told
    assert "0.png: has no mask (0-masklabel.png)" in told and told.endswith("data.missing_masks=whole")
    assert "1.png: its mask 1-masklabel.png is of another shape: 96x64 pixels, the picture has 64x64" in told
    assert "2.png: its mask 2-masklabel.png is not a picture" in told
    assert "3.png: its mask 3-masklabel.png is all black, and nothing would count (data.mask_floor)" in told
    Image.new("L", (64, 64), 0).save(photos / "2-masklabel.png")
    grey(1).save(photos / "1-masklabel.png")
    prepare(photos, mask_floor=0.1, missing_masks="whole")
    grey(1).save(photos / "1-masklabel.webp")
    with pytest.raises(UserError, match=r"has two masks, 1-masklabel\.png and 1-masklabel\.webp"):
        prepare(photos, mask_floor=0.1, missing_masks="whole")


def test_one_that_changes_later_is_noticed(photos: Path) -> None:
    mask = Mask(photos / "0-masklabel.png", digest(photos / "0-masklabel.png"), False)
    grey(9).save(mask.path)
    with pytest.raises(UserError, match="has changed since this command started"):
        mask.read()


def test_other_masks_are_another_fingerprint(photos: Path) -> None:
    first = prepare(photos).fingerprint
    assert prepare(photos, mask_floor=0.2).fingerprint != first
    assert prepare(photos, mask="none", mask_floor=0.1).fingerprint != first
    grey(9).save(photos / "0-masklabel.png")
    assert prepare(photos).fingerprint != first


def test_check_tells_what_a_run_would_refuse(photos: Path) -> None:
    def found(**keys: Any) -> dict[str, Any]:
        data = DataOptions(folder=str(photos), **SMALL, **keys)
        return {each.kind: each for each in check(take_inventory(list_folder(photos), data, 1)).findings}

    assert "mask" not in found(mask="files") and found()["unread masks"].what == "4 masks not read"
    (photos / "0-masklabel.png").unlink()
    told = found(mask="files")["mask"]
    assert told.level is Level.REFUSED and told.names == {"0.png": "has no mask (0-masklabel.png)"}
    assert found(mask="files", missing_masks="whole")["no mask"].what == "1 picture without a mask, and counted in full"
    alpha = found(mask="alpha")["mask"]
    assert len(alpha.names) == 4 and "has no alpha channel" in alpha.names["1.png"]


def test_the_run_says_how_many(photos: Path) -> None:
    lines = prepare(photos, mask_floor=0.25).describe()
    assert "pictures of which parts count by a mask: 4 of 4; the rest of each weighs 0.25" in lines
    assert "masks that are not read, as data.mask is not files: 4" in prepare(photos, mask="none",
                                                                              mask_floor=0.1).describe()


@pytest.mark.parametrize(("keys", "line"), [
    ({"folder": "x", "masks": "m"}, "masks is of masks: say where they are with mask"),
    ({"folder": "x", "mask_floor": 0.5}, "mask_floor is of masks"),
    ({"folder": "x", "mask": "alpha", "masks": "m"}, 'masks is a folder of files: give mask = "files"'),
    ({"source": "world", "mask": "alpha"}, "the drawn world has no masks"),
    ({"source": "shards", "shards": ["a.tar"], "mask": "alpha"}, 'source = "shards" has no masks'),
    ({"folder": "x", "mask": "files", "mask_floor": 1.5}, "less than or equal to 1"),
])
def test_what_cannot_be_is_said(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        DataOptions(**keys)


def test_a_run_learns_by_its_masks_and_resumes(recipe: Callable[..., Any], photos: Path) -> None:
    from safetensors.torch import load_file

    from impasto.training.trainer import train

    sections = {"data": {"folder": str(photos), "mask": "files", "flip": True, "rotate": 20, "variants": 2},
                "validation": {"fraction": 0.25}}
    straight = train(recipe("straight", **sections))
    train(recipe("stopped", **sections), stop_after=3)
    resumed = train(recipe("stopped", **sections))
    other = train(recipe("other", **{**sections, "data": {**sections["data"], "mask": "none"}}))
    assert straight.artifact and resumed.artifact and other.artifact
    one, two, three = (load_file(each.artifact) for each in (straight, resumed, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)
    assert straight.validation == resumed.validation != other.validation


def test_an_objective_that_looks_at_no_masks_is_told(recipe: Callable[..., Any], photos: Path) -> None:
    with pytest.raises(UserError, match="objective reconstruct looks at no masks: leave data.mask out"):
        recipe(data={"folder": str(photos), "mask": "files"}, objective={"kind": "reconstruct"})


def test_a_folder_of_masks_alone_is_no_folder_of_pictures(photos: Path) -> None:
    with pytest.raises(UserError, match="there are no pictures beside the masks"):
        prepare(photos.parent, masks=str(photos))


def test_a_missing_folder_of_masks_is_called_that(photos: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder; say where the masks are: data.masks="):
        prepare(photos, masks=str(photos / "none"))
