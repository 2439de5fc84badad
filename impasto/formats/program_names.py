"""The names under which each program of the field finds an adapter's layers, family by family, as data.

Seen in the programs' sources (the table at the end names the files) and, for diffusers and kohya's networks, by running
them on every layer of each family. A pattern holds whatever the number of blocks, so that small networks are told too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# --- layers, dotted ----------------------------------------------------------------------------------------

# UNets in diffusers' names
_BLOCKS = r"(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)"
_ATTENTION = _BLOCKS + r"\.attentions\.\d+"
_TRANSFORMER = _ATTENTION + r"\.transformer_blocks\.\d+"
ATTN = _TRANSFORMER + r"\.attn[12]\.to_(?:q|k|v|out\.0)"
REST = "|".join((
    _TRANSFORMER + r"\.ff\.net\.(?:0\.proj|2)", _ATTENTION + r"\.proj_(?:in|out)",
    _BLOCKS + r"\.resnets\.\d+\.(?:conv[12]|time_emb_proj|conv_shortcut)",
    r"(?:down_blocks\.\d+\.downsamplers|up_blocks\.\d+\.upsamplers)\.0\.conv",
))
ENDS = r"conv_in|conv_out|time_embedding\.linear_[12]"
ADDED = r"add_embedding\.linear_[12]"
NORMS = "|".join((_BLOCKS + r"\.resnets\.\d+\.norm[12]", _ATTENTION + r"\.norm", _TRANSFORMER + r"\.norm[123]"))
LAST_NORM = r"conv_norm_out"
#: attention where `.processor` stands before `to_q`, and no `.0` after `to_out`
OLD_ATTN = _TRANSFORMER + r"\.attn[12]\.processor\.to_(?:q|k|v|out)"

# the same in their authors' names
_OWN_BLOCKS = r"(?:(?:input|output)_blocks\.\d+|middle_block)\.\d+"
_OWN_TRANSFORMER = _OWN_BLOCKS + r"\.transformer_blocks\.\d+"
OWN = "|".join((
    _OWN_TRANSFORMER + r"\.(?:attn[12]\.to_(?:q|k|v|out\.0)|ff\.net\.(?:0\.proj|2))",
    _OWN_BLOCKS + r"\.proj_(?:in|out)",
    _OWN_BLOCKS + r"\.(?:in_layers\.2|out_layers\.3|emb_layers\.1|skip_connection)",
    r"input_blocks\.\d+\.0\.op|output_blocks\.\d+\.[12]\.conv",
))
OWN_ENDS = r"input_blocks\.0\.0|out\.2|time_embed\.[02]|label_emb\.0\.[02]"
OWN_NORMS = "|".join((_OWN_BLOCKS + r"\.(?:norm|in_layers\.0|out_layers\.0)", _OWN_TRANSFORMER + r"\.norm[123]",
                      r"out\.0"))

# MMDiT in its authors' names, and in diffusers'
_JOINT = r"joint_blocks\.\d+\.(?:x|context)_block"
JOINT = _JOINT + r"\.(?:attn2?\.(?:qkv|proj)|mlp\.fc[12]|adaLN_modulation\.1)"
JOINT_ENDS = r"context_embedder|x_embedder\.proj|[ty]_embedder\.mlp\.[02]|final_layer\.(?:linear|adaLN_modulation\.1)"
JOINT_NORMS = _JOINT + r"\.attn2?\.ln_[qk]"
_SPLIT = r"transformer_blocks\.\d+"
SPLIT_ATTN = _SPLIT + r"\.attn\.to_(?:q|k|v|out\.0)"  # of the picture, in every block
SPLIT = "|".join((
    SPLIT_ATTN, _SPLIT + r"\.attn2\.to_(?:q|k|v|out\.0)", _SPLIT + r"\.attn\.(?:add_[qkv]_proj|to_add_out)",
    _SPLIT + r"\.(?:ff(?:_context)?\.net\.(?:0\.proj|2)|norm1(?:_context)?\.linear)", r"context_embedder",
    r"pos_embed\.proj|time_text_embed\.(?:timestep|text)_embedder\.linear_[12]|norm_out\.linear|proj_out",
))
SPLIT_NORMS = _SPLIT + r"\.attn2?\.norm_(?:added_)?[qk]"

# text encoders
_LAYER = r"text_model\.encoder\.layers\.\d+"
TEXT = _LAYER + r"\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])"
TEXT_NORMS = _LAYER + r"\.layer_norm[12]"
TEXT_LAST = r"text_model\.final_layer_norm"
PROJECTION = r"text_projection"
TOKENS = r"text_model\.embeddings\.(?:token|position)_embedding"
T5 = r"encoder\.block\.\d+\.layer\.\d+\.(?:SelfAttention\.[qkvo]|DenseReluDense\.w(?:i|i_0|i_1|o))"

# --- what follows a layer's name ---------------------------------------------------------------------------

KOHYA = r"\.(?:lora_up\.weight|lora_down\.weight|alpha)"
#: what LyCORIS adds to kohya's
LYCORIS = (r"\.(?:lora_mid\.weight|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|diff|diff_b|w_norm|b_norm|"
           r"dora_scale)")
BOTH = f"{KOHYA}|{LYCORIS}"
PEFT = r"\.lora_[AB]\.weight"
PEFT_DORA = r"\.lora_magnitude_vector"
OLD = r"\.(?:lora|lora_linear_layer)\.(?:up|down)\.weight"
OLD_LORA = r"_lora\.(?:up|down)\.weight"
ANY = f"{BOTH}|{PEFT}|{OLD}|{OLD_LORA}"
#: new tokens beside the layers
BUNDLED = r"bundle_emb\.[^.]+\.(?:string_to_param\..+|clip_[lg]|emb_params)"


def flat(prefix: str, *layers: str, endings: str = BOTH) -> str:
    """A pattern of keys in kohya's manner: in a layer's name `_` for `.`."""
    return rf"{prefix}(?:{'|'.join(layers)})".replace(r"\.", "_") + f"(?:{endings})"


def dotted(prefix: str, *layers: str, endings: str = f"{PEFT}|{PEFT_DORA}|{OLD}") -> str:
    """A pattern of keys that spell a layer's path as it is."""
    return rf"{prefix}(?:{'|'.join(layers)})(?:{endings})"


