"""The embedded base: small, in half precision, told of in a card, and a pipeline that diffusers opens."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from impasto.mini import BASE, WEIGHTS
from tests.mini.weights import needs_base, needs_reader

pytestmark = needs_base

MOST = 16 * 2**20


def test_it_is_small_and_in_half_precision() -> None:
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) <= MOST
    for name in WEIGHTS:
        with safe_open(BASE / name, "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}, name


def test_its_card_tells_of_it() -> None:
    assert (BASE / "README.md").is_file()


@needs_reader
@pytest.mark.slow
def test_diffusers_draws_with_it_what_it_is_asked_for() -> None:
    from diffusers import StableDiffusionPipeline

    from impasto.evaluation.reader import load_reader

    pipeline = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pictures = [pipeline("a red star on a blue background", num_inference_steps=25, guidance_scale=4.0,
                         generator=torch.Generator("cpu").manual_seed(seed)).images[0] for seed in range(4)]
    assert pictures[0].size == (128, 128)
    wanted = {"shape": "star", "colour": "red", "background": "blue"}
    right = [all(read[key] == answer for key, answer in wanted.items()) for read in load_reader().read(pictures)]
    assert all(right)
