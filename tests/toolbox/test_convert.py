"""Layouts against the libraries' own, and adapters of one kind against what they were as another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.ranks import Wanted
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.formats.checkpoint import open_checkpoint
from impasto.toolbox.convert import convert
from tests.checkpoints import write_checkpoint
from tests.formats.adapter_cases import random_adapter
from tests.formats.checkpoint_cases import equal, tensors_of
from tests.formats.kind_cases import MAKERS, adapter_of_kind

Written = Callable[..., Path]


def saved(adapter: Adapter, path: Path, format: str = "kohya") -> Path:
    save_adapter(adapter, path, dtype=torch.float32, format=format)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_becomes_the_folder_that_diffusers_has_of_it(dtype: torch.dtype, written: Written, tmp_path: Path
                                                            ) -> None:
    convert(written("ldm", dtype=dtype), tmp_path / "out")
    one, other = (open_checkpoint(path) for path in (tmp_path / "out", written("ldm", dtype=dtype)))
    assert equal(tensors_of(one), tensors_of(other))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out", dtype=dtype)
    theirs = load_file(written("diffusers", dtype=dtype) / "unet" / "diffusion_pytorch_model.safetensors")
    ours = pipeline.unet.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    encoder = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    for name, tensor in pipeline.text_encoder.state_dict().items():
        spelled = name if name in encoder else f"text_model.{name}"
        assert name.endswith("position_ids") or torch.equal(tensor, encoder[spelled])
    assert pipeline.tokenizer("a photo of sks dog").input_ids[1:-1] == [320, 1125, 539, 48136, 1929]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_folder_becomes_the_file_and_back_again(dtype: torch.dtype, written: Written, tmp_path: Path) -> None:
    convert(written("diffusers", dtype=dtype), tmp_path / "out.safetensors")
    found, theirs = load_file(tmp_path / "out.safetensors"), load_file(written("ldm", dtype=dtype))
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[key], theirs[key]) and found[key].shape == theirs[key].shape for key in theirs)
    convert(tmp_path / "out.safetensors", tmp_path / "again")
    assert equal(tensors_of(open_checkpoint(tmp_path / "again")),
                 tensors_of(open_checkpoint(written("diffusers", dtype=dtype))))
    configs = [open_checkpoint(path).configs for path in (tmp_path / "again", written("diffusers", dtype=dtype))]
    for name in configs[0]:
        shared = configs[0][name].keys() & configs[1][name].keys() - {"transformers_version"}
        assert {key: configs[0][name][key] for key in shared} == {key: configs[1][name][key] for key in shared}


def test_another_noise_process_is_marked(written: Written, tmp_path: Path) -> None:
    folder = tmp_path / "v"
    shutil.copytree(written("diffusers"), folder)
    place = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(place.read_text()) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    place.write_text(json.dumps(config))
    convert(folder, tmp_path / "v.safetensors", dtype=torch.float16)
    tensors = load_file(tmp_path / "v.safetensors")
    assert tensors["v_pred"].numel() == tensors["ztsnr"].numel() == 0
    assert {t.dtype for key, t in tensors.items() if t.numel()} == {torch.float16}
    told = open_checkpoint(tmp_path / "v.safetensors").scheduler
    assert told["prediction_type"] == "v_prediction" and told["rescale_betas_zero_snr"]


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_what_somebody_says_of_its_prediction_stays_in_its_own_layout_too(layout: str, tmp_path: Path) -> None:
    for family in ("sd2", "sdxl"):
        end = ".safetensors" if layout == "ldm" else ""
        base = write_checkpoint(tmp_path / f"{family}{end}", family, layout=layout)
        for number, kind in enumerate(("v_prediction", "epsilon")):
            convert(base, base := tmp_path / f"{family}-{number}{end}", to=layout, prediction=kind)
            assert open_checkpoint(base).scheduler["prediction_type"] == kind


def test_a_flow_predicts_nothing_else(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "sd3.safetensors", "sd3")
    with pytest.raises(UserError, match="predicts a flow, as all of its family do; leave --prediction"):
        convert(base, tmp_path / "out", prediction="epsilon")
    assert list(tmp_path.iterdir()) == [base]


def test_what_is_no_part_of_a_checkpoint_is_told(written: Written, tmp_path: Path) -> None:
    with safe_open(written(), "pt") as opened:
        save_file(load_file(written()) | {"model_ema.decay": torch.ones(1)}, tmp_path / "ema.safetensors",
                  opened.metadata())
    assert convert(tmp_path / "ema.safetensors", tmp_path / "out").remarks == (
        "left out, as no part of the checkpoint: model_ema.decay",)


# --- adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
@pytest.mark.parametrize("source", ["kohya", "diffusers", "peft"])
def test_format_to_format_loses_nothing(source: str, to: str, tmp_path: Path) -> None:
    file = saved(random_adapter(alpha=2.0), tmp_path / ("in" if source == "peft" else "in.safetensors"), source)
    out = tmp_path / ("out" if to == "peft" else "out.safetensors")
    convert(file, out, to=to, dtype=torch.float32)
    one, other = load_adapter(file), load_adapter(out)
    assert set(one.layers) == set(other.layers)
    for layer in one.layers:
        torch.testing.assert_close(other.dense(layer), one.dense(layer), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if "dora" not in kind])
def test_another_kind_is_a_lora_exactly_or_at_a_rank(kind: str, tmp_path: Path) -> None:
    file, out = saved(adapter_of_kind(kind), tmp_path / "a.safetensors"), tmp_path / "out.safetensors"
    before = load_adapter(file)
    if kind in ("dense", "lokr-full"):
        with pytest.raises(UserError, match="without low-rank factors.*--rank"):
            convert(file, out, kind="lora")
    else:
        convert(file, out, kind="lora", dtype=torch.float32)
        after = load_adapter(out)
        for layer in before.layers:
            torch.testing.assert_close(after.dense(layer), before.dense(layer), rtol=1e-4, atol=1e-5)
        if kind == "loha":
            assert {term.factors()[0].shape[1] for terms in after.deltas.values() for term in terms} == {4}  # r²
    made = convert(file, out, kind="lora", wanted=Wanted(rank=2), dtype=torch.float32, force=True)
    after = load_adapter(out)
    assert {term.kind for terms in after.deltas.values() for term in terms if term.shape} == {"lora"}
    for layer, kept in made.layers.items():
        change = before.dense(layer).double().flatten()
        gap = float((after.dense(layer).double().flatten() - change).norm() / change.norm())
        assert gap == pytest.approx(kept.error, abs=2e-3)


@pytest.mark.parametrize("kind", ["dense", "lora", "lokr-full"])
def test_another_kind_is_the_nearest_lokr(kind: str, tmp_path: Path) -> None:
    file = saved(adapter_of_kind(kind), tmp_path / "a.safetensors")
    made = convert(file, tmp_path / "out.safetensors", kind="lokr", factor=4, dtype=torch.float32)
    before, after = load_adapter(file), load_adapter(tmp_path / "out.safetensors")
    assert {term.kind for terms in after.deltas.values() for term in terms if term.shape} == {"lokr"}
    for layer, kept in made.layers.items():
        change = before.dense(layer).double().flatten()
        gap = float((after.dense(layer).double().flatten() - change).norm() / change.norm())
        assert gap == pytest.approx(kept.error, abs=2e-3)


def test_a_dora_is_converted_with_its_base(written: Written, tmp_path: Path) -> None:
    file = saved(adapter_of_kind("dora"), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="give the base"):
        convert(file, tmp_path / "out.safetensors", kind="lora", wanted=Wanted(rank=2))
    made = convert(file, tmp_path / "out.safetensors", kind="lora", wanted=Wanted(energy=0.9), base=written())
    assert made.error < 0.5


def test_comfyui_is_given_no_lokr_with_a_core(tmp_path: Path) -> None:
    file = saved(adapter_of_kind("lokr-tucker"), tmp_path / "a.safetensors")
    convert(file, tmp_path / "out.safetensors", to="comfyui", dtype=torch.float32)
    keys = load_file(tmp_path / "out.safetensors").keys()
    assert any(key.endswith("lokr_t2") for key in load_file(file)) and not any(key.endswith("lokr_t2") for key in keys)
    before, after = load_adapter(file), load_adapter(tmp_path / "out.safetensors")
    for layer in before.layers:
        torch.testing.assert_close(after.dense(layer), before.dense(layer), rtol=1e-4, atol=1e-5)


def test_tokens_change_their_format_and_rounding_is_told(tmp_path: Path) -> None:
    tokens = Adapter({}, family="sd1", embeddings={"<cat>": {"text_encoder": torch.randn(2, 768)}})
    file = saved(tokens, tmp_path / "cat.safetensors", "webui-embedding")
    convert(file, tmp_path / "theirs.safetensors", to="diffusers", dtype=torch.float32)
    assert {tuple(t.shape) for t in load_file(tmp_path / "theirs.safetensors").values()} == {(2, 768)}
    told = convert(saved(random_adapter(), tmp_path / "a.safetensors"), tmp_path / "half.safetensors").remarks
    assert len(told) == 1 and told[0].startswith("its numbers are rounded to float16: 0.0")


def test_what_cannot_be_converted_is_one_line(written: Written, tmp_path: Path) -> None:
    file = saved(random_adapter(), tmp_path / "a.safetensors")
    tokens = Adapter({}, family="sd1", embeddings={"<cat>": {"text_encoder": torch.randn(2, 768)}})
    token = saved(tokens, tmp_path / "cat.safetensors", "webui-embedding")
    cases = [
        (file, dict(to="ldm"), "is an adapter, and ldm is a layout of checkpoints"),
        (file, dict(to="koya"), "no format 'koya'.*kohya"), (file, dict(kind="lohaa"), "no conversion to the kind"),
        (written(), dict(kind="lora"), "is a checkpoint, which has no kind"),
        (written(), dict(to="peft"), "is a checkpoint, which is no peft file"),
        (written("diffusers"), dict(to="ldm", out="out.ckpt"), "call it out.safetensors"),
        (token, dict(to="lycoris"), "holds new tokens, for which lycoris files have no place"),
        (file, dict(wanted=Wanted(rank=1)), "a rank is asked for, which is a LoRA's"),
    ]
    for path, asked, line in cases:
        out = tmp_path / str(asked.pop("out", "made/out.safetensors"))
        with pytest.raises(UserError, match=line) as raised:
            convert(path, out, **asked)
        assert "\n" not in str(raised.value) and not out.exists()
