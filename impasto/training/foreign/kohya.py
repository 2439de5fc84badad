"""The keys of kohya's sd-scripts, and what becomes of each. Data only; `kohya_rules` joins what belongs together.

From library/train_util.py, custom_train_functions.py, config_util.py, networks/lora.py and the scripts' own arguments.
Names with a dot are arguments of an argument: `--network_args conv_dim=8` is "network_args.conv_dim".
"""

from __future__ import annotations

from impasto.training.foreign.table import Row, flag, named, number, rows, several, text, whole

#: script -> what it trains, and of which family, where that is not Stable Diffusion 1 or 2
SCRIPTS: dict[str, tuple[str, str]] = {
    "train_network.py": ("lora", ""), "sdxl_train_network.py": ("lora", "sdxl"),
    "sd3_train_network.py": ("lora", "sd3"), "train_db.py": ("dreambooth", ""), "fine_tune.py": ("full", ""),
    "sdxl_train.py": ("full", "sdxl"), "sd3_train.py": ("full", "sd3"),
}
#: scripts of kohya's that train what no method here does
OTHER_SCRIPTS: dict[str, str] = {
    **dict.fromkeys(("train_textual_inversion.py", "sdxl_train_textual_inversion.py", "train_textual_inversion_XTI.py"),
                    "textual inversion"),
    **dict.fromkeys(("train_control_net.py", "train_controlnet.py", "sdxl_train_control_net.py",
                     "sdxl_train_control_net_lllite.py", "flux_train_control_net.py"), "a ControlNet"),
    **dict.fromkeys(("flux_train.py", "flux_train_network.py"), "FLUX"),
    **dict.fromkeys(("lumina_train.py", "lumina_train_network.py"), "Lumina"),
    **dict.fromkeys(("anima_train.py", "anima_train_network.py"), "Anima"),
    "hunyuan_image_train_network.py": "HunyuanImage",
}

#: layers that a kohya LoRA trains in the UNet: attention, feed-forward and the projections around them
TRANSFORMERS = ["attention", "feed-forward", r"\.proj_(?:in|out)$"]
#: the 3x3 convolutions, which have a rank of their own (conv_dim)
CONVOLUTIONS = r"(?:resnets\.\d+\.conv[12]|samplers\.\d+\.conv)$"
#: LyCORIS' presets, as targets in the UNet
PRESETS = {"full": ["all"], "attn-mlp": TRANSFORMERS, "unet-transformer-only": TRANSFORMERS, "attn-only": ["attention"]}
#: kinds of LyCORIS' and kohya's network modules, as ours
ALGORITHMS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr"}
MODULES = {"networks.lora": "lora", "networks.lora_sd3": "lora", "lycoris.kohya": "", "locon.locon_kohya": "lora"}
#: optimizers that find the rate by themselves: their "rate" is no rate for another one
RATE_FREE = ("prodigy", "dadapt")

#: optimizers by their names here: the first one that a recipe takes; if it takes none, that is told of
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw": ("adamw",), "pagedadamw": ("adamw",), "adamw8bit": ("adamw8bit",),
    "pagedadamw8bit": ("paged_adamw8bit", "adamw8bit"), "lion": ("lion",), "lion8bit": ("lion8bit",),
    "adafactor": ("adafactor",), "prodigy": ("prodigy",), "dadaptation": ("dadapt_adam",),
    "dadaptadam": ("dadapt_adam",), "dadaptlion": ("dadapt_lion",), "adamwschedulefree": ("schedulefree_adamw",),
}
SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant",
             **{name: name for name in ("cosine", "linear", "cosine_with_restarts", "polynomial")}}
SAMPLERS = {
    "ddim": "ddim", "pndm": "pndm", "lms": "lms", "k_lms": "lms", "euler": "euler", "k_euler": "euler",
    "euler_a": "euler_a", "k_euler_a": "euler_a", "heun": "heun", "dpmsolver++": "dpm++2m", "dpmsolver": "dpm++2m",
}

_NOT_SO = "tags are shuffled and left out alike from the first step to the last"
_NO_OTHER_SCHEDULE = "of kohya's schedules there are constant, cosine, cosine_with_restarts, linear and polynomial"

