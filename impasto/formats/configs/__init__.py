"""The families whose checkpoints can be read: a table of facts each. A new family is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from impasto.core.registry import Registry
from impasto.formats.entries import Config, Entry, Extra, Shape, no_extras, plain_spelling

CONFIGS = Registry("family of checkpoints", {
    "sd1": "impasto.formats.configs.sd1:SD1",
    "sd2": "impasto.formats.configs.sd2:SD2",
    "sdxl": "impasto.formats.configs.sdxl:SDXL",
    "sdxl-refiner": "impasto.formats.configs.sdxl:REFINER",
    "sd3": "impasto.formats.configs.sd3:SD3",
})


@dataclass(frozen=True)
class Part:
    """One network of a family: where its tensors are, what they are called, how it is configured."""

    #: the beginning of its keys in an LDM file
    prefix: str
    #: its class in a diffusers folder
    classes: tuple[str, ...]
    #: every tensor's name and shape, from a configuration
    entries: Callable[[Config], Iterator[Entry]]
    #: the configuration, as far as an LDM file's shapes tell it
    derive: Callable[[Mapping[str, Shape]], dict[str, Any]]
    #: the configuration of the real thing, complete; what shapes do not tell is taken from here
    config: dict[str, Any]
    #: settings that shapes do not tell: a file of ours records them in its metadata, `impasto.config`
    untold: tuple[str, ...]
    #: today's spelling of a name found in an LDM file, and of one found in a diffusers folder
    ldm_spelling: Callable[[str], str] = plain_spelling
    spelling: Callable[[str], str] = plain_spelling
    #: tensors that an LDM file has besides, from a configuration
    extras: Callable[[Config], Iterator[Extra]] = no_extras


@dataclass(frozen=True)
class Words:
    """A tokenizer of a family: the folder's name in a diffusers folder is its key."""

    #: the text encoder that reads its tokens
    component: str
    #: what fills a chunk after the end
    pad: str = "<|endoftext|>"
    classes: tuple[str, ...] = ("CLIPTokenizer", "CLIPTokenizerFast")
    #: whether it is CLIP's, which need not come with a checkpoint. Another one comes in a folder, its own or, of a
    #: single file, one of that name beside it
    clip: bool = True


@dataclass(frozen=True)
class FamilyConfig:
    """A family of checkpoints."""

    name: str
    #: by diffusers' names of components, the denoiser first
    parts: dict[str, Part]
    #: the noise process, as a diffusers scheduler's configuration
    scheduler: dict[str, Any]
    #: components without which a checkpoint is whole too
    optional: tuple[str, ...] = ()
    #: variant -> class name in model_index.json
    pipelines: dict[str, str] = field(default_factory=dict)
    #: latent cells of a side for networks that predict the velocity, where that differs
    velocity_size: int = 0
    #: by the name of their folder
    tokenizers: dict[str, Words] = field(default_factory=lambda: {"tokenizer": Words("text_encoder")})
    #: entries of model_index.json besides
    index: dict[str, Any] = field(default_factory=lambda: {
        **{name: [None, None] for name in ("feature_extractor", "image_encoder", "safety_checker")},
        "requires_safety_checker": False})
