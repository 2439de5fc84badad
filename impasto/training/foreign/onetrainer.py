"""The keys of OneTrainer's configs, and what becomes of each. Data only; `onetrainer_rules` joins what is of a piece.

From modules/util/config/TrainConfig.py, ConceptConfig.py and SampleConfig.py. Nested keys are dotted; those of the
one concept that is carried over begin with "concept.", those that all its samples share with "sample.".
"""

from __future__ import annotations

from typing import Any

from impasto.training.foreign.table import Row, flag, named, number, rows, several, text, whole

#: what OneTrainer takes where a file says nothing, as far as it differs from ours or a rule asks
DEFAULTS: dict[str, Any] = {
    "base_model_name": "stable-diffusion-v1-5/stable-diffusion-v1-5", "learning_rate": 3e-6, "epochs": 100,
    "learning_rate_warmup_steps": 200.0, "lora_rank": 16, "lora_alpha": 1.0, "ema_decay": 0.999,
    "ema_update_step_interval": 5, "text_encoder.stop_training_after": 30, "loss_weight_strength": 5.0,
}

#: OneTrainer's model types, as families; of others there is nothing here
FAMILIES_OF = {
    **dict.fromkeys(("STABLE_DIFFUSION_15", "STABLE_DIFFUSION_15_INPAINTING"), "sd1"),
    **dict.fromkeys(("STABLE_DIFFUSION_20", "STABLE_DIFFUSION_20_BASE", "STABLE_DIFFUSION_20_INPAINTING",
                     "STABLE_DIFFUSION_21", "STABLE_DIFFUSION_21_BASE"), "sd2"),
    **dict.fromkeys(("STABLE_DIFFUSION_XL_10_BASE", "STABLE_DIFFUSION_XL_10_BASE_INPAINTING"), "sdxl"),
    **dict.fromkeys(("STABLE_DIFFUSION_3", "STABLE_DIFFUSION_35"), "sd3"),
}
#: those whose denoiser is a transformer; it is told of under the name "unet"
TRANSFORMERS = ("STABLE_DIFFUSION_3", "STABLE_DIFFUSION_35")
METHODS_OF = {"LORA": "lora", "FINE_TUNE": "full", "FINE_TUNE_VAE": "full"}
PEFT = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}

#: layers in the UNet by the name of a preset
LAYERS = {"full": ["all"], "attn-only": ["attention"],
          "attn-mlp": ["attention", "feed-forward", r"\.proj_(?:in|out)$"]}

#: optimizers by their names here; one that a recipe does not take is told of
OPTIMIZERS = {"ADAMW": "adamw", "ADAMW_8BIT": "adamw8bit", "SCHEDULE_FREE_ADAMW": "schedulefree_adamw",
              **{name: name.lower() for name in ("LION", "ADAFACTOR", "PRODIGY", "DADAPT_ADAM", "DADAPT_LION")}}
#: beginnings of the names of optimizers that find the rate by themselves
RATE_FREE = ("PRODIGY", "DADAPT")
SAMPLERS = {"DDIM": "ddim", "EULER": "euler", "EULER_A": "euler_a", "DPMPP": "dpm++2m", "DPMPP_SDE": "dpm++2m_sde",
            "UNIPC": "unipc", "EULER_KARRAS": "euler_karras", "DPMPP_KARRAS": "dpm++2m_karras",
            "DPMPP_SDE_KARRAS": "dpm++2m_sde_karras"}
PRECISIONS = {"float_32": "fp32", "tfloat_32": "fp32", "float_16": "fp16", "bfloat_16": "bf16"}
FORMATS = {"kohya_lora": "kohya", "legacy_lora": "kohya", "safetensors": "auto", "diffusers_lora": "diffusers",
           "diffusers": "diffusers"}

#: switches of what chance does with a picture; how much of it there is at most, another key says
CHANCES = {"enable_random_rotate": "data.rotate", "enable_random_brightness": "data.brightness",
           "enable_random_contrast": "data.contrast", "enable_random_saturation": "data.saturation",
           "enable_random_hue": "data.hue"}