# --- programs ----------------------------------------------------------------------------------------------

#: family -> patterns; a key is loaded if one of them matches all of it
Names = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Program:
    """What a program loads. A family that it does not have in `loads` it does not know. `source`: where that is seen.
    """

    name: str
    loads: Names
    source: str
    #: what is loaded in place of that if the file holds anything of LyCORIS', and what that takes
    extended: Names = field(default_factory=dict)
    extension: str = ""


# A1111: a layer's name is what stands before the first dot of a key, so no dotted name is found, but for SD 3. Its
# text encoders are OpenCLIP's in SD 2 and the second of SDXL, whose norms and projection have other names
_A1111_OWN = flat("lora_unet_", OWN, OWN_ENDS, OWN_NORMS)
_A1111_UNET = (_A1111_OWN, flat("lora_unet_", ATTN, REST, ENDS, NORMS))
_A1111 = {
    "sd1": (*_A1111_UNET, flat("lora_te_", TEXT, TEXT_NORMS), flat("lora_te1_", TEXT, TEXT_NORMS, TEXT_LAST), BUNDLED),
    "sd2": (*_A1111_UNET, flat("lora_te_", TEXT), BUNDLED),
    # it looks for the first upsampler where it is in networks without attention before it
    "sdxl": (_A1111_OWN, flat("lora_unet_(?!up_blocks_0_upsamplers)", ATTN, REST, ENDS, NORMS),
             flat("lora_te1_", TEXT, TEXT_NORMS, TEXT_LAST), flat("lora_te2_", TEXT), BUNDLED),
    "sdxl-refiner": (*_A1111_UNET, BUNDLED),
    # of what diffusers calls apart, the picture's attention alone; nothing of the text encoders
    "sd3": (dotted(r"transformer\.", SPLIT_ATTN, endings=f"{PEFT}|{KOHYA}"),
            flat("lora_unet_", JOINT, JOINT_ENDS, endings=r"\.lora_(?:up|down|mid)\.weight"), BUNDLED),
}

