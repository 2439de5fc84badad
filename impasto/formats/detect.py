"""What a file or folder is, told from its header alone, in milliseconds.

By structure first, so that small variants are recognised too: which text encoders are there and in which
layout, which blocks. Only where a denoiser stands alone do its metadata and the width of its cross-attention
decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from impasto.formats.header import read_header
from impasto.formats.pictured import holds_embedding
from impasto.formats.probe import is_pickle, is_picture, read_json

#: family -> how it is called in a sentence
TITLES = {
    "sd1": "an SD 1.x", "sd2": "an SD 2.x", "sdxl": "an SDXL", "sdxl-refiner": "an SDXL refiner", "sd3": "an SD 3",
    "flux": "a Flux", "flux2": "a Flux 2", "chroma": "a Chroma", "cascade": "a Stable Cascade", "pixart": "a PixArt",
    "auraflow": "an AuraFlow", "hunyuan": "a HunyuanDiT", "lumina": "a Lumina", "qwen-image": "a Qwen-Image",
    "z-image": "a Z-Image", "wan": "a Wan video", "hidream": "a HiDream", "sana": "a Sana",
    "kandinsky": "a Kandinsky", "upscaler": "a Stable Diffusion upscaler", "depth": "a Stable Diffusion depth",
    "unclip": "a Stable unCLIP", "video": "a Stable Video Diffusion", "animatediff": "an AnimateDiff",
}

#: beginning of a key, after the denoiser's prefix -> family; the first that is found. What is built on another
#: family's UNet or text encoder comes before that family.
BLOCKS = (
    ("joint_blocks.0.", "sd3"), ("distilled_guidance_layer.", "chroma"), ("single_stream_modulation.", "flux2"),
    ("double_blocks.0.img_attn.", "flux"), ("double_layers.0.", "auraflow"), ("clip_txt_mapper.", "cascade"),
    ("clip_mapper.", "cascade"), ("double_stream_blocks.0.", "hidream"), ("cap_pad_token", "z-image"),
    ("cap_embedder.0.", "lumina"), ("head.modulation", "wan"), ("mlp_t5.", "hunyuan"), ("t_block.1.", "pixart"),
    ("txt_norm.", "qwen-image"), ("label_emb.weight", "upscaler"), ("low_scale_model.", "upscaler"),
    ("depth_model.", "depth"), ("noise_augmentor.", "unclip"), ("input_blocks.1.0.time_stack.", "video"),
)
#: the same for transformers in diffusers' names
TRANSFORMERS = (
    ("single_transformer_blocks.0.proj_mlp.", "flux"), ("joint_transformer_blocks.0.", "auraflow"),
    ("transformer_blocks.0.attn.add_q_proj.", "sd3"), ("adaln_single.", "pixart"),
)
#: what the denoiser's keys may begin with; the first that fits is taken off
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")

#: beginnings of keys -> kind and family of files that are neither a checkpoint nor made by training here
OTHERS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("control_model.", "controlnet_cond_embedding.", "input_hint_block."), "controlnet", ""),
    (("adapter.body.0.", "body.0.block1."), "T2I-Adapter", ""),
    (("concept_embeds", "special_care_embeds"), "safety checker", ""),
    (("down_blocks.0.motion_modules.0.",), "motion module", "animatediff"),
    (("conv_first.", "RRDB_trunk.0.", "model.1.sub.0."), "image upscaler", ""),
    (("model.layers.0.self_attn.", "model.language_model.", "language_model.", "layers.0.attention.wq.",
      "transformer.h.0."), "language model", ""),
)

#: the beginning of a pipeline's class name in model_index.json -> family; the first that fits
PIPELINES = (
    ("StableDiffusionXL", "sdxl"), ("StableDiffusion3", "sd3"), ("StableDiffusionUpscale", "upscaler"),
    ("StableDiffusionLatentUpscale", "upscaler"), ("Flux2", "flux2"), ("Flux", "flux"), ("Chroma", "chroma"),
    ("StableDiffusionDepth2Img", "depth"), ("StableUnCLIP", "unclip"), ("StableVideoDiffusion", "video"),
    ("StableCascade", "cascade"), ("PixArt", "pixart"), ("AuraFlow", "auraflow"), ("HunyuanDiT", "hunyuan"),
    ("Lumina", "lumina"), ("QwenImage", "qwen-image"), ("Wan", "wan"), ("HiDream", "hidream"), ("Sana", "sana"),
    ("Kandinsky", "kandinsky"), ("AnimateDiff", "animatediff"),
)

#: `ss_base_model_version` and `modelspec.architecture` begin so
FAMILY_WORDS = (
    ("sd_v1", "sd1"), ("sd_v2", "sd2"), ("sdxl_base", "sdxl"), ("sdxl_refiner", "sdxl-refiner"), ("sd3", "sd3"),
    ("medium", "sd3"), ("5-medium", "sd3"), ("5-large", "sd3"),  # kohya's sd3_train_network.py
    ("flux", "flux"), ("stable-diffusion-v1", "sd1"), ("stable-diffusion-v2", "sd2"),
    ("stable-diffusion-xl-v1-base", "sdxl"), ("stable-diffusion-xl-v1-refiner", "sdxl-refiner"),
    ("stable-diffusion-3", "sd3"), ("stable-diffusion-v3", "sd3"),
)

#: width of the text states that cross-attention reads -> family
CONTEXT_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}

#: layers of SD 3's transformer, and its third text encoder, in adapters; others have layers of the same names beside
#: some of their own, or are wider
_JOINT = re.compile(r"joint_blocks[._]\d|(?<!single_)transformer_blocks[._]\d+[._]"
                    r"(?:attn[._](?:to_|add_)|ff_context[._]|norm1_context[._])|^lora_te3_|^text_encoder_3\.|\bt5xxl\.|^t5\.")
_OTHER_JOINT = re.compile(r"single_transformer_blocks|joint_transformer_blocks|(?:img|txt)_(?:mlp|mod)")
#: channels of Flux, AuraFlow and Qwen-Image
WIDER = 3072

#: input channels of the UNet -> variant
VARIANTS = {8: "instruct-pix2pix", 9: "inpainting"}

_ADAPTER = re.compile(r"[._](?:lora_up|lora_down|lora_mid|lora_A|lora_B|hada_w[12]|lokr_w[12]|lora\.up|lora\.down|"
                      r"lora_linear_layer|oft_blocks|oft_diag|glora|dora_scale)\b|[._](?:hada|lokr)_[wt][12]|"
                      r"^(?:lora_(?:unet|transformer|te\d?)|lycoris)_\w+\.(?:diff|diff_b|w_norm|b_norm)$")
_CONTEXT = re.compile(r"attn2[._]to_[kv]\.")


@dataclass(frozen=True)
class Detected:
    """What something is. `family`, `layout` and `variant` are "" where nothing tells them, or there is none."""

    #: checkpoint, unet, transformer, vae, text encoder, adapter, embedding, hypernetwork, IP-Adapter, picture, one
    #: of OTHERS, unknown
    kind: str
    family: str = ""  # a key of TITLES
    layout: str = ""  # ldm, diffusers; of adapters kohya, comfyui, peft
    variant: str = ""  # inpainting, instruct-pix2pix

    @property
    def title(self) -> str:
        """What it is, as the end of a sentence: "an SDXL checkpoint"."""
        if self.kind == "unknown":
            return "nothing that is known here"
        whose = TITLES.get(self.family) or ("an" if (self.variant or self.kind)[0] in "aeiI" else "a")
        return " ".join(word for word in (whose, self.variant, self.kind) if word)


def detect(path: Path | str) -> Detected:
    """What the file or folder at `path` is, without reading a tensor. `UserError` if it is not there or is damaged."""
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if is_picture(path):
        return Detected("embedding" if holds_embedding(path) else "picture")
    if is_pickle(path):
        return _pickle(path)
    header = read_header(path)
    return detect_names({name: info.shape for name, info in header.tensors.items()}, header.metadata)


def detect_names(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> Detected:
    """What a file with tensors of these names and shapes is."""
    names = shapes.keys()
    if _has(names, "image_proj.", "ip_adapter."):  # some have a LoRA inside
        return Detected("IP-Adapter")
    if any(_ADAPTER.search(name) for name in names):
        return Detected("adapter", family_told(metadata) or _by_context(shapes) or _by_blocks(shapes),
                        _adapter_layout(names))
    if (embedding := _embedding(shapes, metadata)) is not None:
        return embedding
    for beginnings, kind, family in OTHERS:
        if _has(names, *beginnings):
            return Detected(kind, family)
    return _network(shapes, metadata)


def _embedding(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> Detected | None:
    """One or several embeddings, if that is what they are."""
    names = shapes.keys()
    width = next((shape[-1] for shape in shapes.values() if shape), 0)
    told = family_told(metadata)
    family = told or CONTEXT_WIDTHS.get(width, "")
    if {"emb_params", "clip_l", "clip_g", "string_to_param"} & names:
        return Detected("embedding", told or ("sdxl" if "clip_g" in names else family))
    if names and all(name.startswith("bundle_emb.") for name in names):
        both = any(name.endswith(".clip_g") for name in names)
        return Detected("embedding", told or ("sdxl" if both else family), "kohya")
    if len(shapes) == 1:
        ((name, shape),) = shapes.items()
        told = name.startswith("<") or "impasto.token" in metadata
        alike = width in CONTEXT_WIDTHS and len(shape) == 2  # any network may have a vector of that width
        if (told and len(shape) in (1, 2) or alike) and "." not in name.strip("<>"):
            return Detected("embedding", family, "diffusers")
    return None


def _network(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> Detected:
    """A checkpoint, or one network of it."""
    names = shapes.keys()
    inner = {_without_prefix(name): shape for name, shape in shapes.items()}
    for word, family in BLOCKS:
        if _has(inner, word):
            return Detected("checkpoint", family, "ldm")
    for word, family in TRANSFORMERS:
        if _has(names, word):
            return Detected("transformer", family, "diffusers")
    texts = (("conditioner.embedders.1.", "sdxl"), ("conditioner.embedders.0.model.", "sdxl-refiner"),
             ("conditioner.embedders.0.", "sdxl"), ("cond_stage_model.model.", "sd2"),
             ("cond_stage_model.transformer.", "sd1"))
    first = inner.get("input_blocks.0.0.weight") or inner.get("conv_in.weight") or ()
    variant = variant_of(first[1] if len(first) == 4 else None)
    for prefix, family in texts:
        if _has(names, prefix):
            return Detected("checkpoint", family, "ldm", variant)
    if _has(inner, "input_blocks."):
        family = family_told(metadata) or _by_context(shapes)
        whole = _has(names, "first_stage_model.")
        return Detected("checkpoint" if whole else "unet", family, "ldm", variant)
    if _has(names, "down_blocks.") and "conv_in.weight" in names:
        return Detected("unet", family_told(metadata) or _by_context(shapes), "diffusers", variant)
    if _has(names, "first_stage_model.", "encoder.down.", "decoder.up."):
        return Detected("vae", "", "ldm")
    if _has(names, "encoder.down_blocks.", "decoder.up_blocks."):
        return Detected("vae", "", "diffusers")
    if _has(names, "text_model.", "embeddings.token_embedding.", "transformer.resblocks.", "encoder.block.0.layer.0."):
        return Detected("text encoder")
    return Detected("unknown")


def family_of_folder(index: Mapping[str, Any], unet: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """The family of a diffusers folder, from model_index.json and the configurations of its UNet and text encoder.

    SD 1 and 2 share their pipelines' names: SD 2 has OpenCLIP's text encoder (plain GELU) and linear projections.
    """
    pipeline = str(index.get("_class_name", ""))
    for word, family in PIPELINES:
        if pipeline.startswith(word):
            lone = family == "sdxl" and index.get("text_encoder") == [None, None]
            return "sdxl-refiner" if lone else family
    if not pipeline.startswith(("StableDiffusion", "LatentConsistency")):
        return ""
    return "sd2" if text.get("hidden_act") == "gelu" or unet.get("use_linear_projection") else "sd1"


def _folder(path: Path) -> Detected:
    def config(part: str) -> dict[str, Any]:
        file = path / part / "config.json"
        return read_json(file) if file.exists() else {}

    if (path / "model_index.json").exists():
        unet = config("unet")
        family = family_of_folder(read_json(path / "model_index.json"), unet, config("text_encoder"))
        return Detected("checkpoint", family, "diffusers", variant_of(unet.get("in_channels")))
    if (path / "adapter_config.json").exists():
        return Detected("adapter", layout="peft")
    kinds = {"AutoencoderKL": "vae", "UNet2DConditionModel": "unet", "ControlNetModel": "controlnet"}
    if kind := kinds.get(config(".").get("_class_name", "")):
        return Detected(kind, layout="diffusers")
    return Detected("unknown")


def _pickle(path: Path) -> Detected:
    from impasto.formats.pickles import ParameterDict, load_pickle, weights_in

    loaded = load_pickle(path)
    if isinstance(loaded, dict):
        if isinstance(loaded.get("string_to_param"), dict | ParameterDict):
            return Detected("embedding")
        if "layer_structure" in loaded or any(isinstance(key, int) for key in loaded):
            return Detected("hypernetwork")
    tensors, texts = weights_in(loaded, path)
    return detect_names({name: tuple(tensor.shape) for name, tensor in tensors.items()}, texts)


def _has(names: Iterable[str], *beginnings: str) -> bool:
    return any(name.startswith(beginnings) for name in names)


def _without_prefix(name: str) -> str:
    """The name of one of the denoiser's tensors as the denoiser itself has it."""
    return name.removeprefix(next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""))


