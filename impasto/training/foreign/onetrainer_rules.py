"""What several of OneTrainer's keys say together: method and layers, rates, concepts, units of time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from impasto.families import FAMILIES
from impasto.methods import METHODS
from impasto.training.foreign.engine import Imported, Subset, Work, accepts
from impasto.training.foreign.onetrainer import (
    DEFAULTS,
    FAMILIES_OF,
    LAYERS,
    METHODS_OF,
    OPTIMIZERS,
    PEFT,
    RATE_FREE,
    ROWS,
)
from impasto.training.foreign.onetrainer_pictures import MASKED, chance, masks, often, pictures, put, tags
from impasto.training.foreign.optimizer_options import pass_on
from impasto.training.foreign.table import nothing, number, text, whole

UNET, TEXT = "unet", "text-encoder"


def translate(settings: Mapping[str, Any], files: Iterable[str], further: Sequence[Subset] = ()) -> Imported:
    """OneTrainer's settings, flat, as a recipe; and further concepts as further sets of pictures."""
    work = Work("OneTrainer", ROWS, settings)
    family = FAMILIES_OF.get(str(work.get("model_type", "STABLE_DIFFUSION_15")), "")
    if family not in FAMILIES:
        work.told.notes.append(f"it is for {family}, which this version of Impasto does not load; it knows "
                               f"{', '.join(FAMILIES)}")
    put(work, "base.path", work.read("base_model_name", text, DEFAULTS["base_model_name"]), "base_model_name")
    if str(work.get("training_method", "FINE_TUNE")) == "FINE_TUNE_VAE":
        work.put("method.kind", "full", "training_method")
        work.put("method.parts", ["vae-decoder"], why="what OneTrainer trains of a VAE")
        work.put("objective.kind", "reconstruct", why="with L1 and a loss of edges beside the squared error")
        trains = {"vae"}
    else:
        trains = _method(work)
    _optimizer_and_rates(work, trains)
    _schedule(work)
    shared = {key: settings[key] for key in ("resolution", "aspect_ratio_bucketing", *MASKED) if key in settings}
    for subset in further:
        work.add_set(subset, shared, (often, pictures, chance, masks, tags))
    if further:
        often(work)
    _loop(work, trains)
    _loss(work)
    pictures(work)
    chance(work)
    masks(work)
    tags(work)
    _units(work)
    if str(work.get("validation", False)).lower() != "true":
        work.put("validation.fraction", 0.0, why="without validation every picture is learned from")
    return work.finish(files)


def _method(work: Work) -> set[str]:
    """The method and its layers; returns which of "unet" and "text-encoder" train."""
    trains = {name for key, name in (("unet.train", UNET), ("text_encoder.train", TEXT)) if work.get(key, True)}
    both = [name for name in (UNET, TEXT) if name in trains]
    if METHODS_OF[str(work.get("training_method", "FINE_TUNE"))] == "full":
        put(work, "method.kind", "full", "training_method")
        put(work, "method.parts", both, "unet.train", "text_encoder.train")
        if str(work.get("layer_filter_preset", "full")) != "full":
            work.lose("layer_filter_preset", "a part is trained as a whole", "method.parts")
            work.lose("layer_filter", "likewise", "method.parts")
        return trains
    kind = PEFT.get(str(work.get("peft_type", "LORA")), "")
    if kind in METHODS:
        put(work, "method.kind", kind, "training_method", "peft_type")
    else:
        work.put("method.kind", "lora", "training_method", why="in place of what was asked for")
        work.lose("peft_type", f"of methods this version has {', '.join(METHODS)}", "method.kind")
    put(work, "method.rank", work.read("lora_rank", whole, DEFAULTS["lora_rank"]), "lora_rank")
    put(work, "method.alpha", work.read("lora_alpha", number, DEFAULTS["lora_alpha"]), "lora_alpha")
    layers = _layers(work) if UNET in trains else []
    keys = ("unet.train", "text_encoder.train", "layer_filter", "layer_filter_preset", "layer_filter_regex")
    put(work, "method.targets", layers + [TEXT] * (TEXT in trains), *(key for key in keys if key in work.waiting))
    return trains


def _layers(work: Work) -> list[str]:
    """The UNet's layers: those of a preset, or whose paths hold one of some words."""
    preset, words = str(work.get("layer_filter_preset", "full")), work.get("layer_filter", "")
    if preset in LAYERS:
        return LAYERS[preset]
    patterns = [each.strip() for each in str(words).split(",")]
    regular = work.on("layer_filter_regex")
    if not all(patterns) or regular and any("^" in each for each in patterns):
        for key in ("layer_filter_preset", "layer_filter"):
            if key in work.waiting:
                work.lose(key, "this choice of layers cannot be told here", "method.targets")
        return LAYERS["full"]
    return [rf"^unet\..*(?:{each if regular else re.escape(each)})" for each in patterns]


