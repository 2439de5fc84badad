"""Made-up settings of kohya's scripts, key by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from impasto.core.errors import UserError
from impasto.training.foreign.kohya import CONVOLUTIONS, TRANSFORMERS
from tests.training.foreign.importing import became, fate, imported, line, reason

CONFIG = """
[model_arguments]
pretrained_model_name_or_path = "models/v1-5.safetensors"
vae = "models/vae.pt"
v2 = false
clip_skip = 2
max_token_length = 225

[dataset_arguments]
train_data_dir = "pictures"
reg_data_dir = "classes"
resolution = "768,768"
enable_bucket = true
min_bucket_reso = 320
bucket_reso_steps = 32
flip_aug = true
color_aug = true
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 2
caption_dropout_rate = 0.05
caption_dropout_every_n_epochs = 0
prior_loss_weight = 0.7

[training_arguments]
output_dir = "out"
output_name = "dog"
save_precision = "bf16"
save_every_n_epochs = 2
save_last_n_epochs = 3
train_batch_size = 4
gradient_accumulation_steps = 2
max_train_epochs = 10
max_train_steps = 5000
learning_rate = 1e-4
unet_lr = 2e-4
text_encoder_lr = 1e-5
lr_scheduler = "cosine"
lr_warmup_steps = 100
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.05", "betas=0.9,0.99", "fused=True"]
max_grad_norm = 0.5
mixed_precision = "bf16"
gradient_checkpointing = true
torch_compile = true
xformers = true
cache_latents = true
seed = 1234
min_snr_gamma = 5.0
noise_offset = 0.0357
ip_noise_gamma = 0.1
multires_noise_iterations = 6
multires_noise_discount = 0.2
loss_type = "huber"
huber_c = 0.2
huber_schedule = "exponential"
min_timestep = 100
max_timestep = 900
sample_every_n_steps = 50
sample_sampler = "euler_a"
log_with = "wandb"
wandb_api_key = "hunter2"

