"""Stable Diffusion XL and its refiner: the configurations that Stability AI published, in diffusers' terms.

The base has two text encoders, OpenAI's CLIP ViT-L and OpenCLIP's ViT-bigG; the refiner the second of them alone.
"""

from __future__ import annotations

from typing import Any

from impasto.formats import ldm, text_layouts
from impasto.formats.configs import FamilyConfig, Part, Words, sd1

_UNET = sd1.UNET.config | {
    "sample_size": 128,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}


def _unet(**config: Any) -> Part:
    return Part(
        prefix="model.diffusion_model.",
        classes=("UNet2DConditionModel",),
        entries=ldm.unet_entries,
        derive=ldm.unet_config_of_64,
        config=_UNET | config,
        untold=(*sd1.UNET.untold, "addition_time_embed_dim"),
    )


def _big_text_encoder(prefix: str) -> Part:
    return Part(
        prefix=prefix,
        classes=("CLIPTextModelWithProjection",),
        entries=text_layouts.projected_open_clip_entries,
        derive=text_layouts.open_clip_config,
        config=sd1.TEXT_ENCODER.config | {
            "hidden_size": 1280,
            "projection_dim": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "hidden_act": "gelu",
        },
        untold=("num_attention_heads", "hidden_act"),
        spelling=text_layouts.clip_spelling,
        extras=text_layouts.logit_scale,
    )


VAE = Part(
    prefix="first_stage_model.",
    classes=("AutoencoderKL",),
    entries=ldm.vae_entries,
    derive=ldm.vae_config,
    config=sd1.VAE.config | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    untold=sd1.VAE.untold,
    spelling=ldm.vae_spelling,
)

TEXT_ENCODER = Part(
    prefix="conditioner.embedders.0.transformer.",
    classes=("CLIPTextModel",),
    entries=text_layouts.clip_entries,
    derive=text_layouts.clip_config,
    config=sd1.TEXT_ENCODER.config,
    untold=sd1.TEXT_ENCODER.untold,
    ldm_spelling=text_layouts.clip_spelling,
    spelling=text_layouts.clip_spelling,
)

SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}

SDXL = FamilyConfig(
    name="sdxl",
    parts={
        "unet": _unet(
            block_out_channels=[320, 640, 1280],
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            projection_class_embeddings_input_dim=2816,
        ),
        "text_encoder": TEXT_ENCODER,
        "text_encoder_2": _big_text_encoder("conditioner.embedders.1.model."),
        "vae": VAE,
    },
    scheduler=SCHEDULER,
    pipelines={
        "": "StableDiffusionXLPipeline",
        "inpainting": "StableDiffusionXLInpaintPipeline",
        "instruct-pix2pix": "StableDiffusionXLInstructPix2PixPipeline",
    },
    tokenizers={"tokenizer": Words("text_encoder"), "tokenizer_2": Words("text_encoder_2", pad="!")},
    index={"feature_extractor": [None, None], "image_encoder": [None, None], "force_zeros_for_empty_prompt": True},
)

REFINER = FamilyConfig(
    name="sdxl-refiner",
    parts={
        "unet": _unet(
            block_out_channels=[384, 768, 1536, 1536],
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            transformer_layers_per_block=[1, 4, 4, 4],
            attention_head_dim=[6, 12, 24, 24],
            cross_attention_dim=1280,
            projection_class_embeddings_input_dim=2560,
        ),
        "text_encoder_2": _big_text_encoder("conditioner.embedders.0.model."),
        "vae": VAE,
    },
    scheduler=SCHEDULER,
    pipelines={"": "StableDiffusionXLImg2ImgPipeline"},
    tokenizers={"tokenizer_2": Words("text_encoder_2", pad="!")},
    index={"feature_extractor": [None, None], "image_encoder": [None, None], "text_encoder": [None, None],
           "tokenizer": [None, None], "requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False},
)
