"""What some bases are shown beside a picture: holes and pairs, found, refused by name, cut and dropped rightly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from impasto.core.errors import UserError
from impasto.data.check import check
from impasto.data.dataset import list_folder
from impasto.data.findings import Level
from impasto.data.holes import hole, random_hole
from impasto.data.inventory import take_inventory
from impasto.data.options import DataOptions, PriorOptions, ValidationOptions
from impasto.data.source import Source, prepare_source
from impasto.objectives.batch import Batch
from impasto.objectives.denoise import Denoise
from impasto.objectives.reconstruct import Reconstruct
from impasto.training.recipe import make_recipe
from tests.data.fakes import FakeBase, noise_picture, write_picture

SMALL: dict[str, Any] = {"resolution": 64, "bucket_step": 8, "caption": "a dog"}
SHOWN = {"inpainting": ("mask", "masked"), "edits": ("picture",), "plain": ()}


def prepare(folder: Path, shows: str, *, base: FakeBase | None = None, reads: frozenset[str] = Denoise.reads,
            trains: str = "unet", batch_size: int = 2, seed: int = 0, **keys: Any) -> Source:
    own = {name: keys.pop(name, None) for name in ("prior", "validation")}
    data = DataOptions(**{"folder": str(folder), **SMALL, **keys})
    return prepare_source(base or FakeBase.make(shows=SHOWN[shows]), data, own["prior"], trains=frozenset({trains}),
                          batch_size=batch_size, accumulation=1, seed=seed, device="cpu", reads=reads,
                          validation=own["validation"])


def batches(source: Source, steps: int) -> list[Batch]:
    return [batch for step in range(steps) for micro in source.micro_batches(step) for batch in micro]


def pixels_of(key: int, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    return torch.from_numpy(np.array(noise_picture(key, size))).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(4):
        write_picture(tmp_path / "photos" / f"{i}.png", key=i)
    return tmp_path / "photos"


@pytest.fixture
def pairs(photos: Path) -> Path:
    """Each of the pictures with the one that it is made of."""
    for i in range(4):
        noise_picture(50 + i).save(photos / f"{i}-source.png")
    return photos


# --- random holes ------------------------------------------------------------------------------------------


def test_a_random_hole_is_a_function_of_its_key() -> None:
    holes = [np.asarray(random_hole((48, 80), "x", i)) for i in range(200)]
    again = [np.asarray(random_hole((48, 80), "x", i)) for i in range(200)]
    assert all(np.array_equal(a, b) for a, b in zip(holes, again, strict=True))
    assert {hole.shape for hole in holes} == {(48, 80)} and all(set(np.unique(hole)) <= {0, 255} for hole in holes)
    share = np.array([hole.mean() / 255 for hole in holes])
    assert share.min() > 0.005  # something is always drawn anew
    assert 0.15 < (share == 1).mean() < 0.35  # a quarter is the whole picture
    rest = share[share < 1]
    assert rest.min() < 0.15 and rest.max() > 0.6 and len(set(rest)) > 100
    assert min(np.asarray(random_hole((48, 80), "x", i, whole=0.0)).min() for i in range(30)) == 0


@pytest.mark.parametrize("flip", [False, True])
def test_batches_show_the_picture_without_its_hole(photos: Path, flip: bool) -> None:
    """The masked picture's moments are those of the picture that is grey in the hole, mirrored with it."""
    base = FakeBase.make(shows=SHOWN["inpainting"])
    source = prepare(photos, "inpainting", base=base, flip=flip, inpaint_masks=3)
    assert base.encoded_pictures == 4 * (1 + flip) * (1 + 3)
    seen: dict[str, set[bytes]] = {}
    for batch in batches(source, 12):
        assert set(batch.extras) == {"mask", "masked"} and batch.moments is not None and batch.mask is None
        mask, masked = batch.extras["mask"], batch.extras["masked"]
        assert mask.shape == (2, 1, 8, 8) and masked.shape == batch.moments.shape == (2, 6, 8, 8)
        for name, cells, moments in zip(batch.names, mask, masked, strict=True):
            item = next(item for item in source.pictures if item.picture.name == name)
            possible = []
            for number in range(3):
                for mirrored in item.handling.flips:
                    full = torch.from_numpy(hole(item, item.variant(0), mirrored, number).copy()).float()
                    pixels = pixels_of(int(name[0]))
                    pixels = (pixels.flip(-1) if mirrored else pixels) * (1 - full)
                    possible.append((full[None, ::8, ::8], base.encode_images(pixels)[0]))
            assert any(torch.equal(cells, one) and torch.allclose(moments, other) for one, other in possible)
            seen.setdefault(name, set()).add(moments.numpy().tobytes())
    assert len(seen) == 4 and all(1 < len(holes) <= 3 * (1 + flip) for holes in seen.values())


