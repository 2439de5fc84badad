from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from PIL import Image

from impasto.core.errors import UserError
from impasto.diffusion.process import DDPM
from impasto.families.base import Base
from impasto.families.picture_info import SAMPLERS, describe, open_picture, parameters_text, picture_texts, save_picture
from impasto.families.sample_settings import SampleSettings
from impasto.families.schedulers import SCHEDULERS


def base(source: str | None = "models/v1-5.safetensors", clip_skip: int = 0) -> Base:
    told = SimpleNamespace(source=source and Path(source), family="sd1", variant="", checkpoints={},
                           text_encoder_names=("text_encoder",), process=DDPM(), own_settings=dict,
                           text_settings=lambda: {"clip_skip": clip_skip})
    return cast(Base, told)


def told(**changes: Any) -> dict[str, Any]:
    usual = {"prompt": "a cat", "negative": "", "seed": 7, "settings": SampleSettings(), "base": base()}
    return describe(**{**usual, **changes})


def pairs(text: str) -> dict[str, str]:
    """The last line's `Name: value` pairs, read as A1111's documentation has it: a value may be a JSON string."""
    line, found = text.splitlines()[-1], {}
    while line:
        name, _, line = line.partition(": ")
        if line.startswith('"'):
            value, end = json.JSONDecoder().raw_decode(line)
            line = line[end:].removeprefix(", ")
        else:
            value, _, line = line.partition(", ")
        found[name] = value
    return found


def test_the_text_that_other_programs_read() -> None:
    assert parameters_text(told(negative="blurry")).startswith(
        "a cat\nNegative prompt: blurry\nSteps: 30, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 7, Size: 512x512, "
        "Model: v1-5, Version: impasto ")


def test_without_a_negative_prompt_there_is_no_such_line() -> None:
    assert parameters_text(told()).splitlines()[1].startswith("Steps: 30")


def test_a_name_that_holds_separators_is_quoted() -> None:
    text = parameters_text(told(base=base('my "best", model: v2.safetensors')))
    assert pairs(text)["Model"] == 'my "best", model: v2'


def test_clip_skip_and_strength_where_they_count() -> None:
    plain = pairs(parameters_text(told()))
    assert "Clip skip" not in plain and "Denoising strength" not in plain
    full = pairs(parameters_text(told(base=base(clip_skip=1), init="x/a.png", settings=SampleSettings(strength=0.6))))
    assert (full["Clip skip"], full["Denoising strength"]) == ("2", "0.6")  # A1111 counts from 1


def test_adapters_are_named_in_the_prompt_once() -> None:
    text = parameters_text(told(prompt="a cat <lora:fur:0.5>", adapters=[("y/paint.safetensors", 1.0),
                                                                         ("x/fur.safetensors", 0.5)]))
    assert text.splitlines()[0] == "a cat <lora:fur:0.5> <lora:paint:1>"


def test_every_sampler_has_a_name_elsewhere() -> None:
    assert set(SAMPLERS) == set(SCHEDULERS)


@pytest.mark.parametrize(("source", "label"), [
    ("a/b/v1-5.safetensors", "v1-5.safetensors"), ("a/folder", "folder"), (None, ""),
    ("hub/models--owner--name/snapshots/0123abc", "owner/name"),
])
def test_a_base_is_named_without_its_place(source, label) -> None:
    assert told(base=base(source))["base"] == label


def test_a_saved_picture_tells_all_and_equal_ones_are_equal_files(tmp_path: Path) -> None:
    picture = Image.linear_gradient("L").convert("RGB")
    for name in ("a.png", "b.png"):
        save_picture(picture, tmp_path / name, prompt="ein Hündchen 猫", negative="", seed=7, settings=SampleSettings(),
                     base=base(), adapters=[("secret/place/fur.safetensors", 0.5)])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    again = open_picture(tmp_path / "a.png")
    assert again.tobytes() == picture.tobytes()
    texts = picture_texts(again)
    assert texts["parameters"].startswith("ein Hündchen 猫 <lora:fur:0.5>\n")
    assert json.loads(texts["impasto"]) == told(prompt="ein Hündchen 猫", adapters=[("fur.safetensors", 0.5)])
    assert b"secret" not in (tmp_path / "a.png").read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.png", "b.png"]  # no temporary file is left


@pytest.mark.parametrize("content", [None, b"", b"text", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_a_user_error(tmp_path: Path, content) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png: "):
        open_picture(tmp_path / "a.png")