#: older names of keys
RENAMED = {
    **{f"train_{part}": f"{part}.train" for part in ("unet", "text_encoder", "text_encoder_2")},
    **{f"{part}_{key}": f"{part}.{key}" for part in ("unet", "text_encoder", "text_encoder_2", "vae")
       for key in ("learning_rate", "weight_dtype", "model_name")},
    **{f"train_{part}_epochs": f"{part}.stop_training_after" for part in ("unet", "text_encoder", "text_encoder_2")},
    "save_after": "save_every", "save_after_unit": "save_every_unit", "lora_layers": "layer_filter",
    "lora_layer_preset": "layer_filter_preset", "lora_layers_regex": "layer_filter_regex",
    "gradient_checkpointing": "unet.gradient_checkpointing",
}

_NO_SUCH_LOSS = "the loss is one of mse, l1, huber and smooth_l1 (sd-scripts' huber)"
_AS_WRITTEN = "captions keep their letters as they are written"
_PICTURES = "nothing is done to all pictures alike, and the loss counts the whole picture"
_OTHER_PART = "no such part is trained, or it is not one of Stable Diffusion's"

#: what else OneTrainer's optimizers have, with the value that is without effect where that is not None or False
_OF_OPTIMIZERS = """
adam_w_mode alpha amsgrad beta3 bias_correction block_wise=True capturable centered clip_threshold d0 d_coef
dampening decay_rate decouple differentiable eps2 foreach fsdp_in_use fused=True fused_back_pass growth_rate
initial_accumulator_value initial_accumulator is_paged log_every lr_decay max_unorm maximize min_8bit_size=4096
quant_block_size momentum nesterov no_prox optim_bits=32 percentile_clipping=100 r relative_step safeguard_warmup
scale_parameter stochastic_rounding=True use_bias_correction use_triton warmup_init weight_lr_power decoupled_decay
fixed_decay weight_decouple rectify degenerated_to_sgd k xi n_sma_threshold ams_bound adanorm adam_debias slice_p
cautious weight_decay_by_lr=True prodigy_steps use_speed split_groups=True split_groups_mean=True factored=True
factored_fp32=True use_stableadamw=True use_cautious use_grams use_adopt d_limiter=True use_schedulefree=True
use_orthograd nnmf_factor orthogonal_gradient use_atan2 use_AdEMAMix beta3_ema alpha_grad beta1_warmup min_beta1
Simplified_AdEMAMix kourkoutas_beta schedulefree_c ns_steps MuonWithAuxAdam muon_hidden_layers muon_adam_regex
muon_adam_lr muon_te1_adam_lr muon_te2_adam_lr muon_adam_config rms_rescaling=True normuon_variant beta2_normuon
low_rank_ortho ortho_rank accelerated_ns cautious_wd approx_mars auto_kappa_p compile
"""
#: parts of the models that it trains, and what each part has
_PARTS = ("unet text_encoder text_encoder_2 text_encoder_3 text_encoder_4 vae prior transformer "
          "unconditional_transformer effnet_encoder decoder decoder_text_encoder decoder_vqgan").split()
_OF_PARTS = ("model_name include=True train stop_training_after=0 stop_training_after_unit=NEVER learning_rate "
             "weight_dtype dropout_probability train_embedding=True attention_mask guidance_scale=1 "
             "gradient_checkpointing=True offload_fraction activation_offloading").split()