[network]
network_module = "networks.lora"
network_dim = 32
network_alpha = 8
network_dropout = 0.1
network_args = ["conv_dim=4", "conv_alpha=2", "block_dims=4,4"]
sparkle = true
"""

WANTED = {
    "validation.fraction": 0.0,
    "base.path": "models/v1-5.safetensors", "base.vae": "models/vae.pt", "base.clip_skip": 1,
    "data.folder": "pictures", "data.resolution": 768, "data.buckets": True, "data.bucket_min": 320,
    "data.bucket_max": 1024, "data.bucket_step": 32, "data.flip": True, "data.caption_dropout": 0.05,
    "data.caption_source": "txt", "data.shuffle_tags": True, "data.keep_tags": 2,
    "prior.folder": "classes", "prior.weight": 0.7,
    "method.kind": "lora", "method.rank": 32, "method.alpha": 8.0, "method.dropout": 0.1,
    "method.targets": ["all", "text-encoder"], "method.ranks": {CONVOLUTIONS: 4}, "method.alphas": {CONVOLUTIONS: 2.0},
    "method.text_encoder_learning_rate": 1e-5,
    "objective.weighting": "min_snr", "objective.gamma": 5.0, "objective.noise_offset": 0.0357,
    "objective.input_perturbation": 0.1, "objective.pyramid_discount": 0.2, "objective.loss": "huber",
    "objective.huber_c": 0.2, "objective.huber_schedule": "exponential", "objective.times_range": [0.1, 0.9],
    "train.batch_size": 4, "train.accumulation": 2, "train.epochs": 10, "train.learning_rate": 2e-4,
    "train.schedule": "cosine", "train.warmup": 100, "train.optimizer": "adamw8bit", "train.weight_decay": 0.05,
    "train.betas": [0.9, 0.99], "train.clip": 0.5, "train.precision": "bf16", "train.checkpointing": True,
    "train.compile": True, "train.seed": 1234,
    "sample.every": 50, "sample.scheduler": "euler_a",
    "output.dir": "out/dog", "output.name": "dog", "output.dtype": "bf16", "output.save_every_epochs": 2,
    "output.trackers": ["wandb"],
}
FATES = {
    "lost": ["color_aug", "save_last_n_epochs", "wandb_api_key",
             "optimizer_args.fused", "network_args.block_dims"],
    "needless": ["max_token_length", "xformers", "cache_latents", "max_train_steps", "learning_rate"],
    "without effect": ["v2", "caption_dropout_every_n_epochs"],
    "unknown": ["sparkle"],
}


def test_a_whole_config_key_by_key(tmp_path: Path) -> None:
    found = imported(tmp_path, CONFIG, "config.toml")
    assert became(found) == WANTED
    for expected, keys in FATES.items():
        for key in keys:
            assert fate(found, key) == expected, key
    assert "hunter2" not in found.toml() + str(found.plain())
    assert {left.key: left.instead for left in found.lost}["optimizer_args.fused"] == "adamw8bit"


def test_what_the_file_does_not_say_is_kohyas_default(tmp_path: Path) -> None:
    found = line(tmp_path, "--train_data_dir=p --resolution=512")
    assert became(found) == {
        "validation.fraction": 0.0,
        "base.path": "a.ckpt", "data.folder": "p", "data.resolution": 512, "data.buckets": False, "method.kind": "lora",
        "method.rank": 4, "method.alpha": 1.0, "method.targets": [*TRANSFORMERS, "text-encoder"], "train.steps": 1600,
        "train.learning_rate": 2e-6}
    assert all(each.why for each in found.carried if not each.key)


@pytest.mark.parametrize(("arguments", "targets", "rates"), [
    ("--learning_rate=1e-4", [*TRANSFORMERS, "text-encoder"], (1e-4, None)),
    ("--unet_lr=1e-4 --text_encoder_lr=5e-5", [*TRANSFORMERS, "text-encoder"], (1e-4, 5e-5)),
    ("--learning_rate=1e-4 --text_encoder_lr=5e-5", [*TRANSFORMERS, "text-encoder"], (1e-4, 5e-5)),
    ("--learning_rate=1e-4 --unet_lr=3e-4", [*TRANSFORMERS, "text-encoder"], (3e-4, 1e-4)),
    ("--unet_lr=1e-4 --text_encoder_lr 5e-5 4e-5", [*TRANSFORMERS, "text-encoder"], (1e-4, 5e-5)),
    ("--learning_rate=1e-4 --network_train_unet_only", TRANSFORMERS, (1e-4, None)),
    ("--unet_lr=1e-4 --text_encoder_lr=5e-5 --network_train_unet_only", TRANSFORMERS, (1e-4, None)),
    ("--learning_rate=1e-4 --text_encoder_lr=0", TRANSFORMERS, (1e-4, None)),
    ("--text_encoder_lr=5e-5 --unet_lr=0", ["text-encoder"], (5e-5, None)),
    ("--learning_rate=1e-4 --network_train_text_encoder_only", ["text-encoder"], (1e-4, None)),
])
def test_who_trains_at_which_rate(arguments: str, targets: list[str], rates: tuple, tmp_path: Path) -> None:
    keys = became(line(tmp_path, arguments))
    assert keys["method.targets"] == targets
    assert (keys["train.learning_rate"], keys.get("method.text_encoder_learning_rate")) == rates


def test_two_rates_of_text_encoders_are_told_of(tmp_path: Path) -> None:
    assert any("one rate here" in note for note in line(tmp_path, "--text_encoder_lr 5e-5 4e-5").notes)


@pytest.mark.parametrize(("arguments", "wanted"), [
    ("--max_train_steps=800 --lr_warmup_steps=50", {"train.steps": 800, "train.warmup": 50}),
    ("--max_train_steps=800 --lr_warmup_steps=0.1", {"train.steps": 800, "train.warmup": 80}),
    ("--max_train_steps=800 --lr_warmup_steps=5%", {"train.steps": 800, "train.warmup": 40}),
    ("--lr_warmup_steps=0.05", {"train.steps": 1600, "train.warmup": 80}),
    ("--max_train_epochs=8 --max_train_steps=800", {"train.epochs": 8}),
    ("--max_train_epochs=8 --dataset_repeats=5 --save_every_n_epochs=1",
     {"train.epochs": 40, "output.save_every_epochs": 5}),
    ("--max_train_steps=80 --dataset_repeats=5 --save_every_n_epochs=1", {"train.steps": 80,
                                                                         "output.save_every_epochs": 1}),
    ("--lr_scheduler=constant_with_warmup --lr_warmup_steps=7", {"train.schedule": "constant", "train.warmup": 7}),
    ("--lr_scheduler=cosine_with_restarts", {"train.schedule": "cosine"}),
    ("--lr_scheduler=polynomial", {"train.schedule": "linear"}),
    ("--lr_scheduler=cosine_with_restarts --lr_scheduler_num_cycles=3", {"train.schedule": "cosine_with_restarts",
                                                                        "train.restarts": 3}),
    ("--lr_scheduler=polynomial --lr_scheduler_power=2.5", {"train.schedule": "polynomial", "train.power": 2.5}),
    ("--max_train_epochs=8 --lr_warmup_steps=0.1", {"train.epochs": 8, "train.warmup": 0.1}),
    ("--max_train_epochs=8 --lr_warmup_steps=5%", {"train.epochs": 8, "train.warmup": 0.05}),
])
def test_how_long(arguments: str, wanted: dict[str, Any], tmp_path: Path) -> None:
    keys = became(line(tmp_path, arguments))
    about = ("train.steps", "train.epochs", "train.warmup", "train.schedule", "train.restarts", "train.power",
             "output.save_every_epochs")
    usual = {} if "train.epochs" in wanted else {"train.steps": 1600}
    assert {key: keys[key] for key in about if key in keys} == usual | wanted


@pytest.mark.parametrize(("arguments", "key", "ours"), [
    ("--lr_scheduler=inverse_sqrt", "lr_scheduler", "train.schedule"),
    ("--lr_scheduler=cosine_with_restarts --lr_scheduler_num_cycles=many", "lr_scheduler_num_cycles", "train.restarts"),
    ("--lr_scheduler=polynomial --lr_scheduler_power=steep", "lr_scheduler_power", "train.power"),
    ("--lr_warmup_steps=100%", "lr_warmup_steps", "train.warmup"),
    ("--log_with=mlflow", "log_with", "output.trackers"),
    ("--huggingface_repo_id=nobody", "huggingface_repo_id", "output.push_to"),
    ("--huggingface_repo_id=me/dog --huggingface_path_in_repo=a", "huggingface_path_in_repo", "output.push_to"),
    ("--optimizer_type=AdamW --optimizer_args fused=True", "optimizer_args.fused", "train.optimizer"),
    ("--optimizer_type=Prodigy --optimizer_args d_coef=high", "optimizer_args.d_coef", "train.optimizer"),
    ("--lr_scheduler=adafactor:1e-4", "lr_scheduler", "train.schedule"),
    ("--optimizer_type=Frobnicate", "optimizer_type", "train.optimizer"),
    ("--save_model_as=ckpt", "save_model_as", "output.format"),
    ("--sample_every_n_epochs=1", "sample_every_n_epochs", "sample.every"),
    ("--sample_prompts=nowhere.txt", "sample_prompts", "sample.prompts"),
    ("--full_bf16", "full_bf16", "train.precision"),
    ("--train_batch_size=two", "train_batch_size", "train.batch_size"),
    ("--network_dim=", "", ""), ("--network_dim=big", "network_dim", "method.rank"),
    ("--seed=-1", "seed", "train.seed"),
    ("--resolution=1,2,3", "resolution", "data.resolution"),
    ("--network_module=networks.oft", "network_module", "method.kind"),
    ("--network_module=lycoris.kohya --network_args algo=ia3", "network_args.algo", "method.kind"),
    ("--network_args preset=mine", "network_args.preset", "method.targets"),
    ("--max_grad_norm=-1", "max_grad_norm", "train.clip"),
    ("--network_train_unet_only=maybe", "network_train_unet_only", "method.targets"),
])
def test_what_is_not_carried_names_what_stands_in_its_place(arguments, key, ours, tmp_path: Path) -> None:
    found = line(tmp_path, arguments)
    if key:
        left = next(left for left in found.lost if left.key == key)
        assert left.here == ours and left.why


@pytest.mark.parametrize("optimizer", ["Prodigy", "DAdaptAdam", "Adafactor", "prodigyopt.Prodigy"])
def test_the_rate_of_an_optimizer_that_finds_it_is_no_rate_for_another(optimizer: str, tmp_path: Path, monkeypatch
                                                                       ) -> None:
    monkeypatch.setattr("impasto.training.foreign.kohya_method.accepts", lambda key, value: False)
    found = line(tmp_path, f"--optimizer_type={optimizer} --learning_rate=1 --unet_lr=1 --optimizer_args d_coef=2")
    assert "train.learning_rate" not in became(found) and "train.optimizer" not in became(found)
    assert {left.key: left.instead for left in found.lost} == {
        "optimizer_type": "adamw", "optimizer_args.d_coef": "adamw", "learning_rate": 1e-4, "unet_lr": 1e-4}


def test_another_optimizers_rate_is_carried(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("impasto.training.foreign.kohya_method.accepts", lambda key, value: False)
    found = line(tmp_path, "--optimizer_type=Adafactor --learning_rate=4e-7 --optimizer_args relative_step=False")
    assert became(found)["train.learning_rate"] == 4e-7


@pytest.mark.parametrize(("arguments", "wanted"), [
    ("--use_8bit_adam", {"train.optimizer": "adamw8bit"}),
    ("--optimizer_type=Prodigy --optimizer_args d_coef=2 decouple=True weight_decay=0.01 use_bias_correction=True",
     {"train.optimizer": "prodigy", "train.weight_decay": 0.01, "train.optimizer_options": {
         "d_coef": 2, "decouple": True, "use_bias_correction": True, "safeguard_warmup": False}}),
    ("--optimizer_type=Prodigy", {"train.optimizer_options": {"use_bias_correction": False,
                                                              "safeguard_warmup": False}}),
    ("--optimizer_type=Adafactor --optimizer_args relative_step=False scale_parameter=False warmup_init=False",
     {"train.optimizer": "adafactor", "train.optimizer_options": {"scale_parameter": False}}),
    ("--optimizer_args amsgrad=True", {"train.optimizer_options": {"amsgrad": True}}),
    ("--log_with=wandb", {"output.trackers": ["wandb"]}), ("--log_with=all", {"output.trackers": ["wandb"]}),
    ("--log_with=tensorboard", {"output.trackers": None}),
    ("--huggingface_repo_id=me/dog", {"output.push_to": "me/dog", "output.push_private": True}),
    ("--huggingface_repo_id=me/dog --huggingface_repo_visibility=public --huggingface_repo_type=model",
     {"output.push_to": "me/dog", "output.push_private": False}),
    ("--optimizer_type=PagedAdamW8bit", {"train.optimizer": "paged_adamw8bit"}),
    ("--optimizer_type=AdamW --optimizer_args weight_decay=0 eps=1e-6 betas=(0.8,0.9)",
     {"train.optimizer": "adamw", "train.weight_decay": 0.0, "train.eps": 1e-6, "train.betas": [0.8, 0.9]}),
    ("--resolution=512,768", {"data.resolution": 640}),
    ("--resolution=1024 --enable_bucket", {"data.bucket_min": 256, "data.bucket_max": 1024}),
    ("--resolution=512 --enable_bucket", {"data.bucket_min": None, "data.bucket_max": None, "data.buckets": True}),
    ("--resolution=1024 --enable_bucket --bucket_no_upscale --max_bucket_reso=2048",
     {"data.upscale": "never", "data.bucket_max": None}),
    ("--resolution=512 --max_bucket_reso=2048", {"data.buckets": False, "data.bucket_max": None}),
    ("--clip_skip=1", {"base.clip_skip": 0}),
    ("--debiased_estimation_loss", {"objective.weighting": "debiased"}),
    ("--multires_noise_iterations=6", {"objective.pyramid_discount": 0.3}),
    ("--multires_noise_discount=0.2", {"objective.pyramid_discount": None}),
    ("--max_timestep=500", {"objective.times_range": [0.0, 0.5]}),
    ("--mixed_precision=no", {"train.precision": "fp32"}),
    ("--output_dir=D:/out/", {"output.dir": "D:/out/"}),
    ("--output_dir=D:/out/ --output_name=dog", {"output.dir": "D:/out/dog"}),
    ("--output_dir=D:\\out\\ --output_name=dog", {"output.dir": "D:\\out\\dog"}),
    ("--no_metadata", {"output.metadata": "none"}),
    ("--save_model_as=safetensors", {"output.format": None}),
    ("--network_args conv_dim=4 --network_dim=4 --network_alpha=1", {"method.targets": ["all", "text-encoder"],
                                                                     "method.ranks": None, "method.alphas": None}),
    ("--network_module=lycoris.kohya --network_dim=16 --network_alpha=8 --network_args algo=locon",
     {"method.targets": ["all", "text-encoder"], "method.ranks": None, "method.alphas": None}),
    ("--network_module=lycoris.kohya --network_args preset=attn-mlp conv_dim=8", {
        "method.targets": [*TRANSFORMERS, "text-encoder"], "method.ranks": None}),
])
def test_values_that_mean_something_else(arguments: str, wanted: dict[str, Any], tmp_path: Path) -> None:
    keys = became(line(tmp_path, arguments))
    assert {key: keys.get(key) for key in wanted} == wanted


@pytest.mark.parametrize(("script", "arguments", "wanted"), [
    ("train_db.py", "", {"method.parts": ["unet", "text-encoder"]}),
    ("train_db.py", "--stop_text_encoder_training=-1", {"method.parts": ["unet"]}),
    ("train_db.py", "--learning_rate=1e-6 --learning_rate_te=5e-7", {"train.learning_rate": 1e-6,
                                                                     "method.text_encoder_learning_rate": 5e-7}),
    ("fine_tune.py", "", {"method.parts": ["unet"]}),
    ("fine_tune.py", "--train_text_encoder", {"method.parts": ["unet", "text-encoder"]}),
    ("fine_tune.py", "--save_model_as=diffusers_safetensors", {"output.format": "diffusers"}),
    ("sdxl_train.py", "--learning_rate=1e-5 --train_text_encoder --learning_rate_te1=5e-6",
     {"method.parts": ["unet", "text-encoder"], "method.text_encoder_learning_rate": 5e-6}),
])
def test_full_fine_tuning(script: str, arguments: str, wanted: dict[str, Any], tmp_path: Path) -> None:
    keys = became(line(tmp_path, arguments, script))
    assert keys["method.kind"] == "full" and {key: keys.get(key) for key in wanted} == wanted


def test_a_text_encoder_that_stops_is_told_of(tmp_path: Path) -> None:
    found = line(tmp_path, "--stop_text_encoder_training=500", "train_db.py")
    assert "trains to the end" in reason(found, "stop_text_encoder_training")


def test_a_family_that_is_not_there_is_told_of(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("impasto.training.foreign.kohya_rules.FAMILIES", {"sd1": ""})
    found = line(tmp_path, "", "sdxl_train_network.py")
    assert any("is for sdxl, which this version of Impasto does not load" in note for note in found.notes)
    assert not any("does not load" in note for note in line(tmp_path, "").notes)


@pytest.mark.parametrize(("keys", "kind"), [
    ('network_dim = 8', "lora"), ('train_text_encoder = true', "full"), ('stop_text_encoder_training = -1', "full"),
    ('seed = 1', "lora")])
def test_the_method_is_told_by_the_keys(keys: str, kind: str, tmp_path: Path) -> None:
    found = imported(tmp_path, f'pretrained_model_name_or_path = "a.ckpt"\nmax_train_steps = 5\n{keys}\n', "c.toml")
    assert became(found)["method.kind"] == kind


def test_textual_inversion_without_a_script(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"c\.toml: is for textual inversion"):
        imported(tmp_path, 'pretrained_model_name_or_path = "a"\ntoken_string = "sks"\n', "c.toml")


# --- beyond plain LoRA ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "keys"), [
    ("--network_args loraplus_lr_ratio=16", {"method.0.loraplus_ratio": 16}),
    ("--network_args loraplus_unet_lr_ratio=16",
     {"method.0.loraplus_ratio": 16, "method.0.text_encoder_loraplus_ratio": 1}),
    ("--network_args loraplus_lr_ratio=16 loraplus_text_encoder_lr_ratio=4",
     {"method.0.loraplus_ratio": 16, "method.0.text_encoder_loraplus_ratio": 4}),
    ("--network_train_unet_only --network_args loraplus_unet_lr_ratio=8 loraplus_text_encoder_lr_ratio=4",
     {"method.0.loraplus_ratio": 8}),
    ("--scale_weight_norms=1.0", {"method.0.max_norm": 1.0}),
    ("--network_weights=old.safetensors", {"method.0.warm_start": "old.safetensors"}),
    ("--base_weights a.safetensors b.safetensors --base_weights_multiplier 0.5",
     {"base.adapters": ["a.safetensors:0.5", "b.safetensors"]}),
    ("--network_module=lycoris.kohya --network_args algo=loha dora_wd=True wd_on_output=False use_tucker=True",
     {"method.0.kind": "loha", "method.0.dora": True, "method.0.dora_axis": "input", "method.0.tucker": True}),
    ("--network_module=lycoris.kohya --network_args algo=lokr factor=6 full_matrix=True decompose_both=True",
     {"method.0.kind": "lokr", "method.0.factor": 6, "method.0.full": True, "method.0.decompose_both": True}),
])
def test_what_lora_like_methods_can_do_beside(tmp_path: Path, arguments: str, keys: dict[str, Any]) -> None:
    found = became(line(tmp_path, arguments))
    found = {key.replace("method.", "method.0.") if not key.startswith("method.0.") else key: value
             for key, value in found.items()}
    assert {key: found.get(key) for key in keys} == keys
    assert ("method.0.text_encoder_loraplus_ratio" in found) == ("method.0.text_encoder_loraplus_ratio" in keys)


def test_what_has_no_meaning_for_the_kind_is_told(tmp_path: Path) -> None:
    found = line(tmp_path, "--network_args factor=6 rank_dropout=0.1 module_dropout=0.1 --dim_from_weights")
    assert {fate(found, f"network_args.{key}") for key in ("factor", "rank_dropout", "module_dropout")} == {"lost"}
    assert fate(found, "dim_from_weights") == "lost" and "rank" in reason(found, "dim_from_weights")
