"""SDXL's layers in the names of Stability's own code, which kohya's scripts train and write under.

The table follows from the walk of the network (`ldm.unet_entries`). Checked against diffusers' own translation
(`_maybe_map_sgm_blocks_to_diffusers`, src/diffusers/loaders/lora_conversion_utils.py) and kohya's network
(github.com/kohya-ss/sd-scripts, library/sdxl_original_unet.py).
"""

from __future__ import annotations

from functools import cache

from impasto.formats.ldm import unet_entries
from impasto.formats.names import flatten

#: how its layers' flat names begin
BEGINNINGS = ("input_blocks_", "middle_block_", "output_blocks_", "label_emb_", "time_embed_", "out_0", "out_2")
_COMMON = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2, "use_linear_projection": True}
#: the shapes of both networks, as Stability published them, in diffusers' terms
_UNETS = {
    "sdxl": {
        "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10], "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
        "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"]},
    "sdxl-refiner": {
        "block_out_channels": [384, 768, 1536, 1536], "transformer_layers_per_block": 4, "cross_attention_dim": 1280,
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"]},
}
#: the families whose networks kohya's scripts have under these names
FAMILIES = tuple(_UNETS)

_EMBEDDING = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}


@cache
def originals(family: str) -> dict[str, str]:
    """Path in diffusers' names -> flat original name, of every layer of the UNet of one of the `FAMILIES`."""
    found = {path: flatten(ldm) for ldm, path in _EMBEDDING.items()}
    for entry in unet_entries(_COMMON | _UNETS[family]):
        found[entry.name.rpartition(".")[0]] = flatten(entry.ldm.rpartition(".")[0])
    return found


@cache
def paths() -> dict[str, str]:
    """Flat original name -> path in diffusers' names, of both networks: no name means two layers."""
    return {flat: path for family in FAMILIES for path, flat in originals(family).items()}