ROWS: dict[str, Row] = {
    **rows(_OTHER_PART, " ".join(f"{part}.{name}" for part in _PARTS for name in _OF_PARTS), needless=True),
    "base_model_name": Row("base.path", text),
    "vae.model_name": Row("base.vae", text),
    "text_encoder_layer_skip": Row("base.clip_skip", whole),
    # pictures
    "concepts": Row("data.folder", text),
    "concept.path": Row("data.folder", text),
    "concept.balancing": Row("train.epochs", number, neutral=(1,)),
    "concept.loss_weight": Row("data.loss_weight", number, neutral=(1,)),
    "concept.image.enable_resolution_override": Row("data.resolution", flag, neutral=(False,)),
    "concept.image.resolution_override": Row(why="it is off", needless=True, neutral=(512,)),
    "concept.text.prompt_path": Row("data.caption", text),
    "concept.text.enable_tag_shuffling": Row("data.shuffle_tags", flag),
    "concept.text.tag_delimiter": Row("data.tag_separator", text, neutral=(",",)),
    "concept.text.keep_tags_count": Row("data.keep_tags", whole),
    "concept.text.tag_dropout_enable": Row("data.tag_dropout", flag, neutral=(False,)),
    "concept.text.tag_dropout_probability": Row("data.tag_dropout", number),
    "concept.image.enable_random_flip": Row("data.flip", flag),
    "concept.image.enable_crop_jitter": Row("data.random_crop", flag, neutral=(False,)),
    **{f"concept.image.{name}": Row(to, flag, neutral=(False,)) for name, to in CHANCES.items()},
    "concept.image.random_rotate_max_angle": Row("data.rotate", number, neutral=(0,)),
    "concept.image.random_brightness_max_strength": Row("data.brightness", number, neutral=(0,)),
    "concept.image.random_contrast_max_strength": Row("data.contrast", number, neutral=(0,)),
    "concept.image.random_saturation_max_strength": Row("data.saturation", number, neutral=(0,)),
    "concept.image.random_hue_max_strength": Row("data.hue", number, neutral=(0,)),
    "concept.image_variations": Row("data.variants", whole),
    "resolution": Row("data.resolution", whole),
    "aspect_ratio_bucketing": Row("data.buckets", flag),
    # what is trained
    "training_method": Row("method.kind", text),
    "peft_type": Row("method.kind", text),
    "lora_rank": Row("method.rank", whole),
    "lora_alpha": Row("method.alpha", number),
    "dropout_probability": Row("method.dropout", number, "OneTrainer drops between the two factors, Impasto before the "
                               "first"),
    "layer_filter": Row("method.targets", text),
    "layer_filter_preset": Row("method.targets", text),
    "layer_filter_regex": Row("method.targets", flag),
    "unet.train": Row("method.targets", flag),
    "text_encoder.train": Row("method.targets", flag),
    # the loop
    "epochs": Row("train.epochs", whole),
    "batch_size": Row("train.batch_size", whole),
    "gradient_accumulation_steps": Row("train.accumulation", whole),
    "learning_rate": Row("train.learning_rate", number),
    "learning_rate_scaler": Row("train.learning_rate", text, neutral=("NONE",)),
    "unet.learning_rate": Row("train.learning_rate", number),
    "text_encoder.learning_rate": Row("method.text_encoder_learning_rate", number),
    "learning_rate_scheduler": Row("train.schedule", named(
        {"constant": "constant", "linear": "linear", "cosine": "cosine"},
        "of OneTrainer's schedules there are CONSTANT, LINEAR, COSINE and COSINE_WITH_HARD_RESTARTS; its REX has a d "
        "of 0.9, the paper's and ours is 0.5")),
    "learning_rate_warmup_steps": Row("train.warmup", whole),
    "optimizer.optimizer": Row("train.optimizer", text),
    "optimizer.beta1": Row("train.betas", several),
    "optimizer.beta2": Row("train.betas", several),
    "optimizer.eps": Row("train.eps", number),
    "optimizer.weight_decay": Row("train.weight_decay", number),
    "clip_grad_norm": Row("train.clip", number),
    "ema": Row("train.ema", text, neutral=("OFF",)),
    "ema_decay": Row("train.ema", number),
    "ema_update_step_interval": Row("train.ema", whole),
    "train_dtype": Row("train.precision", named(PRECISIONS)),
    "train_device": Row("train.device", text),
    "unet.gradient_checkpointing": Row("train.checkpointing", flag),
    "compile": Row("train.compile", flag),
    # the loss
    "mse_strength": Row("objective.loss", number),
    "mae_strength": Row("objective.loss", number),
    "loss_weight_fn": Row("objective.weighting", named({"constant": "none", "min_snr_gamma": "min_snr", "p2": "p2",
                                                        "debiased_estimation": "debiased"})),
    "loss_weight_strength": Row("objective.gamma", number),
    "offset_noise_weight": Row("objective.noise_offset", number),
    "timestep_distribution": Row("objective.times", named({"uniform": "uniform", "logit_normal": "logit_normal",
                                                           "cos_map": "cosmap"}, "Impasto has no such distribution")),
    "noising_bias": Row("objective.times_mean", number),
    "noising_weight": Row("objective.times_std", number),
    "min_noising_strength": Row("objective.times_range", number),
    "max_noising_strength": Row("objective.times_range", number),
    # previews, and what is left behind
    "samples": Row("sample.prompts", list),
    "sample_after": Row("sample.every", whole),
    "sample.negative_prompt": Row("sample.negative", text),
    "sample.seed": Row("sample.seed", whole),
    "sample.diffusion_steps": Row("sample.steps", whole),
    "sample.cfg_scale": Row("sample.guidance", number),
    "sample.noise_scheduler": Row("sample.scheduler", named({k.lower(): v for k, v in SAMPLERS.items()})),
    "workspace_dir": Row("output.dir", text),
    "output_model_destination": Row("output.name", text),
    "output_dtype": Row("output.dtype", named(PRECISIONS)),
    "output_model_format": Row("output.format", named(FORMATS)),
    "save_every": Row("output.save_every", whole),
    "backup_after": Row("output.checkpoint_every", whole),
    "rolling_backup_count": Row("output.keep", whole),

    **rows("tags are left out each by itself, and all alike", "concept.text.tag_dropout_mode=RANDOM "
           "concept.text.tag_dropout_special_tags_mode=NONE concept.text.tag_dropout_special_tags "
           "concept.text.tag_dropout_special_tags_regex", here="data.tag_dropout"),
    **rows(_AS_WRITTEN, "concept.text.caps_randomize_enable concept.text.caps_randomize_probability "
           "concept.text.caps_randomize_lowercase concept.text_variations=1"),
    "concept.text.caps_randomize_mode": Row(why=_AS_WRITTEN, neutral=("capslock, title, first, random",)),
    **rows("captions are beside the pictures, in tables, or one for all", "concept.text.prompt_source=sample",
           here="data.caption"),
    **rows(_PICTURES, "concept.image.enable_fixed_flip concept.image.enable_fixed_rotate "
           "concept.image.enable_fixed_brightness concept.image.enable_fixed_contrast "
           "concept.image.enable_fixed_saturation concept.image.enable_fixed_hue "
           "concept.image.enable_random_circular_mask_shrink concept.image.enable_random_mask_rotate_crop"),
    **rows("each picture comes as often", "concept.balancing_strategy=REPEATS", here="data.repeats"),
    **rows("it is no folder of pictures to learn from", "other_concepts", here="data.folder"),
    "masked_training": Row("data.mask", flag, neutral=(False,)),
    "unmasked_weight": Row("data.mask_floor", number, neutral=(0.1,)),
    "normalize_masked_area_loss": Row("data.mask_normalised", flag, neutral=(False,)),
    **rows("a mask counts in each use of its picture", "unmasked_probability=0.1", here="data.mask"),
    **rows("what lies outside a mask has no target of its own: objective teach keeps whole pictures",
           "masked_prior_preservation_weight custom_conditioning_image", here="objective.kind"),
    **rows(_NO_SUCH_LOSS, "log_cosh_strength huber_strength huber_delta=1 vb_loss_strength=1", here="objective.loss"),
    **rows("the loss is not multiplied", "loss_scaler=NONE"),
    **rows("the noise of OneTrainer's perturbation is in the target too, that of objective.input_perturbation is not",
           "perturbation_noise_weight", here="objective.input_perturbation"),
    **rows("an offset is the same at each noise level", "generalized_offset_noise", here="objective.noise_offset"),
    **rows("the base's own noise schedule and prediction are used", "rescale_noise_scheduler_to_zero_terminal_snr "
           "force_v_prediction force_epsilon_prediction timestep_shift=1 dynamic_timestep_shifting"),
    **rows("how often it restarts", "learning_rate_cycles=1", here="train.restarts"),
    **rows("the rate falls to nought", "learning_rate_min_factor scheduler_params "
           "custom_learning_rate_scheduler", here="train.schedule"),
    **rows("a LoRA begins anew", "lora_model_name"),
    **rows("this version has no such method", "lora_decompose lora_decompose_norm_epsilon=True "
           "lora_decompose_output_axis oft_block_size=32 oft_block_share oft_scaled lokr_dim=16 lokr_decompose_both "
           "lokr_decompose_factor=-1 lokr_use_tucker lokr_weight_decompose lokr_dora_on_output=True lokr_full_matrix "
           "lokr_vec_trick=True", here="method.kind"),
    **rows("no new words are learned", "embedding.* additional_embeddings embedding_learning_rate "
           "preserve_embedding_norm embedding_weight_dtype=FLOAT_32 bundle_additional_embeddings=True"),
    **rows("text encoders train together, to the end", "text_encoder_2.train text_encoder_2.learning_rate "
           "text_encoder_3.train text_encoder_3.learning_rate", here="method.targets"),
    **rows("captions are left out for all text encoders alike", "text_encoder.dropout_probability "
           "text_encoder_2.dropout_probability text_encoder_3.dropout_probability", here="data.caption_dropout"),
    **rows("the UNet trains to the end", "unet.stop_training_after=0 unet.stop_training_after_unit=NEVER"),
    **rows("frozen weights have the precision of the run", "quantization.svd_dtype=NONE quantization.svd_rank=16 "
           "quantization.layer_filter quantization.layer_filter_preset=full quantization.layer_filter_regex "
           "quantization.cache_dir", here="train.precision"),
    **rows("there is no such way to save memory", "unet.offload_fraction unet.activation_offloading "
           "text_encoder.offload_fraction text_encoder.activation_offloading layer_offload_fraction",
           here="train.checkpointing"),
    **rows("a run is one process", "multi_gpu device_indexes gradient_reduce_precision=FLOAT_32_STOCHASTIC "
           "fused_gradient_reduce=True async_gradient_reduce=True async_gradient_reduce_buffer=100"),
    **rows("validation has keys of its own here", "validation validate_after=1 validate_after_unit=EPOCH",
           here="validation.fraction"),
    **rows("previews have one size, a square", "sample.width=512 sample.height=512", here="sample.size"),
    **rows("previews and artifacts come from the beginning", "sample_skip_first save_skip_first"),
    **rows("an artifact is called by output.name", "save_filename_prefix", here="output.name"),
    **rows("it runs here", "cloud.*"),
    **rows("the UNet is as it is", "force_circular_padding"),
    **rows("the optimizer has no such key here", " ".join(f"optimizer.{name}" for name in _OF_OPTIMIZERS.split()),
           here="train.optimizer"),

    **rows("it is what OneTrainer's window remembers", "optimizer_defaults optimizer_defaults.* "
           "sample_definition_file_name concept_file_name concept.name concept.seed concept.enabled=True concept.type "
           "concept.include_subdirectories concept.concept_stats concept.concept_stats.*", needless=True),
    **rows("trained weights are fp32, frozen ones have the precision of the run", "unet.weight_dtype "
           "text_encoder.weight_dtype vae.weight_dtype lora_weight_dtype weight_dtype fallback_train_dtype=BFLOAT_16 "
           "enable_autocast_cache=True", needless=True),
    **rows("what stays as it is gets encoded once and is kept (data.cache)", "latent_caching=True "
           "clear_cache_before_training=True cache_dir only_cache", needless=True),
    **rows("the same command goes on where the run stopped", "continue_last_backup rolling_backup "
           "backup_before_save=True prevent_overwrites backup_after_unit=MINUTE", needless=True),
    **rows("the run's folder holds log, curves, previews and recipe", "debug_mode debug_dir=debug tensorboard=True "
           "tensorboard_expose tensorboard_always_on tensorboard_port=6006 samples_to_tensorboard=True "
           "sample_image_format=JPG sample_video_format=MP4 sample_audio_format=MP3 include_train_config=NONE "
           "non_ema_sampling=True sample_after_unit=MINUTE save_every_unit=NEVER", needless=True),
    **rows("pictures are read ahead by themselves", "dataloader_threads=2 temp_device=cpu async_offloading=True "
           "attention_mechanism=SDP frames=25", needless=True),
    **rows("the base tells it", "model_type", needless=True),
    **rows("nothing is fetched unless base.download says so", "offline_mode huggingface_cache_dir", needless=True),
    **rows("secrets are not for recipes", "secrets.*", needless=True),
    **rows("it is the version of the file", "__version", needless=True),
    **rows(_OTHER_PART, "text_encoder_2_layer_skip text_encoder_3_layer_skip text_encoder_4_layer_skip "
           "text_encoder_sequence_length text_encoder_2_sequence_length", needless=True),
}
