"""Layers of UNets in the names of their authors' own code (LDM, sgm), which kohya's SDXL files and ComfyUI's use.

The tables follow from the walk of each network (`ldm.unet_entries`). Checked against diffusers' own translation
(`_maybe_map_sgm_blocks_to_diffusers`, src/diffusers/loaders/lora_conversion_utils.py) and kohya's network
(github.com/kohya-ss/sd-scripts, library/sdxl_original_unet.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from impasto.formats.configs import CONFIGS
from impasto.formats.ldm import unet_entries
from impasto.formats.names import flatten

#: how layers' flat names begin
BEGINNINGS = ("input_blocks_", "middle_block_", "output_blocks_", "label_emb_", "time_embed_", "out_0", "out_2")

#: families whose layers kohya's files call by these names
SDXL = ("sdxl", "sdxl-refiner")


@cache
def originals(family: str) -> Mapping[str, str]:
    """Path in diffusers' names -> original one, of every layer of a family's UNet. Empty for one that is not known."""
    parts = CONFIGS.get(family).parts if family in CONFIGS else {}
    entries = unet_entries(parts["unet"].config) if "unet" in parts else ()
    return {entry.name.rpartition(".")[0]: entry.ldm.rpartition(".")[0] for entry in entries}


@cache
def paths() -> Mapping[str, str]:
    """Original path -> the one in diffusers' names, of all known networks: no name means two layers."""
    return {original: path for family in CONFIGS for path, original in originals(family).items()}


@cache
def flat_paths() -> Mapping[str, str]:
    """As `paths`, the originals as kohya's files spell them, with `_` for `.`."""
    return {flatten(original): path for original, path in paths().items()}
