"""Without a resolution, pictures are as large as the base was made for."""

from __future__ import annotations

import pytest

from impasto.core.errors import UserError
from impasto.training.native import at_native_size
from impasto.training.recipe import READY, load_recipe, make_recipe
from tests.checkpoints import write_checkpoint
from tests.training.conftest import tree


def test_what_a_recipe_says_counts(recipe) -> None:
    made = recipe()
    assert at_native_size(made) is made


def test_ready_recipes_leave_it_to_the_base(photos, tmp_path) -> None:
    file = write_checkpoint(tmp_path / "xl.safetensors", "sdxl")
    for path in set(READY.glob("*.toml")) - {READY / "vae_decoder.toml"}:
        made = load_recipe(path.stem, [f"base.path={file}", f"data.folder={photos}"])
        assert at_native_size(made).data.resolution == 64, path  # pyright: ignore


def test_without_a_word_it_is_the_bases_own(mini, photos, tmp_path) -> None:
    told = tree(mini, photos, tmp_path)
    del told["data"]["resolution"]
    assert at_native_size(make_recipe(told)).data.resolution == 64  # pyright: ignore
    told["data"] = [{**told["data"], "share": 1}, {**told["data"], "share": 1, "resolution": 128}]
    assert [one.resolution for one in at_native_size(make_recipe(told)).data.sets] == [64, 128]  # pyright: ignore


def test_of_real_sizes(photos, tmp_path) -> None:
    from tests.formats.original_keys import keys_of
    from tests.formats.test_original_keys import sparse

    for name, prediction, side in (("sd1.5", None, 512), ("sd2.1", "v_prediction", 768), ("sd2.1", "epsilon", 512),
                                   ("sdxl-base", None, 1024)):
        file = tmp_path / f"{name}.safetensors"
        if not file.exists():
            assert keys_of(name) and sparse(file, name)
        told = tree(file, photos, tmp_path, base={"path": str(file), "prediction": prediction})
        del told["data"]["resolution"]
        assert at_native_size(make_recipe(told)).data.resolution == side  # pyright: ignore


def test_bounds_that_leave_it_out(mini, photos, tmp_path) -> None:
    told = tree(mini, photos, tmp_path, data={"bucket_min": 256, "bucket_max": 512})
    del told["data"]["resolution"]
    with pytest.raises(UserError, match="resolution 64 is not between .*; the resolution is the base's own: give|own"):
        at_native_size(make_recipe(told))


def test_the_checkpoint_tells(tmp_path) -> None:
    from impasto.formats.checkpoint import open_checkpoint

    for layout, name in (("ldm", "a.safetensors"), ("diffusers", "a")):
        assert open_checkpoint(write_checkpoint(tmp_path / name, "sdxl", layout=layout)).native_size == 64


def test_rates_are_tried_at_that_size_too(mini, photos, tmp_path, monkeypatch) -> None:
    from impasto.training import rate_finder

    seen: list[int] = []

    def trained(recipe, report):
        seen.append(recipe.data.resolution)
        raise UserError("enough")

    monkeypatch.setattr(rate_finder, "train", trained)
    told = tree(mini, photos, tmp_path, validation={"folder": str(photos)})
    del told["data"]["resolution"]
    with pytest.raises(UserError, match="enough"):
        rate_finder.find_rate(make_recipe(told))
    assert seen == [64]
