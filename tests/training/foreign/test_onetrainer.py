"""Made-up configs of OneTrainer, key by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from impasto.core.errors import UserError
from impasto.training.foreign import import_recipe
from impasto.training.foreign.engine import Imported
from tests.training.foreign.importing import became, checked, fate, imported, reason

LAYERS = ["attention", "feed-forward", r"\.proj_(?:in|out)$"]

CONFIG: dict[str, Any] = {
    "__version": 10, "training_method": "LORA", "model_type": "STABLE_DIFFUSION_15",
    "base_model_name": "models/v1-5.ckpt", "debug_mode": False, "debug_dir": "debug",
    "workspace_dir": "workspace/dog", "cache_dir": "workspace-cache/dog",
    "tensorboard": True, "validation": False, "continue_last_backup": False, "multi_gpu": False,
    "output_dtype": "BFLOAT_16", "output_model_format": "KOHYA_LORA",
    "output_model_destination": "models\\dog.safetensors",
    "concept_file_name": "training_concepts/concepts.json", "concepts": None, "aspect_ratio_bucketing": True,
    "latent_caching": True, "learning_rate_scheduler": "COSINE", "learning_rate": 3e-4,
    "learning_rate_warmup_steps": 100, "learning_rate_cycles": 1.0, "learning_rate_min_factor": 0.1, "epochs": 20,
    "batch_size": 4, "gradient_accumulation_steps": 2, "ema": "GPU", "ema_decay": 0.99, "ema_update_step_interval": 2,
    "dataloader_threads": 2, "train_device": "cuda", "temp_device": "cpu", "train_dtype": "BFLOAT_16",
    "fallback_train_dtype": "BFLOAT_16", "resolution": "768", "mse_strength": 1.0, "mae_strength": 0.0,
    "huber_strength": 0.5, "loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": 5.0, "dropout_probability": 0.1,
    "loss_scaler": "NONE", "learning_rate_scaler": "BATCH", "clip_grad_norm": 0.5, "layer_filter": "attentions",
    "layer_filter_preset": "attn-mlp", "layer_filter_regex": False, "offset_noise_weight": 0.05,
    "perturbation_noise_weight": 0.1, "timestep_distribution": "LOGIT_NORMAL", "noising_weight": 0.5,
    "noising_bias": -0.2, "min_noising_strength": 0.1, "max_noising_strength": 0.8, "timestep_shift": 1.0,
    "unet": {"train": True, "learning_rate": 2e-4, "weight_dtype": "FLOAT_16", "gradient_checkpointing": False,
             "stop_training_after": 0, "stop_training_after_unit": "NEVER", "offload_fraction": 0.0, "sparkle": 1},
    "prior": {"train": True, "weight_dtype": "FLOAT_32"},
    "text_encoder": {"train": True, "learning_rate": 1e-5, "stop_training_after": 10,
                     "stop_training_after_unit": "EPOCH", "dropout_probability": 0.05},
    "text_encoder_layer_skip": 1, "vae": {"model_name": "vae.pt", "weight_dtype": "FLOAT_32"},
    "masked_training": True, "unmasked_weight": 0.1, "embedding": {"placeholder": "<embedding>", "token_count": 1},
    "peft_type": "LORA", "lora_rank": 8, "lora_alpha": 4.0, "lora_decompose": True,
    "optimizer": {"optimizer": "ADAMW_8BIT", "beta1": 0.8, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.02,
                  "fused": True, "amsgrad": False, "cautious": True, "stochastic_rounding": True},
    "optimizer_defaults": {"ADAMW": {"optimizer": "ADAMW", "beta1": 0.9}},
    "sample_definition_file_name": "training_samples/samples.json", "samples": None, "sample_after": 50,
    "sample_after_unit": "STEP", "backup_after": 30, "backup_after_unit": "MINUTE", "rolling_backup": True,
    "rolling_backup_count": 3, "save_every": 5, "save_every_unit": "EPOCH",
    "secrets": {"huggingface_token": "hunter2", "cloud": {"api_key": ""}},
    "cloud": {"enabled": False, "type": "RUNPOD"}, "wizardry": 7,
}
CONCEPTS = [
    {"name": "off", "path": "old", "enabled": False},
    {"name": "dog", "path": "pictures/dog", "enabled": True, "type": "STANDARD", "balancing": 10.0,
     "balancing_strategy": "REPEATS", "loss_weight": 1.0, "seed": 5, "include_subdirectories": False,
     "image": {"enable_crop_jitter": True, "enable_random_flip": True, "enable_random_hue": False,
               "random_hue_max_strength": 0.0},
     "text": {"prompt_source": "sample", "prompt_path": "", "enable_tag_shuffling": True, "tag_delimiter": ",",
              "keep_tags_count": 1}, "concept_stats": {"image_count": 12}},
    {"name": "cat", "path": "pictures/cat", "type": "STANDARD", "balancing": 2.5, "loss_weight": 0.5,
     "image": {"enable_resolution_override": True, "resolution_override": "640", "enable_fixed_hue": True,
               "enable_random_rotate": True, "random_rotate_max_angle": 5.0}, "image_variations": 1},
    {"name": "check", "path": "pictures/check", "type": "VALIDATION"},
]
SAMPLES = [
    {"prompt": "a dog", "negative_prompt": "ugly", "width": 512, "height": 512, "seed": 1, "diffusion_steps": 20,
     "cfg_scale": 7.0, "noise_scheduler": "EULER_A", "enabled": True},
    {"prompt": "a cat", "negative_prompt": "ugly", "width": 512, "height": 512, "seed": 2, "diffusion_steps": 20,
     "cfg_scale": 6.0, "noise_scheduler": "EULER_A", "enabled": True},
    {"prompt": "a cow", "enabled": False},
]

WANTED = {
    "validation.fraction": 0.0,
    "base.path": "models/v1-5.ckpt", "base.vae": "vae.pt", "base.clip_skip": 1,
    "data.0.folder": "pictures/dog", "data.0.shuffle_tags": True, "data.0.keep_tags": 1, "data.0.flip": True,
    **{f"data.{i}.{key}": value for i in (0, 1) for key, value in {
        "mask": "files", "mask_floor": 0.1, "missing_masks": "whole"}.items()},
    "data.0.resolution": 768, "data.0.buckets": True, "data.0.repeats": 10,
    "data.0.random_crop": True, "data.1.rotate": 5.0, "data.1.variants": 1,
    "data.1.folder": "pictures/cat", "data.1.resolution": 640, "data.1.buckets": True, "data.1.loss_weight": 0.5,
    "method.kind": "lora", "method.rank": 8, "method.alpha": 4.0, "method.dropout": 0.1,
    "method.targets": [*LAYERS, "text-encoder"], "method.text_encoder_learning_rate": 2e-5,
    "objective.weighting": "min_snr", "objective.gamma": 5.0, "objective.noise_offset": 0.05,
    "objective.times": "logit_normal", "objective.times_std": 1.5, "objective.times_mean": -0.2,
    "objective.times_range": [0.1, 0.8],
    "train.learning_rate": 4e-4, "train.schedule": "cosine", "train.warmup": 50, "train.epochs": 20,
    "train.batch_size": 4, "train.accumulation": 2, "train.ema": 0.99 ** 0.5, "train.device": "cuda",
    "train.precision": "bf16", "train.clip": 0.5, "train.checkpointing": False, "train.optimizer": "adamw8bit",
    "train.betas": [0.8, 0.99], "train.eps": 1e-6, "train.weight_decay": 0.02,
    "sample.prompts": ["a dog", "a cat"], "sample.negative": "ugly", "sample.steps": 20, "sample.scheduler": "euler_a",
    "sample.every": 50,
    "output.dir": "workspace/dog", "output.name": "dog", "output.dtype": "bf16", "output.format": "kohya",
    "output.save_every_epochs": 5, "output.keep": 3,
}
FATES = {
    "lost": ["learning_rate_min_factor", "huber_strength", "perturbation_noise_weight",
             "lora_decompose", "text_encoder.stop_training_after", "text_encoder.dropout_probability",
             "optimizer.cautious", "backup_after", "other_concepts",
             "embedding.placeholder"],
    "needless": ["__version", "model_type", "cache_dir", "unet.weight_dtype", "prior.train", "learning_rate",
                 "optimizer_defaults.ADAMW.beta1", "concept.name", "concept.concept_stats.image_count",
                 "secrets.huggingface_token"],
    "without effect": ["debug_mode", "loss_scaler", "optimizer.fused", "optimizer.amsgrad",
                       "sample.width", "timestep_shift", "concept.image.random_hue_max_strength"],
    "unknown": ["wizardry", "unet.sparkle"],
}


def config(folder: Path, **settings: Any) -> Imported:
    """What becomes of a small config."""
    small = {"training_method": "LORA", "model_type": "STABLE_DIFFUSION_15", "base_model_name": "a.ckpt"}
    return imported(folder, json.dumps(small | settings), "config.json")


@pytest.mark.parametrize("way", ["inside", "beside", "given"])
def test_a_whole_config_key_by_key(way: str, tmp_path: Path) -> None:
    config_file, elsewhere = tmp_path / "config.json", tmp_path / ("here" if way == "given" else ".")
    elsewhere.mkdir(exist_ok=True)
    inside = {"concepts": CONCEPTS, "samples": SAMPLES} if way == "inside" else {}
    config_file.write_text(json.dumps(CONFIG | inside))
    paths = [config_file]
    if way != "inside":
        (elsewhere / "concepts.json").write_text(json.dumps(CONCEPTS))
        (elsewhere / "samples.json").write_text(json.dumps(SAMPLES))
        paths += [elsewhere / "samples.json", elsewhere / "concepts.json"] if way == "given" else []
    found = checked(tmp_path, import_recipe(paths))
    rates = {key: pytest.approx(WANTED[key]) for key in ("train.learning_rate", "method.text_encoder_learning_rate")}
    assert became(found) == WANTED | rates
    for expected, names in FATES.items():
        for name in names:
            assert fate(found, name) == expected, name
    assert "hunter2" not in found.toml() + str(found.plain())
    assert next(left.value for left in found.lost if left.key == "other_concepts") == ["pictures/check (validation)"]
    (part,) = [left for left in found.lost if left.key == "concepts.2.balancing"]
    assert (part.here, part.instead) == ("data.1.repeats", 1)
    assert fate(found, "concepts.2.image.enable_fixed_hue") == "lost"
    assert len(found.files) == (1 if way == "inside" else 3)


def test_what_the_file_does_not_say_is_onetrainers_default(tmp_path: Path) -> None:
    found = config(tmp_path)
    assert became(found) == {
        "validation.fraction": 0.0,
        "base.path": "a.ckpt", "data.folder": "photos", "method.kind": "lora", "method.rank": 16, "method.alpha": 1.0,
        "method.targets": ["all", "text-encoder"], "train.learning_rate": 3e-6, "train.epochs": 100,
        "train.warmup": 200, "train.checkpointing": True}
    assert list(found.to_fill_in) == ["data.folder"]
    assert "stops after 30" in reason(found, "text_encoder.stop_training_after")


@pytest.mark.parametrize(("settings", "wanted"), [
    ({"unet": {"train": False}}, {"method.targets": ["text-encoder"], "train.learning_rate": 3e-6}),
    ({"unet": {"train": False}, "text_encoder": {"learning_rate": 1e-5}}, {"train.learning_rate": 1e-5}),
    ({"text_encoder": {"train": False, "learning_rate": 1e-5}}, {"method.targets": ["all"],
                                                                 "method.text_encoder_learning_rate": None}),
    ({"layer_filter_preset": "attn-only"}, {"method.targets": ["attention", "text-encoder"]}),
    ({"layer_filter_preset": "custom", "layer_filter": "attn2, mid_block"},
     {"method.targets": [r"^unet\..*(?:attn2)", r"^unet\..*(?:mid_block)", "text-encoder"]}),
    ({"layer_filter_preset": "custom", "layer_filter": "to_[kv]$", "layer_filter_regex": True},
     {"method.targets": [r"^unet\..*(?:to_[kv]$)", "text-encoder"]}),
    ({"training_method": "FINE_TUNE"}, {"method.kind": "full", "method.parts": ["unet", "text-encoder"]}),
    ({"training_method": "FINE_TUNE", "text_encoder": {"train": False}}, {"method.parts": ["unet"]}),
    ({"training_method": "FINE_TUNE_VAE"}, {"method.parts": ["vae-decoder"], "objective.kind": "reconstruct"}),
    ({"learning_rate": 1e-4, "learning_rate_scaler": "BOTH", "batch_size": 2, "gradient_accumulation_steps": 2},
     {"train.learning_rate": 2e-4}),
    ({"mse_strength": 0, "mae_strength": 1}, {"objective.loss": "l1"}),
    ({"loss_weight_fn": "P2", "loss_weight_strength": 1.0}, {"objective.weighting": "p2", "objective.gamma": 1.0}),
    ({"loss_weight_fn": "MIN_SNR_GAMMA"}, {"objective.gamma": 5.0}),
    ({"loss_weight_fn": "DEBIASED_ESTIMATION", "loss_weight_strength": 5.0}, {"objective.weighting": "debiased",
                                                                             "objective.gamma": None}),
    ({"resolution": "512,768"}, {"data.resolutions": [512, 768], "data.resolution": None}),
    ({"resolution": "512x768"}, {"data.resolution": 640}),
    ({"concepts": [{"path": "a", "image_variations": 4, "image": {
        "enable_random_hue": True, "random_hue_max_strength": 0.2, "enable_random_contrast": False,
        "random_contrast_max_strength": 0.5, "enable_random_brightness": True,
        "random_brightness_max_strength": 0.1}}]},
     {"data.hue": 0.1, "data.contrast": None, "data.brightness": 0.1, "data.variants": 4}),
    ({"concepts": [{"path": "a", "image_variations": 4, "image": {"enable_random_hue": True}}]},
     {"data.hue": None, "data.variants": None}),
    ({"resolution": "640x640"}, {"data.resolution": 640}),
    ({"masked_training": True, "unmasked_weight": 0.3, "normalize_masked_area_loss": True}, {
        "data.mask": "files", "data.mask_floor": 0.3, "data.mask_normalised": True, "data.missing_masks": "whole"}),
    ({"masked_training": False, "unmasked_weight": 0.3}, {"data.mask": None, "data.mask_floor": None}),
    ({"masked_training": True, "training_method": "FINE_TUNE_VAE"}, {"data.mask": None}),
    ({"sample_after_unit": "NEVER", "sample_after": 10}, {"sample.every": 0}),
    ({"backup_after": 200, "backup_after_unit": "STEP"}, {"output.checkpoint_every": 200}),
    ({"save_every": 300, "save_every_unit": "STEP"}, {"output.save_every": 300}),
    ({"learning_rate_warmup_steps": 0}, {"train.warmup": 0}),
    ({"learning_rate_warmup_steps": 0.1}, {"train.warmup": 0.1}),
    ({"learning_rate_scheduler": "COSINE_WITH_HARD_RESTARTS", "learning_rate_cycles": 3.0},
     {"train.schedule": "cosine_with_restarts", "train.restarts": 3}),
    ({"learning_rate_scheduler": "COSINE_WITH_HARD_RESTARTS"}, {"train.schedule": "cosine"}),
    ({"learning_rate_scheduler": "COSINE_WITH_RESTARTS", "learning_rate_cycles": 0.5}, {"train.schedule": "cosine"}),
    ({"optimizer": {"optimizer": "PRODIGY", "d_coef": 2.0, "use_bias_correction": False, "slice_p": None}},
     {"train.optimizer": "prodigy", "train.optimizer_options": {"d_coef": 2.0, "use_bias_correction": False}}),
    # older names
    ({"optimizer": "ADAMW_8BIT", "optimizer_weight_decay": 0.5}, {"train.optimizer": "adamw8bit",
                                                                   "train.weight_decay": 0.5}),
    ({"train_text_encoder": False, "unet_learning_rate": 1e-5}, {"method.targets": ["all"],
                                                                 "train.learning_rate": 1e-5}),
    ({"min_snr_gamma": 3.0}, {"objective.weighting": "min_snr", "objective.gamma": 3.0}),
    ({"gradient_checkpointing": "OFF"}, {"train.checkpointing": False}),
    ({"gradient_checkpointing": "CPU_OFFLOADED"}, {"train.checkpointing": True}),
    ({"lora_layer_preset": "attn-only"}, {"method.targets": ["attention", "text-encoder"]}),
    ({"model_type": "STABLE_DIFFUSION_3", "transformer": {"learning_rate": 1e-5}}, {"train.learning_rate": 1e-5}),
])
def test_values_that_mean_something_else(settings: dict[str, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    keys = became(config(tmp_path, **settings))
    assert {key: keys.get(key) for key in wanted} == wanted


@pytest.mark.parametrize(("settings", "key", "here"), [
    ({"optimizer": {"optimizer": "YOGI"}}, "optimizer.optimizer", "train.optimizer"),
    ({"learning_rate_scheduler": "REX"}, "learning_rate_scheduler", "train.schedule"),
    ({"learning_rate_warmup_steps": 1}, "learning_rate_warmup_steps", "train.warmup"),
    ({"learning_rate_scheduler": "COSINE_WITH_RESTARTS", "learning_rate_cycles": 2.0}, "learning_rate_scheduler",
     "train.schedule"),
    ({"learning_rate_scheduler": "COSINE_WITH_HARD_RESTARTS", "learning_rate_cycles": 2.5}, "learning_rate_cycles",
     "train.schedule"),
    ({"peft_type": "OFT_2"}, "peft_type", "method.kind"),
    ({"output_model_format": "INTERNAL"}, "output_model_format", "output.format"),
    ({"training_method": "FINE_TUNE", "layer_filter_preset": "attn-mlp"}, "layer_filter_preset", "method.parts"),
    ({"layer_filter_preset": "custom", "layer_filter": "^down", "layer_filter_regex": True}, "layer_filter",
     "method.targets"),
    ({"mse_strength": 1, "mae_strength": 1}, "mae_strength", "objective.loss"),
    ({"timestep_distribution": "SIGMOID", "noising_weight": 3.0}, "noising_weight", "objective.times"),
    ({"timestep_distribution": "SIGMOID"}, "timestep_distribution", "objective.times"),
    ({"sample_after": 3, "sample_after_unit": "EPOCH"}, "sample_after", "sample.every"),
    ({"batch_size": "many"}, "batch_size", "train.batch_size"),
    ({"epochs": -1}, "epochs", "train.epochs"),
    ({"concepts": [{"path": "a", "balancing": 0.5}]}, "concept.balancing", "train.epochs"),
    ({"concepts": [{"path": "a", "text": {"prompt_source": "filename"}}]}, "concept.text.prompt_source",
     "data.caption"),
    ({"concepts": [{"path": "a", "text": {"prompt_source": "concept", "prompt_path": "nowhere.txt"}}]},
     "concept.text.prompt_source", "data.caption"),
    ({"concepts": 3}, "other_concepts", "data.folder"),
])
def test_what_is_not_carried_names_what_stands_in_its_place(settings, key, here, tmp_path: Path) -> None:
    found = config(tmp_path, **settings)
    left = next(left for left in found.lost if left.key == key)
    assert left.here == here and left.why


def test_the_rate_of_an_optimizer_that_finds_it_is_no_rate_for_another(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("impasto.training.foreign.onetrainer_rules.accepts", lambda key, value: False)
    found = config(tmp_path, optimizer={"optimizer": "PRODIGY", "d_coef": 1.0}, learning_rate=1.0)
    assert "train.learning_rate" not in became(found)
    assert {"optimizer.optimizer", "optimizer.d_coef", "learning_rate"} <= {left.key for left in found.lost}


def test_the_caption_of_a_concept(tmp_path: Path) -> None:
    (tmp_path / "dog.txt").write_text("a photo of sks dog\n")
    text = {"prompt_source": "concept", "prompt_path": str(tmp_path / "dog.txt")}
    assert became(config(tmp_path, concepts=[{"path": "a", "text": text}]))["data.caption"] == "a photo of sks dog"


@pytest.mark.parametrize(("text", "wanted", "lost"), [
    ({"enable_tag_shuffling": True}, {"shuffle_tags": True, "keep_tags": 1}, []),
    ({"enable_tag_shuffling": True, "keep_tags_count": 3, "tag_delimiter": ";"},
     {"shuffle_tags": True, "keep_tags": 3, "tag_separator": ";"}, []),
    ({"tag_dropout_special_tags": "hat", "keep_tags_count": 3, "tag_dropout_enable": False,
      "tag_dropout_mode": "RANDOM", "tag_dropout_probability": 0.5}, {}, []),
    ({"tag_dropout_enable": True, "tag_dropout_mode": "RANDOM", "tag_dropout_probability": 0.2, "keep_tags_count": 2},
     {"tag_dropout": 0.2, "keep_tags": 2}, []),
    ({"tag_dropout_enable": True, "tag_dropout_mode": "FULL", "tag_dropout_probability": 0.2}, {},
     ["concept.text.tag_dropout_enable"]),
    ({"tag_dropout_enable": True, "tag_dropout_mode": "RANDOM", "tag_dropout_special_tags_mode": "BLACKLIST"},
     {"tag_dropout": 0.0, "keep_tags": 1}, ["concept.text.tag_dropout_special_tags_mode"]),
])
def test_tags_of_a_concept(text: dict[str, Any], wanted: dict[str, Any], lost: list[str], tmp_path: Path) -> None:
    found = config(tmp_path, concepts=[{"path": "a", "text": text}])
    assert {key[5:]: value for key, value in became(found).items() if "tag" in key} == wanted
    assert [left.key for left in found.lost if "concept" in left.key] == lost


def test_a_text_encoder_that_never_stops_is_not_told_of(tmp_path: Path) -> None:
    for settings in ({"text_encoder": {"stop_training_after_unit": "NEVER"}}, {"epochs": 30},
                     {"text_encoder": {"train": False}}):
        assert fate(config(tmp_path, **settings), "text_encoder.stop_training_after") != "lost"


def test_a_hub_id_and_a_family_that_is_not_there_are_noted(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("impasto.training.foreign.onetrainer_rules.FAMILIES", {"sd1": ""})
    found = config(tmp_path, model_type="STABLE_DIFFUSION_XL_10_BASE", base_model_name="stabilityai/sdxl")
    assert any("is for sdxl, which this version" in note for note in found.notes)
    assert any("base.download" in note for note in found.notes)


@pytest.mark.parametrize(("settings", "told"), [
    ({"training_method": "EMBEDDING"}, "training_method is 'EMBEDDING'"),
    ({"model_type": "FLUX_DEV_1"}, "model_type is 'FLUX_DEV_1', which is no Stable Diffusion")])
def test_what_no_method_is_for_is_one_line(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told) as raised:
        config(tmp_path, **settings)
    assert "\n" not in str(raised.value) and "config.json" in str(raised.value)


def test_concepts_without_their_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="need one config"):
        imported(tmp_path, json.dumps(CONCEPTS), "concepts.json")
