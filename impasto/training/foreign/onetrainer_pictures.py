"""What OneTrainer's concepts say together: folder and sizes, how often, chance in pictures, tags."""

from __future__ import annotations

import math
import re
from typing import Any

from impasto.training.foreign.engine import Work
from impasto.training.foreign.onetrainer import CHANCES, ROWS
from impasto.training.foreign.table import nothing, number, whole

#: keys of masks, which all concepts share
MASKED = ("masked_training", "unmasked_weight", "normalize_masked_area_loss")

THEIRS = "OneTrainer's own default, where the file says nothing"


def put(work: Work, to: str, becomes: Any, *keys: str, why: str = "") -> None:
    """`work.put` out of those keys that are there; where none is, it is OneTrainer's default."""
    there = [key for key in keys if not nothing(work.get(key))]
    work.put(to, becomes, *there, why=why or ("" if there else THEIRS))


def pictures(work: Work) -> None:
    """The folder, the caption of a concept with one, the resolution."""
    if not work.get("concept.path"):
        work.fill("data.folder", "photos", "no concept is in the file, nor in one that can be seen from here")
    keys = ["resolution"]
    if work.on("concept.image.enable_resolution_override"):
        keys = ["concept.image.resolution_override", "concept.image.enable_resolution_override"]
        if "resolution" in work.waiting:
            work.spare("resolution", why="the concept has a resolution of its own")
    asked = str(work.get(keys[0], ""))
    sizes = sorted({int(size[:9]) for size in re.findall(r"\d+", asked)})
    if len(sizes) == 1:
        work.put("data.resolution", sizes[0], *keys)
    elif sizes and "x" in asked:
        side = max(round(math.sqrt(math.prod(sizes)) / 64), 1) * 64
        work.put("data.resolution", side, *keys, why="a square of about that area")
    elif sizes:
        work.put("data.resolutions", sizes, *keys, why="OneTrainer takes one of them by chance, Impasto each of them")


def often(work: Work) -> None:
    """How often a concept of several comes in an epoch: so many times, where that is a whole number."""
    key = "concept.balancing"
    if work.get(key) is None:
        return
    count = work.read(key, number, 1.0)
    if str(work.get("concept.balancing_strategy", "REPEATS")) != "REPEATS":
        work.lose(key, f"a number of samples in an epoch, which no set has here: give all sets a share by their "
                  f"{count:g} beside the others'", "data.share")
        work.spare("concept.balancing_strategy", why=f"it is told with {key}")
    elif count >= 1 and count == int(count):
        work.put("data.repeats", int(count), key)
    else:
        work.lose(key, "pictures come a whole number of times in an epoch; data.share takes any", "data.repeats")


def masks(work: Work) -> None:
    """Masks beside pictures, which OneTrainer names as we do."""
    if not work.on("masked_training"):
        work.spare("unmasked_weight", "normalize_masked_area_loss", "unmasked_probability",
                   "masked_prior_preservation_weight", why="training is not masked")
        return
    if work.becomes("objective.kind") == "reconstruct":
        work.lose("masked_training", "a VAE learns from whole pictures", "data.mask")
        work.spare("unmasked_weight", "normalize_masked_area_loss", why="it is told with masked_training")
        return
    work.put("data.mask", "files", "masked_training", why="NAME-masklabel.png beside NAME.jpg")
    work.put("data.missing_masks", "whole", why="OneTrainer counts pictures without a mask in full")
    put(work, "data.mask_floor", work.read("unmasked_weight", number, 0.1), "unmasked_weight")
    if work.on("normalize_masked_area_loss"):
        work.put("data.mask_normalised", True, "normalize_masked_area_loss")
    if not work.read("unmasked_probability", number, 0.1):
        work.spare("unmasked_probability", why="none of it is asked for")


def chance(work: Work) -> None:
    """What is left to chance in pictures: a switch, and how much of it there is at most; and how many versions."""
    image, asked = "concept.image", work.on("concept.image.enable_crop_jitter")
    for switch, to in CHANCES.items():
        key = next(key for key, row in ROWS.items() if row.to == to and key != f"{image}.{switch}")
        most = work.read(key, number, 0.0)
        if not work.on(f"{image}.{switch}"):
            if most:
                work.spare(key, why="it is off")
            continue
        if not most:
            work.spare(f"{image}.{switch}", why="there is none of it")
            continue
        asked = True
        hue = to == "data.hue"
        put(work, to, most / 2 if hue else most, key, f"{image}.{switch}", why="half of it, as OneTrainer takes it"
            if hue else "enlarged until no corner is empty" if to == "data.rotate" else "")
    variations = "concept.image_variations"
    if asked and work.get(variations) is not None:
        put(work, "data.variants", work.read(variations, whole, 1), variations)
    work.spare(variations, why="nothing is left to chance")


def tags(work: Work) -> None:
    """Tags that are shuffled or left out; of its three ways to leave them out, one is ours."""
    prefix = "concept.text"
    shuffles, drops = work.on(f"{prefix}.enable_tag_shuffling"), work.on(f"{prefix}.tag_dropout_enable")
    mode = str(work.get(f"{prefix}.tag_dropout_mode", "FULL"))
    share = work.read(f"{prefix}.tag_dropout_probability", number, 0.0)
    special = ("tag_dropout_special_tags_mode", "tag_dropout_special_tags", "tag_dropout_special_tags_regex")
    if not drops:
        work.spare(*(f"{prefix}.{name}" for name in ("tag_dropout_mode", "tag_dropout_probability", *special)),
                   why="no tags are left out")
    elif mode == "RANDOM":
        put(work, "data.tag_dropout", share, f"{prefix}.tag_dropout_enable", f"{prefix}.tag_dropout_probability")
    else:
        here = "data.tag_dropout"
        work.lose(f"{prefix}.tag_dropout_enable", f"its way is {mode}; here each tag is left out by itself", here)
        work.spare(f"{prefix}.tag_dropout_probability", f"{prefix}.tag_dropout_mode", why="it is told with it")
    if shuffles or drops and mode == "RANDOM":
        put(work, "data.keep_tags", work.read(f"{prefix}.keep_tags_count", whole, 1), f"{prefix}.keep_tags_count")
    else:
        work.spare(f"{prefix}.keep_tags_count", f"{prefix}.tag_delimiter", why="no tag is moved or left out")
