"""Stable Diffusion 1.x: the configurations that its authors published (CompVis, RunwayML), in diffusers' terms."""

from __future__ import annotations

from impasto.formats import ldm, text_layouts
from impasto.formats.configs import FamilyConfig, Part

UNET = Part(
    prefix="model.diffusion_model.",
    classes=("UNet2DConditionModel",),
    entries=ldm.unet_entries,
    derive=ldm.unet_config,
    config={
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,  # diffusers' name for what is in SD 1 the number of heads, at every level
        "use_linear_projection": False,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
    },
    untold=("attention_head_dim", "norm_num_groups", "sample_size"),
)

TEXT_ENCODER = Part(
    prefix="cond_stage_model.transformer.",
    classes=("CLIPTextModel",),
    entries=text_layouts.clip_entries,
    derive=text_layouts.clip_config,
    config={
        "vocab_size": 49408,
        "hidden_size": 768,
        "projection_dim": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,  # as published: transformers then takes the end by argmax, where 49407 is found
        "pad_token_id": 1,
    },
    untold=("num_attention_heads", "hidden_act"),
    ldm_spelling=text_layouts.clip_spelling,
    spelling=text_layouts.clip_spelling,
)

VAE = Part(
    prefix="first_stage_model.",
    classes=("AutoencoderKL",),
    entries=ldm.vae_entries,
    derive=ldm.vae_config,
    config={
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "sample_size": 512,
        "scaling_factor": 0.18215,
    },
    untold=("norm_num_groups", "sample_size", "scaling_factor"),
    spelling=ldm.vae_spelling,
)

#: written as the published folders have it, so that other programs read our folders as they read those
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
    "trained_betas": None,
}

SD1 = FamilyConfig(
    name="sd1",
    parts={"unet": UNET, "text_encoder": TEXT_ENCODER, "vae": VAE},
    scheduler=SCHEDULER,
    pipelines={
        "": "StableDiffusionPipeline",
        "inpainting": "StableDiffusionInpaintPipeline",
        "instruct-pix2pix": "StableDiffusionInstructPix2PixPipeline",
    },
)