def _optimizer_and_rates(work: Work, trains: set[str]) -> None:
    """The optimizer, and a rate for each part, times what the batch multiplies it by."""
    asked = str(work.get("optimizer.optimizer", "ADAMW"))
    name = OPTIMIZERS.get(asked, "")
    rate_free = ""
    if name and accepts("train.optimizer", name):
        if "optimizer.optimizer" in work.waiting:
            work.put("train.optimizer", name, "optimizer.optimizer")
        pass_on(work, name, "optimizer.")
    else:
        work.lose("optimizer.optimizer", f"this version has no {asked}", "train.optimizer")
        rate_free = f"{asked} finds the rate by itself; the optimizer in its place does not" \
            if asked.startswith(RATE_FREE) else ""
    betas = [work.read("optimizer.beta1", number, 0.9), work.read("optimizer.beta2", number, 0.999)]
    if not nothing(work.get("optimizer.beta1")) or not nothing(work.get("optimizer.beta2")):
        put(work, "train.betas", betas, "optimizer.beta1", "optimizer.beta2")
    keys = ("learning_rate", "unet.learning_rate", "text_encoder.learning_rate", "learning_rate_scaler")
    there = [key for key in keys if not nothing(work.get(key))]
    if rate_free:
        for key in there:
            work.lose(key, rate_free, "train.learning_rate")
        return
    rate = work.read("learning_rate", number, DEFAULTS["learning_rate"])
    unet, of_text = work.read("unet.learning_rate", number, rate), work.read("text_encoder.learning_rate", number, rate)
    factor, why = _factor(work)
    main, main_key = (of_text, "text_encoder.learning_rate") if trains == {TEXT} else (unet, "unet.learning_rate")
    main_key = main_key if not nothing(work.get(main_key)) else "learning_rate"
    scaler = ["learning_rate_scaler"] if factor != 1 else []
    put(work, "train.learning_rate", main * factor, main_key, *scaler, why=why)
    if trains == {UNET, TEXT} and of_text != unet:
        key = "text_encoder.learning_rate" if not nothing(work.get("text_encoder.learning_rate")) else "learning_rate"
        work.put("method.text_encoder_learning_rate", of_text * factor, key, why=why)
    work.spare(*(key for key in there if key != "learning_rate_scaler"),
               why="each part that is trained has a rate of its own, or this one")


def _factor(work: Work) -> tuple[float, str]:
    """The square root of what the rate grows with (`LearningRateScaler`), and a remark on it."""
    scaler = str(work.get("learning_rate_scaler", "NONE"))
    batch = work.read("batch_size", whole, 1) if "BATCH" in scaler or "BOTH" in scaler else 1
    accumulation = work.read("gradient_accumulation_steps", whole, 1) if "ACC" in scaler or "BOTH" in scaler else 1
    factor = max(batch * accumulation, 1) ** 0.5
    return factor, f"times {factor:.4g}, the square root of the batch" if factor != 1 else ""


def _schedule(work: Work) -> None:
    """Cosines: one, or several that begin anew at the full rate. Its gentle restarts rise again, which ours do not."""
    name, cycles = str(work.get("learning_rate_scheduler", "CONSTANT")), work.read("learning_rate_cycles", number, 1.0)
    hard, gentle = name == "COSINE_WITH_HARD_RESTARTS", name == "COSINE_WITH_RESTARTS"
    if hard and cycles == 1 or gentle and cycles == 0.5:
        work.put("train.schedule", "cosine", "learning_rate_scheduler", why="with so many cycles it never restarts")
    elif hard and cycles >= 1 and cycles == int(cycles):
        work.put("train.schedule", "cosine_with_restarts", "learning_rate_scheduler")
        work.put("train.restarts", int(cycles), "learning_rate_cycles")
    elif hard or gentle:
        work.lose("learning_rate_scheduler", "in OneTrainer the rate ends in the midst of a cosine" if hard else
                  "in OneTrainer the rate rises again as it fell, which is no schedule here", "train.schedule")
        if "learning_rate_cycles" in work.waiting:
            work.lose("learning_rate_cycles", f"it is {name}'s", "train.schedule")
    work.spare("learning_rate_cycles", why=f"it has no effect on {name}, or is told with it")


