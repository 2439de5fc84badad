"""Miniature bases: random weights in memory, and checkpoints on the disk beside diffusers' own pipelines."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline

from impasto.diffusion.process import process_from_scheduler_config
from impasto.families.load import load_base
from impasto.families.networks import random_init
from impasto.families.sd1 import SD1
from impasto.families.sd3 import SD3, WithoutT5
from impasto.families.tokenizer import clip_tokenizer
from impasto.formats.configs import CONFIGS
from tests.checkpoints import KINDS, component_configs, t5_tokenizer, write_checkpoint

SCHEDULER = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
             "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
             "clip_sample": False}

#: made once
TOKENIZER = functools.cache(clip_tokenizer)

LONG = "a very long caption about a dog, " * 12


def random_sd1(clip_skip: int = 0) -> SD1:
    """A miniature SD 1.x that comes from no file."""
    components = {name: random_init(name, KINDS[name], config)
                  for name, config in component_configs("sd1", "mini").items()}
    return SD1(components=components, process=process_from_scheduler_config(SCHEDULER), scheduler=SCHEDULER,
               tokenizer=TOKENIZER(), clip_skip=clip_skip)


def random_sd3(t5: bool = True) -> SD3:
    """A miniature SD 3 that comes from no file, with T5 or without."""
    table, configs = CONFIGS.get("sd3"), component_configs("sd3", without=() if t5 else ("text_encoder_3",))
    tokenizers = {name: clip_tokenizer(pad=table.tokenizers[tokenizer].pad)
                  for name, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))}
    return (SD3 if t5 else WithoutT5)(
        components={name: random_init(name, table.parts[name].classes[0], config) for name, config in configs.items()},
        process=process_from_scheduler_config(table.scheduler), scheduler=table.scheduler, tokenizers=tokenizers,
        t5_tokenizer=t5_tokenizer() if t5 else None, t5_length=12)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature SD 1.x as a diffusers folder."""
    return write_checkpoint(tmp_path_factory.mktemp("folder") / "mini", layout="diffusers")


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as an LDM file."""
    return write_checkpoint(tmp_path_factory.mktemp("file") / "mini.safetensors", layout="ldm")


@pytest.fixture(scope="session")
def base(folder: Path) -> SD1:
    loaded = load_base(folder)
    assert isinstance(loaded, SD1)
    return loaded


@pytest.fixture(scope="session")
def pipeline(folder: Path) -> Iterator[Any]:
    """diffusers' own pipeline on the same weights."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    yield pipe
