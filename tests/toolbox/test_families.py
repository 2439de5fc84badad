"""The toolbox on every family's checkpoints, in both layouts: also where a file holds several layers in one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.weighted import Weighted
from impasto.deltas.adapter import Adapter
from impasto.deltas.layers import shape_of
from impasto.deltas.lowrank import LowRank
from impasto.deltas.ranks import Wanted
from impasto.diffusion.process import process_from_scheduler_config
from impasto.families import FAMILIES
from impasto.families.base import Base
from impasto.families.load import load_base
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.formats.checkpoint import open_checkpoint
from impasto.formats.rewrite import rewrite
from impasto.toolbox.convert import convert
from impasto.toolbox.extract import extract_to, extracted
from impasto.toolbox.merge import merge_adapters, merge_checkpoints
from tests.checkpoints import write_checkpoint
from tests.formats.checkpoint_cases import equal, tensors_of

LAYOUTS = ("ldm", "diffusers")


@pytest.fixture(params=list(FAMILIES), scope="module")
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def files(family: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp(family)
    found = {"ldm": write_checkpoint(folder / "base.safetensors", family, layout="ldm"),
             "diffusers": write_checkpoint(folder / "base", family, layout="diffusers")}
    if (folder / "base/tokenizer_3").exists():
        shutil.copytree(folder / "base/tokenizer_3", folder / "tokenizer_3")  # beside a single file
    return found


def adapter_of(base: Base) -> Adapter:
    """A LoRA of rank 2 on some layers of each kind."""
    paths = [path for word in ("attention", "feed-forward", "text-encoder") for path in base.targets(word)]
    draw = torch.Generator().manual_seed(0)
    deltas = {}
    for path in paths[::3] + paths[1::7]:
        delta = LowRank(shape_of(base.layer(path)), 2)
        for factor in delta.parameters():
            factor.data = 0.1 * torch.randn(factor.shape, generator=draw)
        deltas[path] = (delta,)
    return Adapter(deltas, family=base.family)


def changed(base: Path, out: Path, name: str = "out") -> dict[str, Tensor]:
    before, after = tensors_of(open_checkpoint(base)), tensors_of(open_checkpoint(out))
    assert before.keys() == after.keys()
    return {key: after[key] - before[key] for key in before if not torch.equal(before[key], after[key])}


def target(layout: str, folder: Path, name: str) -> Path:
    return folder / (f"{name}.safetensors" if layout == "ldm" else name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merge_and_extract(family: str, files: dict[str, Path], layout: str, tmp_path: Path) -> None:
    """A merge adds each layer's dW and leaves all else to the bit; what is extracted from it is the adapter again."""
    adapter = adapter_of(load_base(files[layout]))
    save_adapter(adapter, tmp_path / "a.safetensors", dtype=torch.float32)
    out = target(layout, tmp_path, "merged")
    merge_adapters(files[layout], [Weighted(str(tmp_path / "a.safetensors"), 0.5)], out)
    found = changed(files[layout], out)
    assert found.keys() == {f"{layer}.weight" for layer in adapter.layers}
    for layer in adapter.layers:
        torch.testing.assert_close(found[f"{layer}.weight"].flatten(1), 0.5 * adapter.dense(layer).flatten(1),
                                   rtol=1e-4, atol=1e-6)
    again, _ = extracted(files[layout], out, Wanted(rank=2))
    assert again.family == family and set(again.layers) == set(adapter.layers)
    for layer in adapter.layers:
        torch.testing.assert_close(again.dense(layer).flatten(1), 0.5 * adapter.dense(layer).flatten(1), rtol=1e-3,
                                   atol=1e-5)
    for format in ("kohya", "comfyui", "diffusers", "onetrainer"):
        save_adapter(again, tmp_path / f"{format}.safetensors", format=format, dtype=torch.float32)
        other = load_adapter(tmp_path / f"{format}.safetensors", family)
        assert set(other.layers) == set(again.layers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_with_checkpoints(files: dict[str, Path], layout: str, tmp_path: Path) -> None:
    other = "ldm" if layout == "diffusers" else "diffusers"
    tuned, out = target(other, tmp_path, "tuned"), target(layout, tmp_path, "out")
    identity = "text_encoder.text_projection.weight" if layout == "ldm" else ""  # of SD 3, for which see below
    rewrite(open_checkpoint(files[other]), tuned, lambda component, name, tensor: None
            if f"{component}.{name}" == identity else 1.5 * tensor + 1)
    merge_checkpoints([files[layout], tuned], [0.25, 0.75], out)
    first, second, made = (tensors_of(open_checkpoint(path)) for path in (files[layout], tuned, out))
    for key, tensor in made.items():
        torch.testing.assert_close(tensor, 0.25 * first[key] + 0.75 * second[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind, word", [("epsilon", "epsilon"), ("v_prediction", "v"), (None, None)])
def test_what_is_extracted_tells_what_the_checkpoints_predict(kind: str | None, word: str | None, tmp_path: Path
                                                              ) -> None:
    """Nothing, where neither tells: SD 2 has networks of both kinds."""
    first, second = (write_checkpoint(tmp_path / f"{seed}", "sd2", layout="diffusers", seed=seed) for seed in (0, 1))
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for source, path in zip((first, second), paths, strict=True):
        convert(source, path, prediction=kind)
        if kind is None:
            with safe_open(path, "pt") as opened:
                told = {key: text for key, text in opened.metadata().items() if key != "modelspec.prediction_type"}
            save_file(load_file(path), path, told)
    extract_to(*paths, tmp_path / "out.safetensors", Wanted(rank=1))
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        assert opened.metadata().get("modelspec.prediction_type") == word


def test_what_a_single_file_has_no_place_for(tmp_path: Path) -> None:
    """CLIP-L's projection is an identity in SD 3's single files, which do not hold it."""
    single = write_checkpoint(tmp_path / "base.safetensors", "sd3", layout="ldm")
    folder, own = (write_checkpoint(tmp_path / "folder", "sd3", layout="diffusers"), "text_projection.weight")
    rewrite(open_checkpoint(folder), tmp_path / "tuned", lambda component, name, tensor: 2 * tensor
            if (component, name) == ("text_encoder", own) else None)
    with pytest.raises(UserError, match="text_projection.weight of its own, for which a single file has no place"):
        merge_checkpoints([single, tmp_path / "tuned"], [0.5, 0.5], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    merge_checkpoints([folder, tmp_path / "tuned"], [0.5, 0.5], tmp_path / "out")


def test_there_and_back_is_the_same_file(files: dict[str, Path], tmp_path: Path) -> None:
    convert(files["ldm"], tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert equal(tensors_of(open_checkpoint(files["ldm"])), tensors_of(open_checkpoint(tmp_path / "back.safetensors")))
    half = tmp_path / "half.safetensors"
    convert(files["diffusers"], half, dtype=torch.float16)
    whole = tensors_of(open_checkpoint(files["diffusers"]))
    assert all(torch.equal(tensor, whole[key].half()) for key, tensor in tensors_of(open_checkpoint(half)).items())


def test_the_running_average_in_place_of_the_last_weights(family: str, files: dict[str, Path], tmp_path: Path) -> None:
    """`LitEma` of CompVis' code: names without dots, beside a count and the decay."""
    tensors = load_file(files["ldm"])
    denoiser = {key: tensor for key, tensor in tensors.items() if key.startswith("model.diffusion_model.")}
    tensors |= {"model_ema." + key.removeprefix("model.").replace(".", ""): tensor + 1
                for key, tensor in denoiser.items()}
    tensors |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    with safe_open(files["ldm"], "pt") as file:
        save_file(tensors, tmp_path / "full.safetensors", file.metadata())
    if (files["ldm"].parent / "tokenizer_3").exists():
        shutil.copytree(files["ldm"].parent / "tokenizer_3", tmp_path / "tokenizer_3")
    convert(tmp_path / "full.safetensors", tmp_path / "ema.safetensors", ema=True)
    convert(tmp_path / "full.safetensors", tmp_path / "folder", ema=True)
    before = tensors_of(open_checkpoint(files["ldm"]))
    for out in ("ema.safetensors", "folder"):
        for key, tensor in tensors_of(open_checkpoint(tmp_path / out)).items():
            assert torch.equal(tensor, before[key] + (key.partition(".")[0] in ("unet", "transformer"))), key
    with pytest.raises(UserError, match="holds no running average of its weights"):
        convert(files["ldm"], tmp_path / "no.safetensors", ema=True)


def test_a_noise_process_of_its_own_is_told_of(tmp_path: Path) -> None:
    """A single file stands for its family's: what a folder's scheduler has otherwise is lost, and zero SNR is not."""
    folder = write_checkpoint(tmp_path / "base", layout="diffusers")
    config = folder / "scheduler/scheduler_config.json"
    own = json.loads(config.read_text())
    for number, (change, told) in enumerate((
            ({}, ()), ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, ()),
            ({"_class_name": "DDIMScheduler", "trained_betas": None}, ()),
            ({"beta_end": 0.02}, ("beta_end 0.02, not 0.012",)),
            ({"beta_schedule": "linear", "num_train_timesteps": 500},
             ("num_train_timesteps 500, not 1000; beta_schedule linear, not scaled_linear",)),
            ({"trained_betas": [0.01] * 1000}, ("trained_betas of its own",)))):
        config.write_text(json.dumps(own | change))
        out = tmp_path / f"{number}.safetensors"
        remarks = [line for line in convert(folder, out).remarks if "noise process" in line]
        assert len(remarks) == len(told) and all(map(str.endswith, remarks, told)), remarks
        if not told:
            first, second = (process_from_scheduler_config(open_checkpoint(path).scheduler) for path in (folder, out))
            torch.testing.assert_close(torch.tensor(first.betas), torch.tensor(second.betas))
    assert "noise process" not in "".join(convert(folder, tmp_path / "again").remarks)
    config.write_text(json.dumps(own | {"prediction_type": "sample"}))
    with pytest.raises(UserError, match="predicts the sample, which a single file cannot tell"):
        convert(folder, tmp_path / "sample.safetensors")


def test_a_folder_holds_no_running_average(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a diffusers folder, and single files alone hold a running average"):
        convert(files["diffusers"], tmp_path / "no.safetensors", ema=True)
