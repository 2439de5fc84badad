"""Inpainting and instruct-pix2pix bases through the command line: trained, saved, merged, drawn with, and the same
pictures in diffusers' pipelines."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from impasto.cli import app
from impasto.cli.inspect import command
from impasto.core.rng import picture_generator
from impasto.families.load import load_base
from impasto.families.picture_info import open_picture, picture_texts
from impasto.formats.detect import detect
from impasto.training.recipe import load_recipe
from impasto.training.sharing.usage import usage
from impasto.training.trainer import train as run_from
from tests.checkpoints import write_checkpoint
from tests.training.conftest import draw

PIPELINES = {"inpainting": "StableDiffusionInpaintPipeline",
             "instruct-pix2pix": "StableDiffusionInstructPix2PixPipeline"}
SMALL: list[object] = ["--size", "64x64", "--steps", "3", "--seed", 5, "--scheduler", "ddim", "--device", "cpu"]


def impasto(*arguments: object) -> tuple[int, str]:
    """`impasto …` in this process: its exit code, and what it says on stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as ended:
        app.main([str(argument) for argument in arguments])
    return int(ended.value.code or 0), said.getvalue()


def well(*arguments: object) -> None:
    code, said = impasto(*arguments)
    assert code == 0, said


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature base of each variant as a folder, a plain one, pairs of pictures, and a mask."""
    root = tmp_path_factory.mktemp("work")
    for variant in PIPELINES:
        write_checkpoint(root / variant, layout="diffusers", variant=variant)
    write_checkpoint(root / "plain.safetensors")
    (root / "photos").mkdir()
    for key in range(3):
        draw(root / "photos" / f"{key}.png", key, (64, 64))
        draw(root / "photos" / f"{key}-source.png", 50 + key, (64, 64))
    hole = Image.new("L", (128, 128), 0)
    hole.paste(255, (16, 32, 100, 90))
    hole.save(root / "hole.png")
    return root


def shown(work: Path, variant: str) -> list[object]:
    """What a base of that variant is given to draw with."""
    return ["--init", work / "photos" / "0.png"] + (["--mask", work / "hole.png"] if variant == "inpainting" else [])


def train(work: Path, variant: str, out: str, *more: object) -> Path:
    """Three steps; the run's directory."""
    pairs = variant == "instruct-pix2pix"
    own = ["data.pairs=files", "data.source_dropout=0.2"] if pairs else []
    photos = work / "photos"
    if not pairs:
        photos = work / "alone"
        photos.mkdir(exist_ok=True)
        for key in range(3):
            draw(photos / f"{key}.png", key, (64, 64))
    well("train", "lora", f"base.path={work / variant}", f"data.folder={photos}", "data.resolution=64",
         "data.caption=make it a sks dog", "train.steps=3", "train.learning_rate=1e-2", "train.device=cpu",
         "validation.fraction=0.3", "sample.every=3", "sample.steps=2", "output.dtype=fp32",
         f"output.dir={work / out}", "output.name=dog", *own, *more)
    return work / out


