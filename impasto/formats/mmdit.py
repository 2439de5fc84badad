"""The names of Stable Diffusion 3's transformer (MMDiT) in two layouts: the original one and diffusers'.

Text and picture have weights of their own and attend together; the original has their queries, keys and values as one
matrix. The last block leaves the text alone once it has been attended to. In 3.5 medium, the first blocks have a second
attention of the picture to itself.

The original: github.com/Stability-AI/sd3.5, `mmditx.py` (Esser et al. 2024, figure 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from impasto.core.errors import UserError
from impasto.formats.entries import Config, Entry, Shape, conv_entries, layer_entries, numbers, refuse_unknown, shape_of

#: settings that change its tensors, and the values that are understood here
PLAIN: dict[str, tuple[Any, ...]] = {"qk_norm": (None, "rms_norm")}

#: channels of the sinusoids that tell the time
TIME = 256

#: the layers of one attention that are one matrix in the original: of the picture, and of the text
QKV, ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def mmdit_entries(config: Config) -> Iterator[Entry]:
    """Every tensor of an `SD3Transformer2DModel` of this configuration. `UserError` for what is not known here."""
    refuse_unknown(config, PLAIN, "transformer")
    width, patch = config["num_attention_heads"] * config["attention_head_dim"], config["patch_size"]
    if config["caption_projection_dim"] != width:
        raise UserError("has a transformer whose text is not as wide as its picture, which is not supported")
    side, last = config["pos_embed_max_size"], config["num_layers"] - 1
    yield Entry("pos_embed.pos_embed", (1, side * side, width), "pos_embed", (1, side * side, width))
    yield from conv_entries("pos_embed.proj", "x_embedder.proj", config["in_channels"], width, patch)
    for name, ldm, told in (("timestep", "t_embedder", TIME), ("text", "y_embedder", config["pooled_projection_dim"])):
        at = f"time_text_embed.{name}_embedder"
        yield from layer_entries(f"{at}.linear_1", f"{ldm}.mlp.0", (width, told))
        yield from layer_entries(f"{at}.linear_2", f"{ldm}.mlp.2", (width, width))
    yield from layer_entries("context_embedder", "context_embedder", (width, config["joint_attention_dim"]))
    for i in range(config["num_layers"]):
        at, ldm = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        dual = i in config["dual_attention_layers"]
        yield from layer_entries(f"{at}.norm1.linear", f"{ldm}.x_block.adaLN_modulation.1",
                                 ((9 if dual else 6) * width, width))
        yield from _attention(f"{at}.attn", f"{ldm}.x_block.attn", QKV, ("norm_q", "norm_k"), "to_out.0", config)
        if dual:
            yield from _attention(f"{at}.attn2", f"{ldm}.x_block.attn2", QKV, ("norm_q", "norm_k"), "to_out.0", config)
        yield from _feed_forward(f"{at}.ff", f"{ldm}.x_block.mlp", width)
        yield from _modulation(f"{at}.norm1_context.linear", f"{ldm}.context_block.adaLN_modulation.1", width, i < last)
        yield from _attention(f"{at}.attn", f"{ldm}.context_block.attn", ADDED, ("norm_added_q", "norm_added_k"),
                              "to_add_out" if i < last else "", config)
        if i < last:
            yield from _feed_forward(f"{at}.ff_context", f"{ldm}.context_block.mlp", width)
    yield from _modulation("norm_out.linear", "final_layer.adaLN_modulation.1", width, whole=False)
    yield from layer_entries("proj_out", "final_layer.linear", (patch * patch * config["out_channels"], width))


def _attention(name: str, ldm: str, fused: tuple[str, ...], norms: tuple[str, str], out: str, config: Config
               ) -> Iterator[Entry]:
    """One stream's layers of an attention; `out` is what its result goes through, "" for nothing."""
    head, width = config["attention_head_dim"], config["num_attention_heads"] * config["attention_head_dim"]
    for leaf, shape in (("weight", (width, width)), ("bias", (width,))):
        for i, layer in enumerate(fused):
            yield Entry(f"{name}.{layer}.{leaf}", shape, f"{ldm}.qkv.{leaf}", (3 * width, *shape[1:]), (i, 3))
    for layer, original in zip(norms if config["qk_norm"] else (), ("ln_q", "ln_k"), strict=False):
        yield from layer_entries(f"{name}.{layer}", f"{ldm}.{original}", (head,), bias=False)
    if out:
        yield from layer_entries(f"{name}.{out}", f"{ldm}.proj", (width, width))


def _feed_forward(name: str, ldm: str, width: int) -> Iterator[Entry]:
    yield from layer_entries(f"{name}.net.0.proj", f"{ldm}.fc1", (4 * width, width))
    yield from layer_entries(f"{name}.net.2", f"{ldm}.fc2", (width, 4 * width))


def _modulation(name: str, ldm: str, width: int, whole: bool) -> Iterator[Entry]:
    """What shifts, scales and gates a stream; not `whole`, it shifts and scales, and diffusers has them the other way
    round."""
    for entry in layer_entries(name, ldm, ((6 if whole else 2) * width, width)):
        yield entry if whole else entry._replace(how="halves")


def mmdit_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What the shapes of an original transformer (names without prefix) tell of its configuration, in diffusers' terms.

    Heads have 64 channels where no norm of theirs tells otherwise.
    """
    width, channels, patch, _ = shape_of(shapes, "x_embedder.proj.weight", 4)
    head = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight", (64,))[0]
    return {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shape_of(shapes, "final_layer.linear.weight", 2)[0] // patch ** 2,
        "num_layers": 1 + max(numbers(shapes, r"joint_blocks\.(\d{1,3})\."), default=0),
        "attention_head_dim": head,
        "num_attention_heads": max(1, width // head),
        "caption_projection_dim": width,
        "joint_attention_dim": shape_of(shapes, "context_embedder.weight", 2)[1],
        "pooled_projection_dim": shape_of(shapes, "y_embedder.mlp.0.weight", 2)[1],
        "pos_embed_max_size": math.isqrt(shape_of(shapes, "pos_embed", 3)[1]),
        "dual_attention_layers": sorted(numbers(shapes, r"joint_blocks\.(\d{1,3})\.x_block\.attn2\.")),
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None,
    }