ROWS: dict[str, Row] = {
    "pretrained_model_name_or_path": Row("base.path", text),
    "vae": Row("base.vae", text),
    "clip_skip": Row("base.clip_skip", lambda value: max(whole(value) - 1, 0), "kohya counts one more"),
    "v_parameterization": Row("base.prediction", lambda value: "v_prediction" if flag(value) else "epsilon"),
    # pictures
    "train_data_dir": Row("data.folder", text),
    "image_dir": Row("data.folder", text),
    "class_tokens": Row("data.caption", text),
    "num_repeats": Row("data.repeats", whole, neutral=(1,)),
    "dataset_repeats": Row("train.epochs", whole, neutral=(1,)),
    "reg_data_dir": Row("prior.folder", text),
    "reg.image_dir": Row("prior.folder", text),
    "reg.class_tokens": Row("prior.caption", text),
    "prior_loss_weight": Row("prior.weight", number),
    "resolution": Row("data.resolution", whole),
    "enable_bucket": Row("data.buckets", flag),
    "bucket_reso_steps": Row("data.bucket_step", whole),
    "min_bucket_reso": Row("data.bucket_min", whole),
    "max_bucket_reso": Row("data.bucket_max", whole),
    "bucket_no_upscale": Row("data.upscale", lambda value: "never" if flag(value) else "allow"),
    "flip_aug": Row("data.flip", flag),
    "caption_dropout_rate": Row("data.caption_dropout", number),
    "caption_extension": Row("data.caption_source", text),
    "caption_extention": Row("data.caption_source", text),
    "caption_prefix": Row("data.caption_template", text),
    "caption_suffix": Row("data.caption_template", text),
    "shuffle_caption": Row("data.shuffle_tags", flag),
    "keep_tokens": Row("data.keep_tags", whole, neutral=(0,)),
    "keep_tokens_separator": Row("data.keep_tags_separator", text, neutral=("|||",)),
    "caption_separator": Row("data.tag_separator", text, neutral=(",",)),
    "caption_tag_dropout_rate": Row("data.tag_dropout", number),
    "enable_wildcard": Row("data.wildcards", flag),
    "weighted_captions": Row("data.caption_weights", flag),
    # what is trained
    "network_module": Row("method.kind", text),
    "network_args.algo": Row("method.kind", text),
    "network_dim": Row("method.rank", whole),
    "network_alpha": Row("method.alpha", number),
    "network_args.conv_dim": Row("method.ranks", whole),
    "network_args.conv_alpha": Row("method.alphas", number),
    "network_args.preset": Row("method.targets", text),
    "network_dropout": Row("method.dropout", number, "kohya drops between the two factors, Impasto before the first"),
    "network_args.dropout": Row("method.dropout", number, "likewise"),
    "network_args.rs_lora": Row("method.rslora", flag),
    "network_args.dora_wd": Row("method.dora", flag),
    "network_args.wd_on_output": Row("method.dora_axis", lambda value: "output" if flag(value) else "input"),
    "network_args.loraplus_lr_ratio": Row("method.loraplus_ratio", number),
    "network_args.loraplus_unet_lr_ratio": Row("method.loraplus_ratio", number),
    "network_args.loraplus_text_encoder_lr_ratio": Row("method.text_encoder_loraplus_ratio", number),
    **dict.fromkeys(("network_args.use_tucker", "network_args.use_conv_cp", "network_args.use_cp"),
                    Row("method.tucker", flag)),
    "network_args.factor": Row("method.factor", whole, neutral=(-1,)),
    "network_args.decompose_both": Row("method.decompose_both", flag),
    "network_args.full_matrix": Row("method.full", flag),
    "network_weights": Row("method.warm_start", text),
    "scale_weight_norms": Row("method.max_norm", number, neutral=(0,)),
    "base_weights": Row("base.adapters", text),
    "base_weights_multiplier": Row("base.adapters", several),
    "network_train_unet_only": Row("method.targets", flag),
    "network_train_text_encoder_only": Row("method.targets", flag),
    "train_text_encoder": Row("method.parts", flag),
    "stop_text_encoder_training": Row("method.parts", whole),
    # the loop
    "train_batch_size": Row("train.batch_size", whole),
    "gradient_accumulation_steps": Row("train.accumulation", whole),
    "max_train_steps": Row("train.steps", whole),
    "max_train_epochs": Row("train.epochs", whole),
    "learning_rate": Row("train.learning_rate", number),
    "unet_lr": Row("train.learning_rate", number),
    **dict.fromkeys(("text_encoder_lr", "learning_rate_te", "learning_rate_te1", "learning_rate_te2",
                     "learning_rate_te3"), Row("method.text_encoder_learning_rate", number)),
    "optimizer_type": Row("train.optimizer", text),
    "use_8bit_adam": Row("train.optimizer", flag),
    "use_lion_optimizer": Row("train.optimizer", flag),
    "optimizer_args.weight_decay": Row("train.weight_decay", number),
    "optimizer_args.betas": Row("train.betas", several),
    "optimizer_args.eps": Row("train.eps", number),
    "lr_scheduler": Row("train.schedule", named(SCHEDULES, _NO_OTHER_SCHEDULE)),
    "lr_scheduler_num_cycles": Row("train.restarts", whole, neutral=(1,)),
    "lr_scheduler_power": Row("train.power", number, neutral=(1,)),
    "lr_warmup_steps": Row("train.warmup", whole),
    "max_grad_norm": Row("train.clip", number),
    "mixed_precision": Row("train.precision", named({"no": "fp32", "fp16": "fp16", "bf16": "bf16"})),
    "gradient_checkpointing": Row("train.checkpointing", flag),
    "torch_compile": Row("train.compile", flag),
    "seed": Row("train.seed", whole),
    # the loss
    "loss_type": Row("objective.loss", named({"l2": "mse", "l1": "l1", "huber": "huber", "smooth_l1": "smooth_l1"})),
    "huber_schedule": Row("objective.huber_schedule", text),
    "huber_c": Row("objective.huber_c", number),
    "min_snr_gamma": Row("objective.weighting", number),
    "debiased_estimation_loss": Row("objective.weighting", flag),
    "noise_offset": Row("objective.noise_offset", number),
    "multires_noise_iterations": Row("objective.pyramid_discount", whole),
    "multires_noise_discount": Row("objective.pyramid_discount", number),
    "ip_noise_gamma": Row("objective.input_perturbation", number),
    "min_timestep": Row("objective.times_range", whole),
    "max_timestep": Row("objective.times_range", whole),
    "weighting_scheme": Row("objective.times", named({"uniform": "uniform", "none": "uniform", "mode": "mode",
                                                      "logit_normal": "logit_normal", "cosmap": "cosmap"})),
    "logit_mean": Row("objective.times_mean", number),
    "logit_std": Row("objective.times_std", number),
    "mode_scale": Row("objective.mode_scale", number),
    # validation
    "validation_split": Row("validation.fraction", number, neutral=(0,)),
    "validate_every_n_steps": Row("validation.every", whole),
    # previews
    "sample_every_n_steps": Row("sample.every", whole),
    "sample_prompts": Row("sample.prompts", text),
    "sample_sampler": Row("sample.scheduler", named(SAMPLERS)),
    # what is left behind
    "output_dir": Row("output.dir", text),
    "output_name": Row("output.name", text),
    "log_with": Row("output.trackers", named({"wandb": ["wandb"], "all": ["wandb"]}, "TensorBoard's curves are always "
                                             "kept, and wandb is the only other tracker"), neutral=("tensorboard",)),
    "huggingface_repo_id": Row("output.push_to", text),
    "huggingface_repo_visibility": Row("output.push_private", lambda value: text(value).lower() != "public"),
    "save_every_n_steps": Row("output.save_every", whole),
    "save_every_n_epochs": Row("output.save_every_epochs", whole),
    "save_precision": Row("output.dtype", named({"float": "fp32", "fp16": "fp16", "bf16": "bf16"})),
    "save_model_as": Row("output.format", text),
    "no_metadata": Row("output.metadata", lambda value: "none" if flag(value) else "full"),

    **rows(_NOT_SO, "token_warmup_min=1 token_warmup_step", here="data.tag_dropout"),
    **rows("there is one separator of tags", "secondary_separator", here="data.tag_separator"),
    **rows("pictures have no attributes beside their captions", "custom_attributes"),
    **rows("captions are left out by chance, not by epochs", "caption_dropout_every_n_epochs",
           here="data.caption_dropout"),
    **rows("lay it into the folder of pictures: a merged .json there is found", "in_json metadata_file",
           here="data.caption_source"),
    "random_crop": Row("data.random_crop", flag),
    **rows("its changes of hue and gamma are other ones", "color_aug", here="data.hue"),
    **rows("nobody looks for faces", "face_crop_aug_range", here="data.random_crop"),
    **rows("pictures are resized by Lanczos' filter", "resize_interpolation=lanczos"),
    "alpha_mask": Row("data.mask", flag, neutral=(False,)),
    "masked_loss": Row("data.mask", flag, neutral=(False,)),
    "conditioning_data_dir": Row("data.masks", text),
    **rows("a recipe has one folder of class pictures, and one way to treat them: put all of them under it",
           "datasets.*", here="prior.folder"),
    **rows("class pictures are treated like the others", "reg.*"),
    **rows("it is a variable of the shell's, and the file does not set it", "variables.*"),
    **rows("the file cannot be seen from here: give it as a second one", "config_file dataset_config"),
    **rows("each class picture is used as often as it comes", "reg.num_repeats=1"),
    **rows("say the rank of that file", "dim_from_weights", here="method.rank"),
    **rows("a LoRA has no such key here", "network_args.rank_dropout network_args.module_dropout "
           "network_args.disable_conv_cp=True network_args.use_scalar network_args.train_norm "
           "network_args.block_size=4 network_args.constraint network_args.rescaled network_args.bypass_mode "
           "network_args.unbalanced_factorization network_args.unit"),
    **rows("blocks are told apart by patterns: method.ranks and method.alphas", "network_args.block_dims "
           "network_args.block_alphas network_args.conv_block_dims network_args.conv_block_alphas",
           here="method.ranks"),
    **rows("all blocks have one rate", "block_lr network_args.down_lr_weight network_args.mid_lr_weight "
           "network_args.up_lr_weight network_args.block_lr_zero_threshold", here="train.learning_rate"),
    **rows("the optimizer has no such key here", "optimizer_args.*", here="train.optimizer"),
    **rows(_NO_OTHER_SCHEDULE, "lr_scheduler_type lr_scheduler_args "
           "lr_decay_steps lr_scheduler_timescale lr_scheduler_min_lr_ratio", here="train.schedule"),
    **rows("a noise offset is the same for every picture", "noise_offset_random_strength adaptive_noise_scale",
           here="objective.noise_offset"),
    **rows("a perturbation is as strong for every picture", "ip_noise_gamma_random_strength",
           here="objective.input_perturbation"),
    **rows("the base's own noise schedule is used", "zero_terminal_snr training_shift=1"),
    **rows("there is no such weight of the loss", "scale_v_pred_loss_like_noise_pred v_pred_like_loss huber_scale=1 "
           "network_multiplier=1", here="objective.weighting"),
    **rows("trained weights are always fp32", "full_fp16 full_bf16 fp16_master_weights_and_gradients",
           here="train.precision"),
    **rows("frozen weights have the precision of the run", "fp8_base fp8_base_unet", here="train.precision"),
    **rows("there is no such way to save memory", "fused_backward_pass fused_optimizer_groups blocks_to_swap "
           "blockwise_fused_optimizers cpu_offload_checkpointing", here="train.checkpointing"),
    **rows("a run is one process", "accelerate.multi_gpu accelerate.num_processes=1 accelerate.num_machines=1 "
           "deepspeed zero_stage=2 offload_optimizer_device offload_optimizer_nvme_path offload_param_device "
           "offload_param_nvme_path zero3_init_flag zero3_save_16bit_model ddp_timeout ddp_gradient_as_bucket_view "
           "ddp_static_graph"),
    **rows("compilation is torch's own (inductor)", "dynamo_backend=inductor", here="train.compile"),
    **rows("which pictures are held out follows from train.seed", "validation_seed", here="train.seed"),
    **rows("validations come by steps, on all held-out pictures", "validate_every_n_epochs max_validation_steps",
           here="validation.every"),
    **rows("previews come by steps", "sample_every_n_epochs", here="sample.every"),
    **rows("artifacts come by steps or epochs", "save_n_epoch_ratio", here="output.save_every_epochs"),
    **rows("every artifact is kept", "save_last_n_epochs save_last_n_steps"),
    **rows("checkpoints come by steps, and the newest ones are kept",
           "save_last_n_epochs_state save_last_n_steps_state", here="output.keep"),
    **rows("a run begins at its beginning", "initial_epoch initial_step skip_until_initial_step"),
    **rows("the artifact goes to a repository of models, its files at the top", "huggingface_repo_type=model "
           "huggingface_path_in_repo", here="output.push_to"),
    **rows("checkpoints stay in the run's folder", "save_state_to_huggingface resume_from_huggingface"),
    **rows("the token is the environment's: HF_TOKEN, or hf auth login", "huggingface_token"),
    **rows("the artifact is pushed when the run has ended", "async_upload"),
    **rows("wandb goes by its own variables: WANDB_NAME, WANDB_PROJECT, WANDB_API_KEY", "wandb_run_name "
           "wandb_api_key log_tracker_name log_tracker_config", here="output.trackers"),
    **rows("an artifact's metadata are its recipe", "metadata_title metadata_author metadata_description "
           "metadata_license metadata_tags metadata_usage_hint metadata_thumbnail metadata_merged_from "
           "metadata_trigger_phrase metadata_preprocessor metadata_is_negative_embedding training_comment"),
    **rows("it is about Stable Diffusion 3", "clip_l clip_g t5xxl train_t5xxl use_t5xxl_cache_only "
           "num_last_block_to_freeze save_clip save_t5xxl t5xxl_device t5xxl_dtype "
           "t5xxl_max_token_length=256 apply_lg_attn_mask apply_t5_attn_mask clip_l_dropout_rate clip_g_dropout_rate "
           "t5_dropout_rate pos_emb_random_crop_rate enable_scaled_pos_embed"),
    **rows("captions are padded to the encoder's length", "no_token_padding"),
    **rows("no new words are learned", "token_string init_word num_vectors_per_token=1 weights use_object_template "
           "use_style_template"),
    **rows("it loads code of its own", "dataset_class"),
    **rows("nothing would be trained", "debug_dataset"),

    **rows("attention is torch's own, which saves the same memory", "xformers diffusers_xformers sdpa mem_eff_attn",
           needless=True),
    **rows("what stays as it is gets encoded once and is kept (data.cache)", "cache_latents cache_latents_to_disk "
           "cache_text_encoder_outputs cache_text_encoder_outputs_to_disk vae_batch_size=1 text_encoder_batch_size "
           "skip_cache_check skip_latents_validity_check cache_info", needless=True),
    **rows("pictures are read ahead by themselves", "max_data_loader_n_workers persistent_data_loader_workers "
           "lowram highvram disable_mmap_load_safetensors", needless=True),
    **rows("the VAE's precision is chosen by itself", "no_half_vae", needless=True),
    **rows("the same command goes on where the run stopped", "save_state save_state_on_train_end resume",
           needless=True),
    **rows("it is for accelerate, which launches kohya's scripts", "accelerate.*", needless=True),
    **rows("the base tells it", "v2", needless=True),
    **rows("captions may have any length", "max_token_length", needless=True),
    **rows("tokenizers are in the package", "tokenizer_cache_dir", needless=True),
    **rows("artifacts are safetensors", "use_safetensors", needless=True),
    **rows("the first preview comes before the first step", "sample_at_first", needless=True),
    **rows("the run's folder holds log, curves and recipe", "logging_dir log_prefix log_config console_log_level "
           "console_log_file console_log_simple output_config", needless=True),
}