# ComfyUI: a map of names, each of which takes every ending. Its dotted names have `.processor` before `to_q` and no
# `.0` after `to_out`, so attention in peft's spelling is not among them
_COMFY_UNET = (
    flat("lora_unet_", OWN, OWN_ENDS, OWN_NORMS, endings=ANY),
    dotted(r"diffusion_model\.", OWN, OWN_ENDS, OWN_NORMS, endings=ANY),
    flat("(?:lora_unet|lycoris)_", ATTN, REST, ENDS, ADDED, NORMS, LAST_NORM, endings=ANY),
    dotted(r"(?:unet\.)?", OLD_ATTN, REST, ENDS, ADDED, NORMS, LAST_NORM, endings=ANY),
)
_COMFY_JOINT = (flat("lora_unet_", JOINT, JOINT_ENDS, JOINT_NORMS, endings=ANY),
                dotted(r"diffusion_model\.", JOINT, JOINT_ENDS, JOINT_NORMS, endings=ANY))
_FIRST = (flat("lora_te1?_", TEXT, endings=ANY), dotted(r"text_encoder\.", TEXT, endings=ANY))
_SECOND = (flat("lora_te2_", TEXT, PROJECTION, endings=ANY), dotted(r"text_encoder_2\.", TEXT, endings=ANY))
# of the refiner the only text encoder counts as the first
_ALONE = (flat("lora_te_", TEXT, endings=ANY), dotted(r"text_encoder\.", TEXT, endings=ANY),
          flat("lora_te2_", PROJECTION, endings=ANY))


def _generic(encoders: str) -> str:
    """ComfyUI's own names of everything in text encoders."""
    return dotted(rf"text_encoders\.(?:{encoders})\.transformer\.", TEXT, TEXT_NORMS, TEXT_LAST, PROJECTION, TOKENS,
                  endings=ANY)


_COMFYUI = {
    "sd1": (*_COMFY_UNET, *_FIRST, _generic("clip_l")),
    "sd2": (*_COMFY_UNET, *_FIRST, _generic("clip_h")),
    "sdxl": (*_COMFY_UNET, *_FIRST, *_SECOND, _generic("clip_[lg]")),
    "sdxl-refiner": (*_COMFY_UNET, *_ALONE, _generic("clip_g")),
    "sd3": (*_COMFY_JOINT, flat("(?:lora_transformer|lycoris)_", SPLIT, SPLIT_NORMS, endings=ANY),
            dotted(r"(?:transformer|base_model\.model)\.", SPLIT, SPLIT_NORMS, endings=ANY), *_FIRST, *_SECOND,
            flat("lora_te1_", PROJECTION, endings=ANY), flat("lora_te3_", T5, endings=ANY), _generic("clip_[lg]"),
            dotted(r"text_encoders\.t5xxl\.transformer\.", T5, endings=ANY)),
}
# Forge has an older copy of it, in which diffusers' names of SD 3 are commented out
_FORGE = {
    "sd1": (*_COMFY_UNET, *_FIRST),
    "sd2": (*_COMFY_UNET, *_FIRST),
    "sdxl": (*_COMFY_UNET, *_FIRST, *_SECOND),
    "sdxl-refiner": (*_COMFY_UNET, *_ALONE),
    "sd3": (*_COMFY_JOINT, *_FIRST, *_SECOND, flat("lora_te1_", PROJECTION, endings=ANY),
            flat("lora_te[123]_", T5, endings=ANY)),
}

