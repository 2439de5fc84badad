"""The names of UNets and VAEs in two layouts: the original one (LDM) and diffusers'.

`*_config` go the other way, from the shapes of an LDM file to the configuration. Any number of levels, layers and
channels will do, so miniatures are read too.

LDM: github.com/CompVis/latent-diffusion, `openaimodel.py` (UNet) and `model.py` (autoencoder).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from impasto.core.errors import UserError
from impasto.formats.entries import Config, Entry, Shape, conv_entries, layer_entries, numbers, refuse_unknown, shape_of

# --- the UNet --------------------------------------------------------------------------------------------

#: layers of a residual block: diffusers' name -> LDM's
UNET_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
               "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2",
              "conv_shortcut": "nin_shortcut"}

#: settings of diffusers' UNet that change its tensors, and the values that are understood here
UNET_PLAIN: dict[str, tuple[Any, ...]] = {
    "class_embed_type": (None,), "num_class_embeds": (None,), "time_cond_proj_dim": (None,),
    "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,), "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",), "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
    "resnet_time_scale_shift": ("default",), "dual_cross_attention": (False,), "conv_in_kernel": (3,),
    "conv_out_kernel": (3,), "only_cross_attention": (False,), "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,), "resnet_out_scale_factor": (1, 1.0), "cross_attention_norm": (None,),
    "reverse_transformer_layers_per_block": (None,),
    "class_embeddings_concat": (False,), "mid_block_only_cross_attention": (None, False),
    "time_embedding_act_fn": (None,), "timestep_post_act": (None,),
}
UNET_BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")


def unet_entries(config: Config) -> Iterator[Entry]:
    """Every tensor of a `UNet2DConditionModel` of this configuration. `UserError` for what is not known here."""
    refuse_unknown(config, UNET_PLAIN, "UNet")
    widths: list[int] = list(config["block_out_channels"])
    blocks, layers = list(config["down_block_types"]), config["layers_per_block"]
    if not isinstance(layers, int) or len(blocks) != len(widths):
        raise UserError("has a UNet whose levels differ in their number of layers, which is not supported")
    for kind in (*blocks, *config["up_block_types"]):
        if kind not in UNET_BLOCKS:
            raise UserError(f"has a UNet with the block {kind}, which is not supported")
    attends = [kind.startswith("CrossAttn") for kind in blocks]
    depths = config.get("transformer_layers_per_block", 1)
    depths = [depths] * len(widths) if isinstance(depths, int) else list(depths)
    embed, top = 4 * widths[0], len(widths) - 1

    yield from layer_entries("time_embedding.linear_1", "time_embed.0", (embed, widths[0]))
    yield from layer_entries("time_embedding.linear_2", "time_embed.2", (embed, embed))
    if config.get("addition_embed_type"):
        told = config["projection_class_embeddings_input_dim"]
        yield from layer_entries("add_embedding.linear_1", "label_emb.0.0", (embed, told))
        yield from layer_entries("add_embedding.linear_2", "label_emb.0.2", (embed, embed))
    yield from conv_entries("conv_in", "input_blocks.0.0", config["in_channels"], widths[0])
    skips, width, index = [widths[0]], widths[0], 1
    for level, out in enumerate(widths):
        for i in range(layers):
            ldm = f"input_blocks.{index}"
            yield from _resnet(f"down_blocks.{level}.resnets.{i}", f"{ldm}.0", width, out, UNET_RESNET, embed)
            if attends[level]:
                yield from _transformer(f"down_blocks.{level}.attentions.{i}", f"{ldm}.1", out,
                                        depths[level], config)
            skips.append(out)
            width, index = out, index + 1
        if level < top:
            yield from conv_entries(f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{index}.0.op", out, out)
            skips.append(out)
            index += 1
    yield from _resnet("mid_block.resnets.0", "middle_block.0", width, width, UNET_RESNET, embed)
    yield from _transformer("mid_block.attentions.0", "middle_block.1", width, depths[-1], config)
    yield from _resnet("mid_block.resnets.1", "middle_block.2", width, width, UNET_RESNET, embed)
    index = 0
    for block, level in enumerate(range(top, -1, -1)):
        for i in range(layers + 1):
            ldm = f"output_blocks.{index}"
            yield from _resnet(f"up_blocks.{block}.resnets.{i}", f"{ldm}.0", width + skips.pop(),
                               widths[level], UNET_RESNET, embed)
            width, index = widths[level], index + 1
            if attends[level]:
                yield from _transformer(f"up_blocks.{block}.attentions.{i}", f"{ldm}.1", width,
                                        depths[level], config)
        if level > 0:
            last = f"output_blocks.{index - 1}.{2 if attends[level] else 1}"
            yield from conv_entries(f"up_blocks.{block}.upsamplers.0.conv", f"{last}.conv", width, width)
    yield from layer_entries("conv_norm_out", "out.0", (width,))
    yield from conv_entries("conv_out", "out.2", width, config["out_channels"])


def _resnet(name: str, ldm: str, into: int, out: int, words: Mapping[str, str], embed: int = 0
            ) -> Iterator[Entry]:
    def at(layer: str) -> tuple[str, str]:
        return f"{name}.{layer}", f"{ldm}.{words[layer]}"

    yield from layer_entries(*at("norm1"), (into,))
    yield from conv_entries(*at("conv1"), into, out)
    if embed:
        yield from layer_entries(*at("time_emb_proj"), (out, embed))
    yield from layer_entries(*at("norm2"), (out,))
    yield from conv_entries(*at("conv2"), out, out)
    if into != out:
        yield from conv_entries(*at("conv_shortcut"), into, out, 1)


def _transformer(name: str, ldm: str, width: int, depth: int, config: Config) -> Iterator[Entry]:
    """A spatial transformer; its inner names are the same in both layouts."""
    outer = (width, width) if config.get("use_linear_projection", False) else (width, width, 1, 1)
    context = config["cross_attention_dim"]
    yield from layer_entries(f"{name}.norm", f"{ldm}.norm", (width,))
    yield from layer_entries(f"{name}.proj_in", f"{ldm}.proj_in", outer)
    for i in range(depth):
        inner = f"transformer_blocks.{i}"
        rows: list[tuple[str, Shape, bool]] = []
        for attention, source in (("attn1", width), ("attn2", context)):
            rows += [(f"{attention}.to_q", (width, width), False), (f"{attention}.to_k", (width, source), False),
                     (f"{attention}.to_v", (width, source), False), (f"{attention}.to_out.0", (width, width), True)]
        rows += [("ff.net.0.proj", (8 * width, width), True), ("ff.net.2", (width, 4 * width), True)]
        rows += [(f"norm{n}", (width,), True) for n in (1, 2, 3)]
        for layer, shape, bias in rows:
            yield from layer_entries(f"{name}.{inner}.{layer}", f"{ldm}.{inner}.{layer}", shape, bias)
    yield from layer_entries(f"{name}.proj_out", f"{ldm}.proj_out", outer)


def unet_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What the shapes of an LDM UNet (names without prefix) tell of its configuration, in diffusers' terms."""
    first = shape_of(shapes, "input_blocks.0.0.weight", 4)
    count = 1 + max(numbers(shapes, r"input_blocks\.(\d{1,3})\."), default=0)
    ends = sorted(numbers(shapes, r"input_blocks\.(\d{1,3})\.0\.op\.weight"))
    bounds = [0, *ends, count]
    levels = [range(a + 1, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    if len({len(level) for level in levels}) != 1 or not levels[0]:
        raise UserError("has a UNet with missing blocks: its levels differ in their number of layers")
    widths = [shape_of(shapes, f"input_blocks.{level[0]}.0.out_layers.3.weight", 4)[0] for level in levels]
    depths, linear, context = [], False, 0
    for level in levels:
        attention = f"input_blocks.{level[0]}.1"
        found = numbers(shapes, re.escape(attention) + r"\.transformer_blocks\.(\d{1,3})\.")
        depths.append(1 + max(found, default=-1))
        if found:
            context = shape_of(shapes, f"{attention}.transformer_blocks.0.attn2.to_k.weight", 2)[1]
            linear = len(shapes.get(f"{attention}.proj_in.weight", ())) == 2
    if not context:
        raise UserError("has a UNet without cross-attention, which is not supported")
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    config = {
        "in_channels": first[1],
        "out_channels": shape_of(shapes, "out.2.weight", 4)[0],
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "down_block_types": down,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(down)],
        "cross_attention_dim": context,
        "use_linear_projection": linear,
    }
    middle = 1 + max(numbers(shapes, r"middle_block\.1\.transformer_blocks\.(\d{1,3})\."), default=0)
    if set(depths) | {middle} != {0, 1} and set(depths) | {middle} != {1}:
        config["transformer_layers_per_block"] = [*(depth or 1 for depth in depths[:-1]), depths[-1] or middle]
    if "label_emb.0.0.weight" in shapes:
        config["projection_class_embeddings_input_dim"] = shape_of(shapes, "label_emb.0.0.weight", 2)[1]
    return config


def unet_config_of_64(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """As `unet_config`, of a UNet whose attention heads have 64 channels each: of SD 2 and SDXL.

    diffusers says `attention_head_dim` where it means their number.
    """
    config = unet_config(shapes)
    return config | {"attention_head_dim": [max(1, width // 64) for width in config["block_out_channels"]]}


# --- the VAE ---------------------------------------------------------------------------------------------

VAE_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_quant_conv": (True, False), "use_post_quant_conv": (True, False), "mid_block_add_attention": (True,),
}
#: a VAE's attention in LDM, and in diffusers before 0.15 -> diffusers now
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
VAE_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def vae_entries(config: Config) -> Iterator[Entry]:
    """Every tensor of an `AutoencoderKL` of this configuration. `UserError` for what is not known here."""
    refuse_unknown(config, VAE_PLAIN, "VAE")
    for kind in (*config["down_block_types"], *config["up_block_types"]):
        if kind not in ("DownEncoderBlock2D", "UpDecoderBlock2D"):
            raise UserError(f"has a VAE with the block {kind}, which is not supported")
    widths, layers = list(config["block_out_channels"]), config["layers_per_block"]
    latent, top = config["latent_channels"], len(widths) - 1

    yield from conv_entries("encoder.conv_in", "encoder.conv_in", config["in_channels"], widths[0])
    width = widths[0]
    for level, out in enumerate(widths):
        block, ldm = f"encoder.down_blocks.{level}", f"encoder.down.{level}"
        for i in range(layers):
            yield from _resnet(f"{block}.resnets.{i}", f"{ldm}.block.{i}", width, out, VAE_RESNET)
            width = out
        if level < top:
            yield from conv_entries(f"{block}.downsamplers.0.conv", f"{ldm}.downsample.conv", out, out)
    yield from _vae_middle("encoder", width)
    yield from _vae_end("encoder", width, 2 * latent)
    if config.get("use_quant_conv", True):
        yield from conv_entries("quant_conv", "quant_conv", 2 * latent, 2 * latent, 1)
    if config.get("use_post_quant_conv", True):
        yield from conv_entries("post_quant_conv", "post_quant_conv", latent, latent, 1)
    yield from conv_entries("decoder.conv_in", "decoder.conv_in", latent, width)
    yield from _vae_middle("decoder", width)
    for up, level in enumerate(range(top, -1, -1)):
        block, ldm, out = f"decoder.up_blocks.{up}", f"decoder.up.{level}", widths[level]
        for i in range(layers + 1):
            yield from _resnet(f"{block}.resnets.{i}", f"{ldm}.block.{i}", width, out, VAE_RESNET)
            width = out
        if level > 0:
            yield from conv_entries(f"{block}.upsamplers.0.conv", f"{ldm}.upsample.conv", out, out)
    yield from _vae_end("decoder", width, config["out_channels"])


def _vae_middle(half: str, width: int) -> Iterator[Entry]:
    yield from _resnet(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1", width, width, VAE_RESNET)
    for ldm, name in VAE_ATTENTION.items():
        linear = () if ldm == "norm" else (width,)
        yield from layer_entries(f"{half}.mid_block.attentions.0.{name}", f"{half}.mid.attn_1.{ldm}",
                          (width, *linear), ldm_shape=(width, *linear, 1, 1) if linear else ())
    yield from _resnet(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2", width, width, VAE_RESNET)


def _vae_end(half: str, width: int, out: int) -> Iterator[Entry]:
    yield from layer_entries(f"{half}.conv_norm_out", f"{half}.norm_out", (width,))
    yield from conv_entries(f"{half}.conv_out", f"{half}.conv_out", width, out)


def vae_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What the shapes of an LDM VAE (names without prefix) tell of its configuration, in diffusers' terms."""
    levels = 1 + max(numbers(shapes, r"encoder\.down\.(\d{1,3})\."), default=0)
    return {
        "in_channels": shape_of(shapes, "encoder.conv_in.weight", 4)[1],
        "out_channels": shape_of(shapes, "decoder.conv_out.weight", 4)[0],
        "latent_channels": shape_of(shapes, "decoder.conv_in.weight", 4)[1],
        "block_out_channels": [shape_of(shapes, f"encoder.down.{level}.block.0.conv1.weight", 4)[0]
                               for level in range(levels)],
        "layers_per_block": 1 + max(numbers(shapes, r"encoder\.down\.0\.block\.(\d{1,3})\."), default=0),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def vae_spelling(name: str) -> str:
    """A diffusers VAE's tensor as it is spelled today: files before 0.15 have `query`, `key`, … in attention."""
    head, middle, tail = name.partition(".attentions.0.")
    layer, _, leaf = tail.rpartition(".")
    return f"{head}{middle}{VAE_OLD_ATTENTION[layer]}.{leaf}" if layer in VAE_OLD_ATTENTION else name
