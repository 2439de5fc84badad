"""What is known of a base: from a header, from its family's name, and of the parts that a recipe has others of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from impasto.core.errors import UserError
from impasto.families.load import load_base
from impasto.planning.hollow import build
from impasto.planning.known import told
from impasto.training.recipe import BaseOptions
from tests.checkpoints import write_checkpoint


def options(**sections: Any) -> BaseOptions:
    return BaseOptions.model_validate(sections)


@pytest.mark.parametrize("family", ["sd1", "sd3"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_base_without_contents_has_the_shapes_of_the_loaded_one(tmp_path: Path, family: str, device: str) -> None:
    path = write_checkpoint(tmp_path / "base", family=family, size="mini", layout="diffusers")
    own, whole = options(path=str(path)), load_base(path)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        known = told(own)
        base = build(known, own, torch.float32) if device == "cpu" else None
    base = base or build(known, own, torch.float32, device)
    assert not known.notes and known.is_there and base.process.prediction == whole.process.prediction
    assert base.components.keys() == whole.components.keys()
    for name, network in whole.components.items():
        hollow = base.components[name].state_dict()
        assert {key: (each.shape, each.dtype) for key, each in network.state_dict().items()} == \
            {key: (each.shape, each.dtype) for key, each in hollow.items()}
        weights = list(base.components[name].parameters())
        assert all(each.is_meta if device == "meta" else isinstance(each, FakeTensor) and each.fake_mode is mode
                   for each in weights)


def test_what_is_not_there_is_taken_as_published() -> None:
    known = told(options(path="nowhere.safetensors", family="sd2", vae="no.vae", text_encoders=["no.encoder"]))
    assert not known.is_there and [line.partition(":")[0] for line in known.notes] == [
        "nowhere.safetensors is not there", "the base is taken for the one that predicts the noise",
        "no.vae is not there", "a file of base.text_encoders is not there"]
    assert known.checkpoint.scheduler["prediction_type"] == "epsilon"
    assert told(options(family="sd2", prediction="v_prediction")).checkpoint.scheduler["prediction_type"] == \
        "v_prediction"


def test_another_vae_is_the_one_that_is_built_and_must_be_of_the_family(tmp_path: Path) -> None:
    base, other = (write_checkpoint(tmp_path / name, family=family, size="mini", layout="diffusers")
                   for name, family in (("base", "sd1"), ("other", "sd3")))
    own = write_checkpoint(tmp_path / "own", family="sd1", size="mini", layout="diffusers")
    known = told(options(path=str(base), vae=str(own / "vae")))
    assert known.sources["vae"].path != known.sources["unet"].path == known.checkpoint.path
    with pytest.raises(UserError, match="is a VAE of sd3"):
        told(options(path=str(base), vae=str(other / "vae")))
