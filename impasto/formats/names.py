"""Names of layers: which paths there are, and the way back from a path's flat form.

kohya's files name a layer by its path with `.` turned into `_`. Words hold `_` themselves, so no rule splits
`lora_unet_down_blocks_0_attentions_1_proj_in`; what does is knowing the words. The grammar below lists them:
`#` is a number, `/rule` goes on with another rule. A flat name with its numbers blotted out then has one
reading, whatever the number of blocks (tests hold that over the grammar and over the real networks' layers).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from impasto.core.errors import UserError, nearest

#: diffusers' UNet2DConditionModel (SD 1, 2, XL) and SD3Transformer2DModel, transformers' CLIP and T5 text models
GRAMMAR: dict[str, tuple[str, ...]] = {
    "unet": (
        "conv_in", "conv_out", "conv_norm_out", "time_embedding/linears", "add_embedding/linears",
        "class_embedding/linears", "down_blocks.#/block", "mid_block/block", "up_blocks.#/block",
    ),
    "linears": ("linear_1", "linear_2"),
    "block": ("resnets.#/resnet", "attentions.#/attention", "downsamplers.#.conv", "upsamplers.#.conv"),
    "resnet": ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut"),
    "attention": ("norm", "proj_in", "proj_out", "transformer_blocks.#/transformer"),
    "transformer": ("norm1", "norm2", "norm3", "attn1/attn", "attn2/attn", "ff.net.0.proj", "ff.net.2"),
    "attn": ("to_q", "to_k", "to_v", "to_out.0"),
    "clip": (
        "text_model.embeddings.token_embedding", "text_model.embeddings.position_embedding",
        "text_model.encoder.layers.#/clip_layer", "text_model.final_layer_norm", "text_projection",
    ),
    "clip_layer": (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "layer_norm1",
        "layer_norm2", "mlp.fc1", "mlp.fc2",
    ),
    "mmdit_layers": (
        "pos_embed.proj", "context_embedder", "time_text_embed.timestep_embedder/linears",
        "time_text_embed.text_embedder/linears", "transformer_blocks.#/joint", "norm_out.linear", "proj_out",
    ),
    "joint": (
        "attn/attn", "attn/of_text", "attn/qk_norms", "attn2/attn", "attn2/qk_norms", "ff.net.0.proj", "ff.net.2",
        "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear", "norm1_context.linear",
    ),
    "of_text": ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k"),
    "qk_norms": ("norm_q", "norm_k"),
    "t5": ("shared", "encoder.embed_tokens", "encoder.block.#.layer.0/t5_attention", "encoder.block.#.layer.1/t5_mlp",
           "encoder.final_layer_norm"),
    "t5_attention": ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o",
                     "SelfAttention.relative_attention_bias", "layer_norm"),
    "t5_mlp": ("DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo", "layer_norm"),
}

#: how paths of layers with a kernel end, and the kernel; of SD 1 alone, where the others have linear layers
KERNELS = {"conv_in": (3, 3), "conv_out": (3, 3), "conv1": (3, 3), "conv2": (3, 3), "conv": (3, 3),
           "conv_shortcut": (1, 1)}
POINTWISE = {"proj_in": (1, 1), "proj_out": (1, 1)}
#: and of SD 3's network, which cuts the latents into patches of 2×2
PATCHES = {"transformer.pos_embed.proj": (2, 2)}

#: how tables end that are looked up
TABLES = ("_embedding", ".shared", ".embed_tokens", ".relative_attention_bias")

#: the rule that a component's layers begin with, by diffusers' name of the component
COMPONENTS = {"unet": "unet", "text_encoder": "clip", "text_encoder_2": "clip", "transformer": "mmdit_layers",
              "text_encoder_3": "t5"}


def flatten(path: str) -> str:
    """A layer's path as kohya's files spell it: `resnets.0.conv1` -> `resnets_0_conv1`."""
    return path.replace(".", "_")


def unflatten(component: str, flat: str, *, where: object = "") -> str:
    """The path inside `component` whose flat form is `flat`. `UserError` if it names no layer.

    A text encoder's path begins with `text_model.` (or is `text_projection`) even where `flat` lacks it.
    """
    flats = _flats(COMPONENTS[component])
    for candidate in _spellings(component, flat, "_"):
        for template in flats.get(_blot(candidate), ()):
            if re.fullmatch(_pattern(flatten(template)), candidate):
                numbers = iter(re.findall(r"\d+", candidate))
                return re.sub(r"#|\d+", lambda _, numbers=numbers: next(numbers), template)
    raise UserError(f"{flat!r} names no layer of a {component}", where=where)


def canonical(component: str, path: str, *, where: object = "") -> str:
    """`path` inside `component`, checked, with `text_model.` where a text encoder's path lacks it."""
    known = _flats(COMPONENTS[component])
    for candidate in _spellings(component, path, "."):
        if any(re.fullmatch(_pattern(t), candidate) for t in known.get(_blot(flatten(candidate)), ())):
            return candidate
    raise UserError(f"{path!r} names no layer of a {component}", where=where)


