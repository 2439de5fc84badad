"""The names of text encoders in two layouts: the original ones, and transformers'.

SD 1's is in Hugging Face's names in both, and so are SD 3's. Those of SD 2 and SDXL are OpenCLIP's
(github.com/mlfoundations/open_clip, src/open_clip/transformer.py), where queries, keys and values are one matrix, and
the projection is turned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from impasto.core.errors import UserError
from impasto.formats.entries import Config, Entry, Extra, Shape, layer_entries, numbers, shape_of

#: of OpenCLIP's `logit_scale`, which nothing here reads: ln 100, where its training holds it
LOGIT_SCALE = 4.6052


def clip_entries(config: Config) -> Iterator[Entry]:
    """Every tensor of a `CLIPTextModel` of this configuration, always under `text_model.`."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    rows: list[tuple[str, Shape, bool]] = [
        ("embeddings.token_embedding", (config["vocab_size"], width), False),
        ("embeddings.position_embedding", (config["max_position_embeddings"], width), False),
    ]
    for i in range(config["num_hidden_layers"]):
        at = f"encoder.layers.{i}"
        rows += [(f"{at}.self_attn.{p}_proj", (width, width), True) for p in ("q", "k", "v", "out")]
        rows += [(f"{at}.layer_norm1", (width,), True), (f"{at}.layer_norm2", (width,), True)]
        rows += [(f"{at}.mlp.fc1", (inner, width), True), (f"{at}.mlp.fc2", (width, inner), True)]
    rows.append(("final_layer_norm", (width,), True))
    for layer, shape, bias in rows:
        yield from layer_entries(f"text_model.{layer}", f"text_model.{layer}", shape, bias)


def projected_clip_entries(config: Config) -> Iterator[Entry]:
    """Every tensor of a `CLIPTextModelWithProjection`."""
    yield from clip_entries(config)
    yield from layer_entries("text_projection", "text_projection", (config["projection_dim"], config["hidden_size"]),
                             bias=False)


def unprojected_clip_entries(config: Config) -> Iterator[Entry]:
    """As `projected_clip_entries`, the original without a projection: SD 3's reads the pooled state as it is.

    diffusers has the identity there (github.com/Stability-AI/sd3.5, `sd3_infer.py`: return_projected_pooled=False).
    """
    yield from clip_entries(config)
    square = (config["hidden_size"], config["hidden_size"])
    yield Entry("text_projection.weight", square, "text_projection.weight", square, how="identity")


def clip_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What the shapes of a text encoder (names with `text_model.`) tell of its configuration.

    OpenAI's CLIPs have heads of 64 channels.
    """
    vocabulary, width = shape_of(shapes, "text_model.embeddings.token_embedding.weight", 2)
    projection = shapes.get("text_projection.weight", (width,))
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": projection[0],
        "max_position_embeddings": shape_of(shapes, "text_model.embeddings.position_embedding.weight", 2)[0],
        "intermediate_size": shape_of(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": 1 + max(numbers(shapes, r"text_model\.encoder\.layers\.(\d{1,3})\."), default=0),
        "num_attention_heads": max(1, width // 64),
    }


def clip_spelling(name: str) -> str:
    """A text encoder's tensor as it is spelled here: some files, and transformers from 5.6, omit `text_model.`"""
    if name.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
        return f"text_model.{name}"
    return name


# --- OpenCLIP --------------------------------------------------------------------------------------------

#: a layer's parts: transformers' name -> OpenCLIP's
_LAYER = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
          "mlp.fc2": "mlp.c_proj"}


def open_clip_entries(config: Config) -> Iterator[Entry]:
    """Every tensor of a `CLIPTextModel` of this configuration, the original in OpenCLIP's names."""
    for entry in clip_entries(config):
        yield _open_clip(entry)


def projected_open_clip_entries(config: Config) -> Iterator[Entry]:
    """Every tensor of a `CLIPTextModelWithProjection`, the original in OpenCLIP's names."""
    yield from open_clip_entries(config)
    shape = (config["projection_dim"], config["hidden_size"])
    yield Entry("text_projection.weight", shape, "text_projection", shape[::-1], how="turned")


def _open_clip(entry: Entry) -> Entry:
    name, shape = entry.name.removeprefix("text_model."), entry.shape
    if name.startswith("embeddings."):
        ldm = {"token": "token_embedding.weight", "position": "positional_embedding"}[name[11:].partition("_")[0]]
        return Entry(entry.name, shape, ldm, shape)
    if name.startswith("final_layer_norm."):
        return Entry(entry.name, shape, name.replace("final_layer_norm", "ln_final"), shape)
    _, _, number, rest = name.split(".", 3)
    inside, _, leaf = rest.rpartition(".")
    at = f"transformer.resblocks.{number}"
    if inside in _LAYER:
        return Entry(entry.name, shape, f"{at}.{_LAYER[inside]}.{leaf}", shape)
    which = "qkv".index(inside.removeprefix("self_attn.")[0])
    return Entry(entry.name, shape, f"{at}.attn.in_proj_{leaf}", (3 * shape[0], *shape[1:]), (which, 3))


