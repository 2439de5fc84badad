"""Layers of UNets in the names of their authors' own code (LDM, sgm), which kohya's SDXL files and ComfyUI's use.

The tables follow from the walk of each network (`ldm.unet_entries`). Checked against diffusers' own translation
(`_maybe_map_sgm_blocks_to_diffusers`, src/diffusers/loaders/lora_conversion_utils.py) and kohya's network
(github.com/kohya-ss/sd-scripts, library/sdxl_original_unet.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from impasto.formats.configs import CONFIGS
from impasto.formats.ldm import unet_entries
from impasto.formats.names import flatten

#: how layers' flat names begin
BEGINNINGS = ("input_blocks_", "middle_block_", "output_blocks_", "label_emb_", "time_embed_", "out_0", "out_2")

_COMMON = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, "use_linear_projection": True}
#: the shapes of SDXL's networks, as Stability published them, in diffusers' terms
SDXL: dict[str, dict[str, Any]] = {
    "sdxl": _COMMON | {
        "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10], "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
        "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"]},
    "sdxl-refiner": _COMMON | {
        "block_out_channels": [384, 768, 1536, 1536], "transformer_layers_per_block": 4, "cross_attention_dim": 1280,
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"]},
}
_EMBEDDING = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


@cache
def originals(family: str) -> Mapping[str, str]:
    """Path in diffusers' names -> original one, of every layer of a family's UNet. Empty for one that is not known."""
    if family in SDXL:
        return _EMBEDDING | _walked(SDXL[family])
    parts = CONFIGS.get(family).parts if family in CONFIGS else {}
    return _walked(parts["unet"].config) if "unet" in parts else {}


def _walked(config: Mapping[str, Any]) -> dict[str, str]:
    return {entry.name.rpartition(".")[0]: entry.ldm.rpartition(".")[0] for entry in unet_entries(config)}


@cache
def paths() -> Mapping[str, str]:
    """Original path -> the one in diffusers' names, of all known networks: no name means two layers."""
    return {original: path for family in (*CONFIGS, *SDXL) for path, original in originals(family).items()}


@cache
def flat_paths() -> Mapping[str, str]:
    """As `paths`, the originals as kohya's files spell them, with `_` for `.`."""
    return {flatten(original): path for original, path in paths().items()}