@pytest.fixture(scope="module", params=PIPELINES)
def trained(work: Path, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A LoRA of three steps on each variant."""
    return request.param, train(work, request.param, f"run-{request.param}")


def generate(work: Path, base: Path, variant: str, out: str, *more: object) -> Path:
    well("generate", base, "a sks dog", *SMALL, *shown(work, variant), "-o", work / out, *more)
    return work / out / "001-5.png"


def test_it_trains_validates_and_shows_itself(trained: tuple[str, Path]) -> None:
    variant, run = trained
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 3 and np.isfinite(losses).all()
    assert any("validation" in json.dumps(entry) for entry in log)
    assert {path.name for path in (run / "previews").iterdir()} == {"000000-0.png", "000003-0.png"}
    told = json.loads(picture_texts(open_picture(run / "previews" / "000003-0.png"))["impasto"])
    assert told["variant"] == variant and told["init"].endswith("-source.png" if variant != "inpainting" else ".png")
    assert all(tensor.isfinite().all() for tensor in load_file(run / "dog.safetensors").values())


def test_it_is_drawn_with_as_in_diffusers(work: Path, trained: tuple[str, Path]) -> None:
    """The base alone, with the LoRA, and the LoRA merged into it; the pipeline's own loader and picture."""
    variant, run = trained
    path = generate(work, work / variant, variant, f"with-{variant}", "--adapter", run / "dog.safetensors")
    ours = np.asarray(open_picture(path)).astype(float)
    pipe = getattr(diffusers, PIPELINES[variant]).from_pretrained(work / variant, safety_checker=None)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    keys: dict[str, Any] = {"image": Image.open(work / "photos" / "0.png")}
    if variant == "inpainting":
        keys |= {"mask_image": Image.open(work / "hole.png").resize((64, 64), Image.Resampling.BILINEAR),
                 "strength": 1.0, "width": 64, "height": 64}
    pictures = []
    for load in (False, True):
        if load:
            pipe.load_lora_weights(run, weight_name="dog.safetensors")
        pictures.append(pipe("a sks dog", num_inference_steps=3, guidance_scale=7.5, output_type="np",
                             generator=picture_generator(5), **keys).images[0] * 255)
    assert np.abs(ours - pictures[1]).max() <= 1.1  # a level of rounding
    assert np.abs(ours - pictures[0]).max() > 4  # and the LoRA is seen
    alone = np.asarray(open_picture(generate(work, work / variant, variant, f"alone-{variant}"))).astype(float)
    assert np.abs(alone - pictures[0]).max() <= 1.1

    well("merge", work / variant, run / "dog.safetensors", "-o", work / f"merged-{variant}")
    assert load_base(work / f"merged-{variant}").variant == variant
    again = np.asarray(open_picture(generate(work, work / f"merged-{variant}", variant, f"again-{variant}")))
    assert np.abs(again - pictures[1]).max() <= 1.6


def test_what_a_picture_tells(work: Path) -> None:
    told = open_picture(generate(work, work / "inpainting", "inpainting", "told", "--force"))
    facts = json.loads(picture_texts(told)["impasto"])
    assert (facts["init"], facts["mask"], facts["settings"]["strength"]) == ("0.png", "hole.png", 1.0)
    assert "Denoising strength: 1" in picture_texts(told)["parameters"]
    told = open_picture(generate(work, work / "instruct-pix2pix", "instruct-pix2pix", "told", "--image-guidance", 2,
                                 "--force"))
    assert "Image CFG scale: 2" in picture_texts(told)["parameters"]
    assert "Denoising strength" not in picture_texts(told)["parameters"]
    again = command(json.loads(picture_texts(told)["impasto"]))
    assert "--image-guidance 2" in again and "--init 0.png" in again and "--strength" not in again
    assert "--mask hole.png" in command(facts)


@pytest.mark.parametrize("variant", PIPELINES)
def test_a_run_that_stopped_goes_on_exactly(work: Path, variant: str) -> None:
    straight = train(work, variant, f"straight-{variant}", "sample.every=0")
    folder = work / "photos" if variant != "inpainting" else work / "alone"
    recipe = load_recipe(str(straight / "recipe.toml"), [f"output.dir={work / f'halted-{variant}'}"])
    assert Path(str(recipe.data and recipe.data.sets[0].folder)) == folder
    assert run_from(recipe, stop_after=1).step == 1 and run_from(recipe).step == 3
    ours, theirs = (load_file(run / "dog.safetensors") for run in (straight, work / f"halted-{variant}"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_full_fine_tune_opens_in_its_pipeline(work: Path) -> None:
    run = train(work, "inpainting", "full", "method.kind=full", "method.rank=", "method.targets=", "sample.every=0",
                "data.mask=none", "data.inpaint_masks=2")
    pipe = diffusers.DiffusionPipeline.from_pretrained(run / "dog", safety_checker=None)
    assert type(pipe).__name__ == PIPELINES["inpainting"] and pipe.unet.config.in_channels == 9
    before, after = load_base(work / "inpainting"), load_base(run / "dog")
    name = "conv_in.weight"
    moved = (after.denoiser.state_dict()[name] - before.denoiser.state_dict()[name]).abs()
    assert after.variant == "inpainting" and moved[:, 4:].max() > 0  # what it is shown reaches the network


@pytest.mark.parametrize(("variant", "lines"), [
    ("inpainting", ['mask = load_image("mask.png")', "image=photo, mask_image=mask).images[0]",
                    "--init photo.png --mask mask.png --download"]),
    ("instruct-pix2pix", ['"a dog", image=photo).images[0]', '"a dog" --init photo.png --download'])])
def test_a_model_card_says_what_it_is_shown(work: Path, variant: str, lines: list[str]) -> None:
    parcel: Any = SimpleNamespace(artifact=work / variant, detected=detect(work / variant), samples=(), weights="")
    text = "\n".join(usage(parcel, "you/dog", None, "a dog"))
    assert all(line in text for line in lines)
    file = write_checkpoint(work / f"card-{variant}.safetensors", variant=variant)
    parcel = SimpleNamespace(artifact=file, detected=detect(file), samples=(), weights=file.name)
    assert f"pipe = {PIPELINES[variant]}.from_single_file(file)" in "\n".join(usage(parcel, "you/dog", None, "a dog"))


def test_a_plain_base_inpaints_by_what_it_keeps(work: Path) -> None:
    path = generate(work, work / "plain.safetensors", "inpainting", "kept", "--strength", "0.7")
    assert open_picture(path).size == (64, 64)


def test_a_plain_model_becomes_one_for_inpainting(work: Path) -> None:
    """The difference of two plain ones, added to a base for inpainting."""
    other = write_checkpoint(work / "other.safetensors", seed=1)
    well("merge", work / "inpainting", other, work / "plain.safetensors", "--add-difference", "1.0", "-o",
         work / "made")
    made, inpainting, tuned, plain = (load_base(path).denoiser.state_dict()["conv_in.weight"] for path in (
        work / "made", work / "inpainting", other, work / "plain.safetensors"))
    torch.testing.assert_close(made[:, :4], inpainting[:, :4] + tuned - plain)
    assert torch.equal(made[:, 4:], inpainting[:, 4:])


def refused(line: str, *arguments: object) -> None:
    code, said = impasto(*arguments)
    (error,) = (each for each in said.splitlines() if each.startswith("error: "))
    assert code == 1 and line in error


def test_what_cannot_be_is_one_line(work: Path) -> None:
    photo, hole = work / "photos" / "0.png", work / "hole.png"
    for base, more, line in (
            ("inpainting", [], "give --init PICTURE and --mask MASK"),
            ("inpainting", ["--init", photo], "give --init PICTURE and --mask MASK"),
            ("instruct-pix2pix", [], "it edits a picture; give --init PICTURE"),
            ("instruct-pix2pix", ["--init", photo, "--mask", hole], "has no place for a mask; leave --mask out"),
            ("instruct-pix2pix", ["--init", photo, "--strength", "0.5"], "leave --strength out"),
            ("plain.safetensors", ["--mask", hole], "a mask is of a picture; give the picture with --init"),
            ("plain.safetensors", ["--image-guidance", "2"], "is no instruct-pix2pix base")):
        refused(line, "generate", work / base, "a dog", *SMALL, "-o", work / "never", *more)
    common = ["data.resolution=64", "data.caption=x", "train.steps=1", "train.device=cpu",
              f"output.dir={work / 'never'}"]
    refused("this base edits pictures, and learns from pairs", "train", "lora",
            f"base.path={work / 'instruct-pix2pix'}", f"data.folder={work / 'photos'}", *common)
    refused("take an instruct-pix2pix base, or leave it out", "train", "lora",
            f"base.path={work / 'plain.safetensors'}", f"data.folder={work / 'photos'}", "data.pairs=files", *common)