def split(layer: str, *, where: object = "") -> tuple[str, str]:
    """An adapter's layer path, `unet.conv_in`, as (component, canonical path inside it)."""
    component, _, path = layer.partition(".")
    if component not in COMPONENTS:
        raise UserError(f"layer {layer!r} is of an unknown component", where=where,
                        fix=nearest(component, COMPONENTS))
    return component, canonical(component, path, where=where)


def kernel(layer: str, family: str = "") -> tuple[int, ...]:
    """The kernel of a layer, () where it has none or the family would have to tell."""
    component, _, path = layer.partition(".")
    if COMPONENTS.get(component) != "unet":
        return PATCHES.get(layer, ())
    return (KERNELS | (POINTWISE if family == "sd1" else {})).get(path.rpartition(".")[2], ())


def is_norm(layer: str) -> bool:
    """Whether a layer normalises: it has a weight and a bias (c,), which scale and shift."""
    name = layer.rpartition(".")[2]
    return "norm" in name or name in ("ln_q", "ln_k")  # SD 3's authors' names


def has_bias(norm: str) -> bool:
    """Whether a norm shifts too; the root-mean-square norms of SD 3's network and of T5 only scale."""
    return COMPONENTS.get(norm.partition(".")[0]) in ("unet", "clip")


def is_embedding(layer: str) -> bool:
    """Whether a layer is a table that is looked up, (n, d): the transpose of its linear map."""
    return layer.endswith(TABLES)


@cache
def templates(rule: str) -> tuple[str, ...]:
    """All paths that a rule of the grammar spells, with `#` for the numbers."""
    return tuple(_expand(rule))


def _expand(rule: str) -> Iterator[str]:
    for line in GRAMMAR[rule]:
        head, _, rest = line.partition("/")
        if rest:
            yield from (f"{head}.{tail}" for tail in _expand(rest))
        else:
            yield head


@cache
def _flats(rule: str) -> dict[str, tuple[str, ...]]:
    """Templates by their flat form without numbers."""
    found: dict[str, tuple[str, ...]] = {}
    for template in templates(rule):
        blotted = _blot(flatten(template))
        found[blotted] = (*found.get(blotted, ()), template)
    return found


def _blot(flat: str) -> str:
    """Numbers turned into `#`: the numbers of a path never decide where its dots are."""
    return re.sub(r"\d+", "#", flat)


@cache
def _pattern(template: str) -> str:
    return re.escape(template).replace(r"\#", r"\d+")


def _spellings(component: str, name: str, separator: str) -> tuple[str, ...]:
    """transformers 5.6 dropped `text_model.` from CLIPTextModel's paths; files have it or lack it."""
    return (name, f"text_model{separator}{name}") if COMPONENTS[component] == "clip" else (name,)