def open_clip_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What the shapes of a text encoder in OpenCLIP's names tell of its configuration: heads of 64 channels."""
    vocabulary, width = shape_of(shapes, "token_embedding.weight", 2)
    projection = shapes.get("text_projection", (width, width))
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": projection[-1],
        "max_position_embeddings": shape_of(shapes, "positional_embedding", 2)[0],
        "intermediate_size": shape_of(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "num_hidden_layers": 1 + max(numbers(shapes, r"transformer\.resblocks\.(\d{1,3})\."), default=0),
        "num_attention_heads": max(1, width // 64),
    }


def penultimate_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """As `open_clip_config`, of a text encoder whose last layer is not used: the published folders leave it out.

    So do some single files of SD 2, which show it by ViT-H's 23 layers where there would be 24.
    """
    config = open_clip_config(shapes)
    layers = config["num_hidden_layers"]
    return config | {"num_hidden_layers": layers if layers == 23 and config["hidden_size"] == 1024 else layers - 1}


def penultimate_extras(config: Config) -> Iterator[Extra]:
    """What OpenCLIP's whole text encoder has besides: a last layer, here a copy of the one before, and a projection.

    Nothing computes with it (kohya's sd-scripts write the same: library/model_util.py, `make_dummy_weights`).
    """
    last, width = config["num_hidden_layers"], config["hidden_size"]
    copied = f"transformer.resblocks.{last - 1}."
    for entry in open_clip_entries({**config, "num_hidden_layers": last}):
        if entry.ldm.startswith(copied) and entry.piece[0] == 0:
            yield Extra(entry.ldm.replace(copied, f"transformer.resblocks.{last}."), entry.ldm_shape, like=entry.ldm)
    yield Extra("text_projection", (width, config.get("projection_dim", width)), value=1.0)
    yield from logit_scale(config)


def logit_scale(config: Config) -> Iterator[Extra]:
    """The number that OpenCLIP's training scales by."""
    yield Extra("logit_scale", (), value=LOGIT_SCALE)


# --- T5 --------------------------------------------------------------------------------------------------


def t5_entries(config: Config) -> Iterator[Entry]:
    """Every tensor of a `T5EncoderModel` of this configuration, whose feed-forward is gated: T5 1.1 (Shazeer 2020)."""
    if not str(config["feed_forward_proj"]).startswith("gated"):
        raise UserError("has a T5 whose feed-forward is not gated, which is not supported")
    width, inner, heads = config["d_model"], config["d_ff"], config["num_heads"]
    rows: list[tuple[str, Shape]] = [("shared", (config["vocab_size"], width))]
    for i in range(config["num_layers"]):
        attention, ff = (f"encoder.block.{i}.layer.{n}" for n in (0, 1))
        rows += [(f"{attention}.SelfAttention.{p}", (heads * config["d_kv"], width)) for p in "qkv"]
        rows.append((f"{attention}.SelfAttention.o", (width, heads * config["d_kv"])))
        if i == 0:  # the layers after it use the same
            rows.append((f"{attention}.SelfAttention.relative_attention_bias",
                         (config["relative_attention_num_buckets"], heads)))
        rows += [(f"{ff}.DenseReluDense.{p}", (inner, width)) for p in ("wi_0", "wi_1")]
        rows += [(f"{ff}.DenseReluDense.wo", (width, inner)), (f"{attention}.layer_norm", (width,)),
                 (f"{ff}.layer_norm", (width,))]
    rows.append(("encoder.final_layer_norm", (width,)))
    for layer, shape in rows:
        yield from layer_entries(layer, layer, shape, bias=False)


def t5_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What the shapes of a T5 encoder tell of its configuration."""
    first = "encoder.block.0.layer.0.SelfAttention"
    vocabulary, width = shape_of(shapes, "shared.weight", 2)
    buckets, heads = shape_of(shapes, f"{first}.relative_attention_bias.weight", 2)
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shape_of(shapes, f"{first}.q.weight", 2)[0] // heads,
        "d_ff": shape_of(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2)[0],
        "num_layers": 1 + max(numbers(shapes, r"encoder\.block\.(\d{1,3})\."), default=0),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def t5_spelling(name: str) -> str:
    """A T5 encoder's tensor as it is spelled here: some files have its table of words by the other name alone."""
    return "shared.weight" if name == "encoder.embed_tokens.weight" else name


def t5_extras(config: Config) -> Iterator[Extra]:
    """Its table of words stands in single files twice: some programs read the one, some the other."""
    yield Extra("encoder.embed_tokens.weight", (config["vocab_size"], config["d_model"]), like="shared.weight")