def _loop(work: Work, trains: set[str]) -> None:
    """Length, warm-up, averaging; and what its text encoder does after a while."""
    epochs = work.read("epochs", whole, DEFAULTS["epochs"])
    repeats = 1.0 if work.further else work.read("concept.balancing", number, 1.0)
    strategy = str(work.get("concept.balancing_strategy", "REPEATS"))
    if strategy == "REPEATS" and repeats == int(repeats) and repeats >= 1:
        put(work, "train.epochs", epochs * int(repeats), "epochs",
            why="" if repeats == 1 else f"an epoch of OneTrainer's has each picture {int(repeats)} times")
        work.spare("concept.balancing", why="it is in train.epochs" if repeats != 1 else "each picture comes once")
    else:
        put(work, "train.epochs", epochs, "epochs")
        work.lose("concept.balancing", "each picture comes once in an epoch", "train.epochs")
    warmup = work.read("learning_rate_warmup_steps", number, DEFAULTS["learning_rate_warmup_steps"])
    if warmup == 1:
        work.lose("learning_rate_warmup_steps", "is the whole run", "train.warmup")
    elif 0 < warmup < 1:
        put(work, "train.warmup", warmup, "learning_rate_warmup_steps", why="a share of all steps")
    else:
        accumulation = max(work.read("gradient_accumulation_steps", whole, 1), 1)
        put(work, "train.warmup", max(int(warmup / accumulation), 0), "learning_rate_warmup_steps",
            why=f"in optimizer steps, of {accumulation} micro-batches each" if accumulation > 1 else "")
    if str(work.get("ema", "OFF")) != "OFF":
        decay = work.read("ema_decay", number, DEFAULTS["ema_decay"])
        interval = work.read("ema_update_step_interval", whole, DEFAULTS["ema_update_step_interval"])
        if decay > 0 and interval > 0:
            put(work, "train.ema", decay ** (1 / interval), "ema", "ema_decay", "ema_update_step_interval",
                why=f"{decay:g} every {interval} steps, told for each step")
    work.spare(*(key for key in ("ema_decay", "ema_update_step_interval") if key in work.waiting),
               why="there is no average of weights")
    stop = work.read("text_encoder.stop_training_after", whole, DEFAULTS["text_encoder.stop_training_after"])
    unit = str(work.get("text_encoder.stop_training_after_unit", "EPOCH"))
    if TEXT in trains and unit != "NEVER" and not (unit == "EPOCH" and stop >= epochs):
        work.lose("text_encoder.stop_training_after", f"in OneTrainer the text encoder stops after {stop} "
                  f"({unit.lower()}); here it trains to the end", "method.text_encoder_learning_rate")
    put(work, "train.checkpointing", bool(work.get("unet.gradient_checkpointing", True)) and
        str(work.get("unet.gradient_checkpointing", "ON")) != "OFF", "unet.gradient_checkpointing")


def _loss(work: Work) -> None:
    """One loss of several with weights; the weight's strength; the times that are trained."""
    squared, absolute = work.read("mse_strength", number, 1.0), work.read("mae_strength", number, 0.0)
    if absolute and not squared:
        put(work, "objective.loss", "l1", "mae_strength", "mse_strength")
    elif absolute:
        work.lose("mae_strength", "the loss is one of several, not their sum", "objective.loss")
    work.spare("mse_strength", "mae_strength", why="it is the squared error, whose weight Adam does not feel")
    weighting = str(work.get("loss_weight_fn", "CONSTANT"))
    if weighting in ("MIN_SNR_GAMMA", "P2"):
        put(work, "objective.gamma", work.read("loss_weight_strength", number, DEFAULTS["loss_weight_strength"]),
            "loss_weight_strength")
    work.spare("loss_weight_strength", why=f"it has no effect on {weighting}")
    times = str(work.get("timestep_distribution", "UNIFORM"))
    if times == "LOGIT_NORMAL":
        put(work, "objective.times_std", work.read("noising_weight", number, 0.0) + 1, "noising_weight",
            why="OneTrainer adds 1")
    elif times == "UNIFORM":
        work.spare("noising_weight", "noising_bias", why="it has no effect on UNIFORM")
    else:
        for key in ("noising_weight", "noising_bias"):
            if work.read(key, number, 0.0):
                work.lose(key, f"it is {times}'s", "objective.times")
    span = [work.read("min_noising_strength", number, 0.0), work.read("max_noising_strength", number, 1.0)]
    if span != [0, 1]:
        put(work, "objective.times_range", span, *(key for key in ("min_noising_strength", "max_noising_strength")))
    work.spare("min_noising_strength", "max_noising_strength", why="all noise levels are trained")


def _units(work: Work) -> None:
    """What comes every so often: in steps or epochs here, and in OneTrainer in minutes too."""
    for key, targets in (("sample_after", {"STEP": "sample.every"}),
                         ("backup_after", {"STEP": "output.checkpoint_every"}),
                         ("save_every", {"STEP": "output.save_every", "EPOCH": "output.save_every_epochs"})):
        unit = str(work.get(f"{key}_unit", "NEVER" if key == "save_every" else "MINUTE"))
        often = work.read(key, whole, 0)
        if unit in targets and often:
            work.put(targets[unit], often, key)
        elif key == "sample_after" and unit == "NEVER":
            work.put("sample.every", 0, f"{key}_unit", *([key] if key in work.waiting else []))
        elif unit == "NEVER":
            work.spare(key, why="it is never done")
        elif often:
            work.lose(key, f"it counts in {unit.lower()}s; here in {' or '.join(targets).lower()}s",
                      next(iter(targets.values())))
        if f"{key}_unit" in work.waiting:
            work.spare(f"{key}_unit", why=f"it is told with {key}")
    if not work.on("rolling_backup"):
        work.spare("rolling_backup_count", why="rolling_backup is off")
    if destination := work.read("output_model_destination", text, ""):
        name = PurePosixPath(destination.replace("\\", "/")).stem
        work.put("output.name", name, "output_model_destination", why="artifacts lie in the run's folder, output.dir")
