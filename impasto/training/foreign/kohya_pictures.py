"""What kohya's keys say together of pictures: folders, whose names are repeats and captions, sizes, prompts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from impasto.training.foreign.document import can_be_seen, lines_of
from impasto.training.foreign.engine import Left, Subset, Work
from impasto.training.foreign.kohya import ROWS
from impasto.training.foreign.table import nothing, number, text, whole

THEIRS = "kohya's own default, where the file says nothing"

#: keys that are of one set of pictures alone
OF_ONE = ("train_data_dir", "image_dir", "class_tokens", "num_repeats", "dataset_repeats",
          "conditioning_data_dir")

#: a file of prompts is not larger, bytes
PROMPTS = 1_000_000


def put(work: Work, to: str, becomes: Any, *keys: str, why: str = "") -> None:
    """`work.put` out of those keys that are there; where none is, it is kohya's default."""
    there = [key for key in keys if work.get(key) is not None]
    work.put(to, becomes, *there, why=why or ("" if there else THEIRS))


def pictures(work: Work) -> list[Subset]:
    """The folder, its captions and its class pictures, as far as the folder can be seen from here.

    Returns further sets of pictures, where kohya's folder holds several.
    """
    several: list[Subset] = []
    if work.get("image_dir"):
        work.spare("train_data_dir", "reg_data_dir", "in_json", why="the dataset config goes before it")
    else:
        several = _folder(work, "data", "train_data_dir", "")
        _folder(work, "prior", "reg_data_dir", "reg.")
    if not work.get("train_data_dir") and not work.get("image_dir"):
        work.fill("data.folder", "photos", "no folder of pictures is named")
    _caption(work, "data", "class_tokens", "image_dir")
    _caption(work, "prior", "reg.class_tokens", "reg.image_dir")
    masks(work)
    if work.get("reg.image_dir") or work.get("reg_data_dir"):
        work.told.notes.append("kohya fills half of its batches with class pictures; here they come on top of "
                               "train.batch_size: a step sees twice as many of your own")
    else:
        work.spare("prior_loss_weight", why="there are no class pictures")
    if work.becomes("data.caption") is None and not (work.get("caption_extension") or work.get("caption_extention")):
        work.told.notes.append("kohya reads .caption files where caption_extension is not given; Impasto reads what is "
                               "there, .txt before .caption (data.caption_source)")
    captions(work)
    return several


def shared_by_sets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of settings, those that hold for every set of pictures that does not say otherwise."""
    return {key: value for key, value in settings.items()
            if key not in OF_ONE and key in ROWS and ROWS[key].to.startswith("data.")}


def further_set(work: Work, subset: Subset, shared: Mapping[str, Any]) -> None:
    """One more set of pictures, as kohya treats it: what it does not say itself is `shared`."""
    if nothing(subset.settings.get("image_dir")):
        work.told.lost.append(Left(subset.label, None, "it names no folder"))
        return
    work.add_set(subset, shared, (_caption_of_set, masks, captions, sizes))


def _caption_of_set(work: Work) -> None:
    _caption(work, "data", "class_tokens", "image_dir")


def _folder(work: Work, section: str, key: str, prefix: str) -> list[Subset]:
    """One of kohya's folders of folders: each in it is a set of pictures, of class pictures a single one can be."""
    if not work.get(key):
        return []
    found = numbered(str(work.get(key)))
    if len(found) == 1 or found and section == "data":
        folder, repeats, words = found[0]
        which = "only" if len(found) == 1 else "first"
        work.put(f"{section}.folder", str(folder), key, why=f"the {which} folder of pictures in it")
        implied = {f"{prefix}num_repeats": repeats, f"{prefix}class_tokens": words, f"{prefix}image_dir": str(folder)}
        work.settings |= implied
        work.waiting |= {name: value for name, value in implied.items() if not name.endswith("image_dir")}
        return [Subset(f"{key}.{folder.name}", {"image_dir": str(folder), "num_repeats": repeats,
                                                "class_tokens": words}) for folder, repeats, words in found[1:]]
    names = ", ".join(folder.name for folder, _, _ in found)
    work.told.notes.append(
        f"kohya takes repeats and captions from the names of folders in {work.get(key)} "
        f"({names or 'as in 10_sks dog: 10 times, caption sks dog'}); here all pictures come equally often, once in "
        f"an epoch: give {section}.caption or .txt captions")
    return []


def numbered(folder: str) -> list[tuple[Path, int, str]]:
    """kohya's folders of pictures in one: "10_sks dog" is 10 times, with the caption "sks dog"."""
    try:
        names = sorted(path for path in Path(folder).iterdir() if path.is_dir())
    except (OSError, ValueError):
        return []
    matched = [(path, re.fullmatch(r"(\d{1,9})(?:_(.*))?", path.name)) for path in names]
    return [(path, int(match[1]), match[2] or "") for path, match in matched if match and int(match[1])]


