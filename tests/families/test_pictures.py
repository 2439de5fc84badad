"""Where an adapter that is asked for by name is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.lowrank import LowRank
from impasto.families.pictures import find_adapter
from impasto.formats.adapters import load_adapter, save_adapter

LAYERS = {"unet": "unet.conv_in", "text_encoder": "text_encoder.text_model.encoder.layers.0.mlp.fc1"}


def adapter(*components: str) -> Adapter:
    shapes = {"unet": (32, 4, 3, 3), "text_encoder": (37, 32)}
    return Adapter({LAYERS[name]: (LowRank(shapes[name], 2),) for name in components}, family="sd1")


@pytest.mark.parametrize("components", [("unet",), ("unet", "text_encoder")])
def test_peft_folders_are_found_as_a_path_and_by_name(tmp_path: Path, components: tuple[str, ...]) -> None:
    save_adapter(adapter(*components), tmp_path / "dog", format="peft")
    for found in (find_adapter(str(tmp_path / "dog"), []), find_adapter("dog", [tmp_path])):
        assert found == tmp_path / "dog"
        assert {layer.partition(".")[0] for layer in load_adapter(found).deltas} == set(components)


def test_of_a_folder_that_is_no_adapter_its_loader_says_so(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="is a folder without an adapter in it; a peft folder holds"):
        load_adapter(find_adapter(str(tmp_path / "folder"), [tmp_path]))


def test_a_folder_that_happens_to_have_the_name_is_not_taken_for_the_file(tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("dog", "loras"):
        (tmp_path / folder).mkdir()
    save_adapter(adapter("unet"), tmp_path / "loras" / "dog.safetensors")
    assert find_adapter("dog", [Path("loras")]) == Path("loras/dog.safetensors")
    with pytest.raises(UserError, match="no adapter of that name; .*did you mean 'dog'"):
        find_adapter("dogg", [Path("loras")])