def test_the_same_holes_in_every_run_and_chosen_by_its_seed(photos: Path) -> None:
    one, same, other = (prepare(photos, "inpainting", seed=seed) for seed in (0, 0, 1))
    assert [item.extra_keys for item in one.pictures] == [item.extra_keys for item in other.pictures]
    ours, theirs = batches(one, 4), batches(same, 4)
    assert all(torch.equal(a.extras["mask"], b.extras["mask"]) for a, b in zip(ours, theirs, strict=True))
    assert one.fingerprint != prepare(photos, "inpainting", inpaint_masks=5).fingerprint


def test_each_variant_has_its_own_holes(photos: Path) -> None:
    source = prepare(photos, "inpainting", random_crop=True, zoom=0.3, variants=3, inpaint_masks=2, flip=True)
    assert all(len(item.extra_keys) == len(set(item.extra_keys)) == 3 * 2 * 2 for item in source.pictures)


# --- holes that are masks ----------------------------------------------------------------------------------


def half(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """White on its left half."""
    mask = Image.new("L", size[::-1], 0)
    mask.paste(255, (0, 0, size[1] // 2, size[0]))
    return mask


@pytest.mark.parametrize("flip", [False, True])
def test_a_mask_may_be_the_hole(photos: Path, flip: bool) -> None:
    for i in range(3):
        half((32, 32)).save(photos / f"{i}-masklabel.png")
    source = prepare(photos, "inpainting", mask="files", inpaint="mask", missing_masks="whole", flip=flip)
    left, seen = torch.zeros(1, 8, 8), set()
    left[..., :4] = 1
    for batch in batches(source, 8):
        assert batch.mask is None  # it does not weigh the loss too
        for name, mask in zip(batch.names, batch.extras["mask"], strict=True):
            if name == "3.png":
                assert torch.equal(mask, torch.ones(1, 8, 8))
                continue
            seen.add(torch.equal(mask, left.flip(-1)))
            assert torch.equal(mask, left) or torch.equal(mask, left.flip(-1))
    assert seen == ({True, False} if flip else {False})
    assert "pictures of which a mask says what is drawn anew: 3 of 4" in source.describe()


def test_a_mask_that_weighs_the_loss_stands_beside_random_holes(photos: Path) -> None:
    for i in range(4):
        half().save(photos / f"{i}-masklabel.png")
    (batch, *_) = batches(prepare(photos, "inpainting", mask="files", mask_floor=0.0), 1)
    assert batch.mask is not None and batch.mask[0, 0, 0].tolist() == [1] * 4 + [0] * 4 and "mask" in batch.extras


def test_a_mask_without_a_hole_is_refused(photos: Path) -> None:
    Image.new("L", (64, 64), 0).save(photos / "0-masklabel.png")
    with pytest.raises(UserError, match=r"0-masklabel.png is all black, and nothing would be drawn anew"):
        prepare(photos, "inpainting", mask="files", inpaint="mask", missing_masks="whole")


# --- pairs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["beside", "folder", "inside"])
def test_batches_show_the_picture_that_each_is_made_of(photos: Path, tmp_path: Path, where: str) -> None:
    keys: dict[str, Any] = {"pairs": "files"}
    if where != "beside":
        keys["sources"] = str(photos / "before" if where == "inside" else tmp_path / "before")
        Path(keys["sources"]).mkdir()
    for i in range(4):
        noise_picture(50 + i).save(Path(keys.get("sources", photos)) / (f"{i}.png" if "sources" in keys else
                                                                        f"{i}-source.png"))
    base = FakeBase.make(shows=SHOWN["edits"])
    source = prepare(photos, "edits", base=base, **keys)
    assert base.encoded_pictures == 8 and len(source.pictures) == 4
    for batch in batches(source, 4):
        assert batch.moments is not None and set(batch.extras) == {"picture"}
        for name, moments, own in zip(batch.names, batch.extras["picture"], batch.moments, strict=True):
            torch.testing.assert_close(moments[None], base.encode_images(pixels_of(50 + int(name[0]))))
            torch.testing.assert_close(own[None], base.encode_images(pixels_of(int(name[0]))))


def test_a_pair_is_cut_and_mirrored_alike(tmp_path: Path) -> None:
    """Of a pair of equal pictures, one twice as large, what is shown is the same up to scaling."""
    photo = noise_picture(0, (16, 24)).resize((96, 64), Image.Resampling.BICUBIC)
    (tmp_path / "photos").mkdir()
    photo.resize((192, 128), Image.Resampling.BICUBIC).save(tmp_path / "photos" / "a.png")
    photo.save(tmp_path / "photos" / "a-source.png")
    source = prepare(tmp_path / "photos", "edits", pairs="files", flip=True, random_crop=True, rotate=10, zoom=0.3,
                     batch_size=1)
    for batch in batches(source, 12):
        assert batch.moments is not None
        assert (batch.extras["picture"][:, :3] - batch.moments[:, :3]).abs().max() < 0.1


def test_shares_of_pairs_without_caption_picture_or_either(pairs: Path) -> None:
    """Side by side, as Brooks et al. have them, and each as often as it says."""
    source = prepare(pairs, "edits", pairs="files", caption_dropout=0.2, source_dropout=0.1, both_dropout=0.15)
    item, told = source.pictures[0], dict[tuple[bool, bool], float]()
    for step in range(4000):
        case = (bool(source.says(item, step, 0)), source.keeps_source(item, step, 0))
        told[case] = told.get(case, 0) + 1 / 4000
    expected = {(False, True): 0.2, (True, False): 0.1, (False, False): 0.15, (True, True): 0.55}
    assert told == pytest.approx(expected, abs=0.02)
    dropped = 0
    for batch in batches(source, 20):
        for sample, moments in zip(batch.samples, batch.extras["picture"], strict=True):
            assert sample in (0, 1)
            dropped += not moments.any()
    assert dropped
    assert "each picture comes with the one that it is made of, 20% of the samples without caption, 10% of the " \
        "samples without that one, 15% of the samples without either" in source.describe()


def test_captions_are_dropped_as_they_ever_were(pairs: Path) -> None:
    plain = prepare(pairs, "plain", caption_dropout=0.3)
    paired = prepare(pairs, "edits", pairs="files", caption_dropout=0.3, source_dropout=0.3)
    said = [[source.says(source.pictures[0], step, 0) for step in range(50)] for source in (plain, paired)]
    assert said[0] == said[1] and "" in said[0]


def test_pairs_that_cannot_be_used_are_told_at_once(pairs: Path) -> None:
    (pairs / "0-source.png").unlink()
    noise_picture(1, (64, 96)).save(pairs / "1-source.png")
    (pairs / "2-source.png").write_bytes(b"x")
    noise_picture(1).save(pairs / "3-source.webp")
    with pytest.raises(UserError) as error:
        prepare(pairs, "edits", pairs="files")
    for line in ("0.png: has no picture that it is made of (0-source.png)",
                 "1.png: its source 1-source.png is of another shape: 96x64 pixels, the picture has 64x64",
                 "2.png: its source 2-source.png is not a picture",
                 "3.png: has two pictures that it could be made of, 3-source.png and 3-source.webp"):
        assert line in str(error.value)
    (pairs / "3-source.webp").unlink()
    found = check(take_inventory(list_folder(pairs), DataOptions(folder=str(pairs), pairs="files", **SMALL), 1))
    (told,) = [finding for finding in found.findings if finding.kind == "pair"]
    assert told.level is Level.REFUSED and sorted(told.names) == ["0.png", "1.png", "2.png"]


def test_one_missing_source_is_one_line(pairs: Path) -> None:
    (pairs / "2-source.png").unlink()
    with pytest.raises(UserError, match=r"2\.png: has no picture that it is made of \(2-source\.png\)") as error:
        prepare(pairs, "edits", pairs="files")
    assert "\n" not in str(error.value)


# --- what goes with which base -----------------------------------------------------------------------------


def test_data_and_base_are_to_agree(pairs: Path) -> None:
    for i in range(4):
        half().save(pairs / f"{i}-masklabel.png")
    for shows, keys, line in (
            ("edits", {}, r"data: this base edits pictures, and learns from pairs of them; .*data\.pairs=files"),
            ("plain", {"pairs": "files"}, r"data\.pairs: this run edits no pictures"),
            ("inpainting", {"pairs": "files"}, r"data\.pairs: this run edits no pictures"),
            ("plain", {"mask": "files", "inpaint": "mask"}, r"data\.inpaint: this run fills no holes"),
            ("edits", {"pairs": "files", "mask": "files", "inpaint": "mask"}, "fills no holes")):
        with pytest.raises(UserError, match=line):
            prepare(pairs, shows, **keys)
    with pytest.raises(UserError, match="goes through its VAE, and is encoded once"):
        prepare(pairs, "edits", pairs="files", trains="vae")
    source = prepare(pairs, "inpainting", reads=Reconstruct.reads, trains="vae")  # which asks no denoiser
    assert not batches(source, 1)[0].extras


@pytest.mark.parametrize(("keys", "line"), [
    ({"inpaint": "mask"}, 'say where they are with mask = "alpha" or "files"'),
    ({"inpaint": "mask", "mask": "files", "inpaint_masks": 3}, "inpaint_masks is of random holes"),
    ({"inpaint": "mask", "mask": "files", "mask_floor": 0.2}, "mask_floor is of masks that weigh the loss"),
    ({"sources": "x"}, 'sources is of pairs of pictures: give pairs = "files"'),
    ({"source_dropout": 0.1}, "source_dropout is of pairs"), ({"both_dropout": 0.1}, "both_dropout is of pairs"),
    ({"pairs": "files", "source": "world", "folder": None}, "has no pairs of pictures"),
    ({"pairs": "files", "caption_dropout": 0.5, "source_dropout": 0.4, "both_dropout": 0.2}, "more than all of them"),
])
def test_options_that_cannot_be(keys: dict[str, Any], line: str) -> None:
    keys = {"folder": "x", **keys, **({"caption": None} if keys.get("source") == "world" else {})}
    with pytest.raises(ValueError, match=line):
        DataOptions(**{name: value for name, value in keys.items() if value is not None})


def test_class_pictures_are_made_of_no_others() -> None:
    with pytest.raises(UserError, match="class pictures are made of no other pictures"):
        make_recipe({"base": {"path": "x"}, "method": {"kind": "lora"}, "data": {"folder": "x", "pairs": "files"},
                     "prior": {"caption": "a dog"}})


def test_class_and_held_out_pictures_have_holes_too(photos: Path, tmp_path: Path) -> None:
    write_picture(tmp_path / "class" / "c.png", key=70)
    source = prepare(photos, "inpainting", prior=PriorOptions(folder=str(tmp_path / "class"), caption="a dog"),
                     validation=ValidationOptions(fraction=0.25))
    assert all(len(batch.extras["mask"]) == len(batch.names) == 4 for batch in batches(source, 3))
    (held_out,) = source.held_out
    one, two = (source.validation_batch([0]) for _ in range(2))
    assert len(held_out.extra_keys) == 4 and torch.equal(one.extras["mask"], two.extras["mask"])


def test_an_example_to_draw_with(pairs: Path) -> None:
    for i in range(4):
        half().save(pairs / f"{i}-masklabel.png")
    edits = prepare(pairs, "edits", pairs="files").example(1, 32, 48)
    assert edits.picture is not None and edits.picture.size == (32, 48) and edits.name == "1-source.png"
    holes = prepare(pairs, "inpainting").example(0, 32, 48)
    assert holes.mask is not None and holes.mask.size == (32, 48) and 0 < np.asarray(holes.mask).mean() < 255
    for i in range(4):
        (pairs / f"{i}-source.png").unlink()
    masked = prepare(pairs, "inpainting", mask="files", inpaint="mask", missing_masks="whole").example(0, 64, 64)
    assert np.array_equal(np.asarray(masked.mask), np.asarray(half())) and masked.mask_name == "0-masklabel.png"
    assert prepare(pairs, "plain").example(0, 64, 64).picture is None