def variant_of(channels: object) -> str:
    """The variant that the number of the UNet's input channels tells."""
    return VARIANTS.get(channels, "") if isinstance(channels, int) else ""


def family_told(metadata: Mapping[str, str]) -> str:
    """The family that metadata name; "" if they name none."""
    if metadata.get("impasto.family"):
        return metadata["impasto.family"]
    for key in ("ss_base_model_version", "modelspec.architecture"):
        for word, family in FAMILY_WORDS:
            if metadata.get(key, "").startswith(word):
                return family
    return ""


def _by_context(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The family that the width of the cross-attention's text states tells."""
    for name, shape in shapes.items():
        if _CONTEXT.search(name) and len(shape) == 2 and shape[1] in CONTEXT_WIDTHS:
            return CONTEXT_WIDTHS[shape[1]]
    return ""


def _by_blocks(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The family that the names of an adapter's layers tell, if it has a transformer."""
    found = [shape for name, shape in shapes.items() if _JOINT.search(name)]
    other = any(_OTHER_JOINT.search(name) for name in shapes)
    return "sd3" if found and not other and not any(WIDER in shape for shape in found) else ""


def _adapter_layout(names: Iterable[str]) -> str:
    if _has(names, "lora_unet_", "lora_te", "lora_transformer_", "lycoris_"):
        return "kohya"
    if _has(names, "diffusion_model.", "text_encoders."):
        return "comfyui"
    return "peft" if _has(names, "base_model.model.", "unet.", "text_encoder", "transformer.") else ""
