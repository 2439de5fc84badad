"""The families whose checkpoints can be read: a table of facts each. A new family is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from impasto.core.registry import Registry
from impasto.formats.ldm import Config, Entry, Shape, plain_spelling

CONFIGS = Registry("family of checkpoints", {
    "sd1": "impasto.formats.configs.sd1:SD1",
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


@dataclass(frozen=True)
class FamilyConfig:
    """A family of checkpoints."""

    name: str
    #: by diffusers' names of components
    parts: dict[str, Part]
    #: the noise process, as a diffusers scheduler's configuration
    scheduler: dict[str, Any]
    #: variant -> class name in model_index.json
    pipelines: dict[str, str] = field(default_factory=dict)