def _caption(work: Work, section: str, key: str, folder_key: str) -> None:
    """Class tokens are kohya's caption of pictures without a file: here a caption is for all of them."""
    if not work.get(key):
        return
    folder = Path(str(work.get(folder_key, "")))
    if not can_be_seen(folder, folder=True):
        work.lose(key, f"kohya's caption of pictures without a caption file; whether {folder} has such files cannot be "
                  f"seen from here: if it has none, give {section}.caption", f"{section}.caption")
    elif any(path.suffix in (".txt", ".caption") for path in folder.iterdir()):
        work.lose(key, "kohya's caption of pictures without a caption file, and here are caption files",
                  f"{section}.caption")
    elif words := work.read(key, text, ""):
        work.put(f"{section}.caption", words, key)


def masks(work: Work) -> None:
    """A folder of masks, or the pictures' own transparency: kohya takes whichever there is, and nothing outside."""
    folder = work.read("conditioning_data_dir", text, "")
    if folder and work.on("masked_loss"):
        work.put("data.mask", "files", "masked_loss")
        work.put("data.masks", folder, "conditioning_data_dir")
        work.spare("alpha_mask", why="the masks of a folder go before it")
    elif work.on("alpha_mask"):
        put(work, "data.mask", "alpha", "alpha_mask", *(["masked_loss"] if work.on("masked_loss") else []))
        work.put("data.missing_masks", "whole", why="kohya counts pictures without transparency in full")
    else:
        work.spare("masked_loss", why="there are no masks")
        work.spare("conditioning_data_dir", "alpha_mask", why="the loss is not masked")
        return
    work.put("data.mask_floor", 0.0, why="kohya counts nothing outside a mask")


def captions(work: Work) -> None:
    """Where captions are, and what is done with them in each use."""
    for key in ("caption_extension", "caption_extention"):
        kind = str(work.get(key, "")).lstrip(".")
        if kind in ("txt", "caption"):
            work.put("data.caption_source", kind, key)
        elif kind:
            work.lose(key, "captions are .txt, .caption or .json files, or in tables", "data.caption_source")
    before, after = (work.read(key, text, "").strip() for key in ("caption_prefix", "caption_suffix"))
    keep = work.read("keep_tokens", whole, 0)
    if before or after:
        put(work, "data.caption_template", " ".join(filter(None, (before, "{}", after))), "caption_prefix",
            "caption_suffix", why="it does not move when tags are shuffled")
        separator = str(work.get("caption_separator", ","))
        own = sum(bool(part.strip()) for part in before.split(separator))
        if keep and own and before.endswith(separator):
            work.put("data.keep_tags", max(keep - own, 0), "keep_tokens", why="kohya counts the prefix's tags too")
    if not (work.on("shuffle_caption") or work.read("caption_tag_dropout_rate", number, 0.0)):
        work.spare("keep_tokens", why="no tag is moved or left out")


def sizes(work: Work) -> None:
    """Resolution and buckets, which kohya has off unless they are asked for."""
    side = 512
    sides = work.read("resolution", _sides, [])
    if sides:
        square = len(set(sides)) == 1
        side = sides[0] if square else max(round(math.sqrt(math.prod(sides)) / 64), 1) * 64
        work.put("data.resolution", side, "resolution", why="" if square else "a square of about that area")
    buckets = work.on("enable_bucket")
    put(work, "data.buckets", buckets, "enable_bucket")
    if not buckets or work.on("bucket_no_upscale"):
        also = [] if buckets else ["bucket_reso_steps", "bucket_no_upscale"]
        work.spare("min_bucket_reso", "max_bucket_reso", *also,
                   why="it has no effect with " + ("bucket_no_upscale" if buckets else "buckets off"))
        return
    for key, theirs, ours in (("min_bucket_reso", 256, "bucket_min"), ("max_bucket_reso", 1024, "bucket_max")):
        if work.get(key) is not None or side != 512:
            put(work, f"data.{ours}", work.read(key, whole, theirs), key)


def _sides(value: Any) -> list[int]:
    """512, "512", "512,768" or [512, 768]."""
    sides = [whole(each) for each in (value if isinstance(value, list) else str(value).split(","))]
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError("is no size")
    return sides


def prompts(work: Work, path: Path) -> None:
    """Prompts out of a text file of kohya's, one a line, the negative and the rest behind " --"."""
    key = "sample_prompts"
    lines = lines_of(path, PROMPTS) if path.suffix == ".txt" else []
    found = [line.split(" --") for line in lines if not line.startswith("#")]
    if not found:
        return work.lose(key, "is no text file that can be seen from here: write its prompts into the recipe",
                         "sample.prompts")
    work.put("sample.prompts", [each[0].strip() for each in found], key)
    options = {option for each in found for option in each[1:]}
    for letter, to, turn in (("n", "negative", text), ("s", "steps", whole), ("l", "guidance", number)):
        values = {option[2:].strip() for option in options if option.startswith(f"{letter} ")}
        try:
            if len(values) == 1:
                work.put(f"sample.{to}", turn(values.pop()), why=f"--{letter} in {path.name}")
        except ValueError:
            values = {"", " "}
        if len(values) > 1:
            work.told.notes.append(f"{path.name} has several --{letter}; all previews here have one sample.{to}")
