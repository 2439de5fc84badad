"""Stable Diffusion 3 and 3.5: the configurations that Stability AI published, in diffusers' terms.

Medium's (3) stand here; those of 3.5 medium (norms of queries and keys, a second attention, positions up to 384) and of
3.5 large (38 blocks) follow from shapes. Three text encoders: CLIP ViT-L and OpenCLIP's ViT-bigG, both in Hugging
Face's names, and T5 1.1 XXL, without which it draws too.
"""

from __future__ import annotations

from impasto.formats import ldm, mmdit, text_layouts
from impasto.formats.configs import FamilyConfig, Part, Words, sd1, sdxl

TRANSFORMER = Part(
    prefix="model.diffusion_model.",
    classes=("SD3Transformer2DModel",),
    entries=mmdit.mmdit_entries,
    derive=mmdit.mmdit_config,
    config={
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
        "dual_attention_layers": [],
        "qk_norm": None,
    },
    untold=("sample_size", "attention_head_dim", "num_attention_heads"),
)

TEXT_ENCODER = Part(
    prefix="text_encoders.clip_l.transformer.",
    classes=("CLIPTextModelWithProjection",),
    entries=text_layouts.unprojected_clip_entries,
    derive=text_layouts.clip_config,
    config=sd1.TEXT_ENCODER.config,
    untold=sd1.TEXT_ENCODER.untold,
    ldm_spelling=text_layouts.clip_spelling,
    spelling=text_layouts.clip_spelling,
)

TEXT_ENCODER_2 = Part(
    prefix="text_encoders.clip_g.transformer.",
    classes=("CLIPTextModelWithProjection",),
    entries=text_layouts.projected_clip_entries,
    derive=text_layouts.clip_config,
    config=sdxl.SDXL.parts["text_encoder_2"].config,
    untold=sd1.TEXT_ENCODER.untold,
    ldm_spelling=text_layouts.clip_spelling,
    spelling=text_layouts.clip_spelling,
)

T5 = Part(
    prefix="text_encoders.t5xxl.transformer.",
    classes=("T5EncoderModel",),
    entries=text_layouts.t5_entries,
    derive=text_layouts.t5_config,
    config={
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "num_heads": 64,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": False,
    },
    untold=("relative_attention_max_distance",),
    ldm_spelling=text_layouts.t5_spelling,
    spelling=text_layouts.t5_spelling,
    extras=text_layouts.t5_extras,
)

VAE = Part(
    prefix="first_stage_model.",
    classes=("AutoencoderKL",),
    entries=ldm.vae_entries,
    derive=ldm.vae_config,
    config=sd1.VAE.config | {
        "sample_size": 1024, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609,
        "force_upcast": True, "use_quant_conv": False, "use_post_quant_conv": False},
    untold=(*sd1.VAE.untold, "shift_factor"),
    spelling=ldm.vae_spelling,
)

SD3 = FamilyConfig(
    name="sd3",
    parts={"transformer": TRANSFORMER, "text_encoder": TEXT_ENCODER, "text_encoder_2": TEXT_ENCODER_2,
           "text_encoder_3": T5, "vae": VAE},
    optional=("text_encoder_3",),
    scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    pipelines={"": "StableDiffusion3Pipeline"},
    tokenizers={"tokenizer": Words("text_encoder"), "tokenizer_2": Words("text_encoder_2", pad="!"),
                "tokenizer_3": Words("text_encoder_3", pad="<pad>", classes=("T5TokenizerFast", "T5Tokenizer"),
                                     clip=False)},
    index={name: [None, None] for name in ("feature_extractor", "image_encoder", "text_encoder_3", "tokenizer_3")},
)
