"""Stable Diffusion 2.0 and 2.1: the configurations that Stability AI published, in diffusers' terms.

Its text encoder is OpenCLIP's ViT-H/14, whose last layer is not used. What its network predicts, the noise (base, 512)
or the velocity (768), stands in a folder's scheduler and in no single file.
"""

from __future__ import annotations

from impasto.formats import ldm, text_layouts
from impasto.formats.configs import FamilyConfig, Part, Words, sd1

UNET = Part(
    prefix="model.diffusion_model.",
    classes=("UNet2DConditionModel",),
    entries=ldm.unet_entries,
    derive=ldm.unet_config_of_64,
    config=sd1.UNET.config | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
                              "use_linear_projection": True},
    untold=sd1.UNET.untold,
)

TEXT_ENCODER = Part(
    prefix="cond_stage_model.model.",
    classes=("CLIPTextModel",),
    entries=text_layouts.open_clip_entries,
    derive=text_layouts.penultimate_config,
    config={
        "vocab_size": 49408,
        "hidden_size": 1024,
        "projection_dim": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    untold=("num_attention_heads", "hidden_act"),
    spelling=text_layouts.clip_spelling,
    extras=text_layouts.penultimate_extras,
)

SD2 = FamilyConfig(
    name="sd2",
    parts={"unet": UNET, "text_encoder": TEXT_ENCODER, "vae": sd1.VAE},
    scheduler={key: value for key, value in sd1.SCHEDULER.items() if key != "prediction_type"},
    pipelines=sd1.SD1.pipelines,
    velocity_size=96,
    tokenizers={"tokenizer": Words("text_encoder", pad="!")},
)