# kohya: what lies inside Transformer2DModel, ResnetBlock2D, Downsample2D, Upsample2D, CLIPAttention and CLIPMLP; of
# SDXL in its authors' names, to which it translates diffusers'; of SD 3 in its authors' names alone
_KOHYA_SD = (flat("lora_unet_", ATTN, REST, endings=KOHYA), flat("lora_te_", TEXT, endings=KOHYA))
_KOHYA = {
    "sd1": _KOHYA_SD, "sd2": _KOHYA_SD,
    "sdxl": (flat("lora_unet_", OWN, ATTN, REST, endings=KOHYA), flat("lora_te[12]_", TEXT, endings=KOHYA)),
    "sd3": (flat("lora_unet_", JOINT, JOINT_ENDS, endings=KOHYA), flat("lora_te[12]_", TEXT, endings=KOHYA),
            flat("lora_te3_", T5, endings=KOHYA)),
}
# in the extension, every module by its own name
_LYCORIS_SD = (flat("lora_unet_", ATTN, REST, ENDS, NORMS, LAST_NORM), flat("lora_te_", TEXT, TEXT_NORMS, TEXT_LAST))
_LYCORIS_TEXTS = (flat("lora_te[12]_", TEXT, TEXT_NORMS, TEXT_LAST), flat("lora_te2_", PROJECTION))
_EXTENDED = {
    "sd1": _LYCORIS_SD, "sd2": _LYCORIS_SD,
    "sdxl": (flat("lora_unet_", OWN, OWN_ENDS, OWN_NORMS), *_LYCORIS_TEXTS),
    "sd3": (flat("lora_unet_", JOINT, JOINT_ENDS, JOINT_NORMS), *_LYCORIS_TEXTS, flat("lora_te1_", PROJECTION),
            flat("lora_te3_", T5)),
}

# diffusers: kohya's names, for SDXL also those of its authors, and its own
_UNET_DOTTED = (dotted(r"unet\.", ATTN, REST, ENDS, ADDED), dotted(r"unet\.", OLD_ATTN, endings=OLD_LORA))
_SD_DIFFUSERS = (flat("lora_unet_", ATTN, REST, ENDS, endings=KOHYA), flat("lora_te1?_", TEXT, endings=KOHYA),
                 *_UNET_DOTTED, dotted(r"text_encoder\.", TEXT))
_XL_DIFFUSERS = (flat("lora_unet_", OWN, OWN_ENDS, ATTN, REST, ENDS, endings=KOHYA),
                 flat("lora_te2_", TEXT, PROJECTION, endings=KOHYA), *_UNET_DOTTED,
                 dotted(r"text_encoder_2\.", TEXT, PROJECTION))
_DIFFUSERS = {
    "sd1": _SD_DIFFUSERS, "sd2": _SD_DIFFUSERS,
    "sdxl": (*_XL_DIFFUSERS, flat("lora_te1?_", TEXT, endings=KOHYA), dotted(r"text_encoder\.", TEXT)),
    "sdxl-refiner": _XL_DIFFUSERS,
    "sd3": (dotted(r"transformer\.", SPLIT), dotted(r"text_encoder(?:_2)?\.", TEXT, PROJECTION)),
}

PROGRAMS = (
    Program("A1111", _A1111,
            "AUTOMATIC1111/stable-diffusion-webui: extensions-builtin/Lora/networks.py, network_*.py, "
            "modules/models/sd3/sd3_model.py"),
    Program("Forge", _FORGE,
            "lllyasviel/stable-diffusion-webui-forge: packages_3rdparty/comfyui_lora_collection/lora.py, "
            "extensions-builtin/sd_forge_lora/networks.py"),
    Program("ComfyUI", _COMFYUI, "Comfy-Org/ComfyUI: comfy/lora.py, comfy/utils.py, comfy/weight_adapter/*.py"),
    Program("kohya", _KOHYA, "kohya-ss/sd-scripts: networks/lora.py, networks/lora_sd3.py; LyCORIS: kohya.py",
            _EXTENDED, "needs the package lycoris-lora, and --network_module lycoris.kohya"),
    Program("diffusers", _DIFFUSERS,
            "huggingface/diffusers: src/diffusers/loaders/lora_conversion_utils.py, lora_pipeline.py, peft.py"),
)
