"""What several of kohya's keys say together: length, loss, output. Layers and pictures have files of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from impasto.core.errors import UserError
from impasto.families import FAMILIES
from impasto.training.foreign.engine import Imported, Subset, Work
from impasto.training.foreign.kohya import ROWS, SCRIPTS
from impasto.training.foreign.kohya_method import lora, optimizer, rates, whole_network
from impasto.training.foreign.kohya_pictures import further_set, pictures, prompts, put, shared_by_sets, sizes
from impasto.training.foreign.table import nothing, number, text, whole

#: what tells the method where no script is named
_OF_A_LORA = ("network_module", "network_dim", "network_alpha", "network_args", "unet_lr", "text_encoder_lr",
              "network_train_unet_only", "network_train_text_encoder_only")
_OF_THE_WHOLE = {"train_text_encoder": "full", "in_json": "full", "learning_rate_te1": "full", "block_lr": "full",
                 "stop_text_encoder_training": "dreambooth", "learning_rate_te": "dreambooth"}


def translate(settings: Mapping[str, Any], script: str, files: Iterable[str],
              further: Sequence[Subset] = (), shared: Mapping[str, Any] | None = None) -> Imported:
    """kohya's settings, one flat table of them, as a recipe; and those of further sets of pictures, which have what is
    `shared` too.

    `script` is the one that they are for, "" if unknown.
    """
    work = Work("kohya's sd-scripts", ROWS, settings)
    if "token_string" in settings:
        raise UserError("is for textual inversion, for which there is no method here", where=" and ".join(files))
    kind, family = SCRIPTS.get(script) or (_kind(work), "")
    if family and family not in FAMILIES:
        work.told.notes.append(f"{script} is for {family}, which this version of Impasto does not load; it knows "
                               f"{', '.join(FAMILIES)}")
    if not script:
        work.told.notes.append("no script is named; by its keys it is for "
                               f"{'train_network.py' if kind == 'lora' else 'full fine-tuning'}")
    if not work.get("pretrained_model_name_or_path"):
        work.fill("base.path", "base.safetensors", "no base is named")
    trains = lora(work) if kind == "lora" else whole_network(work, kind)
    rates(work, kind, trains, optimizer(work))
    folders = pictures(work)
    sizes(work)
    for subset in further or folders:
        further_set(work, subset, shared if further and shared is not None else shared_by_sets(work.settings))
    _length(work)
    _loss(work)
    _schedule(work)
    _output(work, kind)
    if not work.read("validation_split", number, 0.0):
        work.put("validation.fraction", 0.0, why="without validation_split every picture is learned from")
    return work.finish(files)


def _kind(work: Work) -> str:
    """What is trained, by the keys that only one of the scripts has."""
    if any(key.partition(".")[0] in _OF_A_LORA for key in work.settings):
        return "lora"
    return next((kind for key, kind in _OF_THE_WHOLE.items() if key in work.settings), "lora")


def _length(work: Work) -> None:
    """Steps or epochs, an epoch being as many passes as pictures are repeated; and the warm-up."""
    repeats_key = next((key for key in ("num_repeats", "dataset_repeats") if work.get(key) is not None), "")
    repeats = work.read(repeats_key, whole, 1)
    if work.further and repeats_key == "num_repeats":
        work.put("data.repeats", repeats, repeats_key)
        repeats = 1
    epochs, steps = work.read("max_train_epochs", whole, 0), work.read("max_train_steps", whole, 1600)
    every = work.read("save_every_n_epochs", whole, 0)
    if epochs:
        often = f"an epoch of kohya's has each picture {repeats} times"
        work.put("train.epochs", epochs * repeats, "max_train_epochs", why=often if repeats != 1 else "")
        work.spare(repeats_key, why="it is in train.epochs")
        work.spare("max_train_steps", why="max_train_epochs goes before it")
        if every and repeats != 1:
            work.put("output.save_every_epochs", every * repeats, "save_every_n_epochs", why=often)
    else:
        put(work, "train.steps", steps, "max_train_steps")
        work.spare(repeats_key, why="it lengthens epochs, and the length is given in steps")
    _warmup(work, None if epochs else steps)


def _warmup(work: Work, steps: int | None) -> None:
    """Steps, or a share of them: "10%", or a number below 1."""
    asked = work.get("lr_warmup_steps")
    if nothing(asked, (0,)):
        return
    percent = str(asked).endswith("%")
    try:
        size = number(str(asked).removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        return work.lose("lr_warmup_steps", "is no number", "train.warmup")
    if size >= 1 and not percent:
        work.put("train.warmup", int(size), "lr_warmup_steps")
    elif size >= 1:
        work.lose("lr_warmup_steps", "is the whole run, or more", "train.warmup")
    elif steps is None:
        work.put("train.warmup", size, "lr_warmup_steps", why="a share of all steps")
    else:
        work.put("train.warmup", int(size * steps), "lr_warmup_steps", why=f"that share of {steps} steps")


def _loss(work: Work) -> None:
    """Where one key of theirs is two of ours, or two are one."""
    if gamma := work.read("min_snr_gamma", number, 0.0):
        work.put("objective.weighting", "min_snr", "min_snr_gamma")
        work.put("objective.gamma", gamma, "min_snr_gamma")
    if work.on("debiased_estimation_loss"):
        work.put("objective.weighting", "debiased", "debiased_estimation_loss")
    if work.read("multires_noise_iterations", whole, 0):
        put(work, "objective.pyramid_discount", work.read("multires_noise_discount", number, 0.3),
            "multires_noise_iterations", "multires_noise_discount",
            why="six levels here; the coarse ones weigh 1.4 times what they do in kohya")
    else:
        work.spare("multires_noise_discount", why="it has no effect without multires_noise_iterations")
    times = work.read("min_timestep", whole, 0), work.read("max_timestep", whole, 1000)
    if times != (0, 1000):
        put(work, "objective.times_range", [time / 1000 for time in times], "min_timestep", "max_timestep")


def _schedule(work: Work) -> None:
    """Schedules that are one of ours by another name."""
    name = str(work.get("lr_scheduler", "constant"))
    if name == "cosine_with_restarts" and work.read("lr_scheduler_num_cycles", whole, 1) == 1:
        work.put("train.schedule", "cosine", "lr_scheduler", why="with one cycle it never restarts")
    elif name == "polynomial" and work.read("lr_scheduler_power", number, 1.0) == 1:
        work.put("train.schedule", "linear", "lr_scheduler", why="of power 1 it is a line")
    if name != "cosine_with_restarts":
        work.spare("lr_scheduler_num_cycles", why=f"it has no effect on {name}")
    if name != "polynomial":
        work.spare("lr_scheduler_power", why=f"it has no effect on {name}")


def _output(work: Work, kind: str) -> None:
    """Where the run lives: a folder of its own in kohya's folder for all of them. And its previews."""
    folder, name = work.read("output_dir", text, ""), work.read("output_name", text, "")
    if folder and name:
        path = folder.rstrip("/\\") + ("\\" if "\\" in folder else "/") + name
        work.put("output.dir", path, "output_dir", why="a run has a folder of its own")
    if work.get("huggingface_repo_id") and work.get("huggingface_repo_visibility") is None:
        work.put("output.push_private", True, why="kohya's repositories are private, if nothing is said")
    how = str(work.get("save_model_as", ""))
    if how == "safetensors" and kind == "lora":
        work.spare("save_model_as", why="artifacts are safetensors")
    elif how.startswith("diffusers") and kind != "lora":
        work.put("output.format", "diffusers", "save_model_as")
    elif how:
        work.lose("save_model_as", "a LoRA is a safetensors file" if kind == "lora" else
                  "a whole base is a diffusers folder", "output.format")
    if work.get("sample_prompts"):
        prompts(work, Path(str(work.get("sample_prompts"))))
