"""The model card: what an artifact is, how it is used, how it was made. Written from the artifact alone.

No place on the disk goes in: not the folder of the pictures, not even its last part; a base is told by its hub id or
its file's name. An artifact with output.metadata = "none" gets a card that is silent about the recipe, the prompts
and the captions too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import tomli_w
from huggingface_hub import ModelCardData

from impasto.core.errors import UserError
from impasto.data.sets import label
from impasto.deltas.told import kinds_of, rank_of
from impasto.families.load import is_hub_id
from impasto.formats.adapters import load_adapter
from impasto.training.kept_recipe import without_none
from impasto.training.recipe import Recipe, make_recipe
from impasto.training.sharing.parcel import Parcel
from impasto.training.sharing.usage import usage

#: hub ids of checkpoints that are known by their file's name
KNOWN_BASES = {
    "v1-5-pruned": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "v1-5-pruned-emaonly": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd-v1-4": "CompVis/stable-diffusion-v1-4",
    "stable-diffusion-v1-4": "CompVis/stable-diffusion-v1-4",
}

#: keys of a recipe that are of the machine and the user, not of what was made
OWN = {"data": ("folder", "shards", "cache"), "prior": ("folder",), "train": ("device",),
       "output": ("dir", "name", "checkpoint_every", "keep", "keep_every")}

FAMILIES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL",
            "sd3": "Stable Diffusion 3"}


def write_card(parcel: Parcel, repo: str, base_model: str | None = None) -> str:
    """README.md for the repository `owner/name`. `base_model`: the base's hub id, where the artifact cannot tell.

    Raises `UserError` for an adapter that cannot be read.
    """
    recipe = _recipe(parcel)
    base_model = base_model or _base_model(recipe)
    kinds = _kinds(parcel)
    front = _front(parcel, recipe, base_model, kinds).to_yaml()
    lines = [
        "---", front, "---", "", f"# {repo.partition('/')[2]}", "", *_about(parcel, recipe, base_model, kinds),
        *_samples(parcel), "## How to use it", "",
        *usage(parcel, repo, base_model, caption=_caption(recipe)),
        "## How it was made", "", *_made(parcel, recipe),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _recipe(parcel: Parcel) -> Recipe | None:
    """The recipe in the artifact; None where it keeps it, or where another version's keys stand in it."""
    if parcel.told is None:
        return None
    try:
        return make_recipe(parcel.told.recipe)
    except UserError:
        return None


def _base_model(recipe: Recipe | None) -> str | None:
    """The base's hub id, where the recipe has one or the file is a known one."""
    if recipe is None or recipe.base.init == "random":
        return None
    name = recipe.base.place
    if is_hub_id(name):
        return name
    own = PurePath(name).name
    return KNOWN_BASES.get(PurePath(own).stem if own.endswith((".safetensors", ".ckpt")) else own)


def _caption(recipe: Recipe | None) -> str:
    """The one caption of all pictures, which calls what was learned; "" where each had its own."""
    return (recipe.data.caption if recipe and recipe.data else None) or ""


def _kinds(parcel: Parcel) -> list[str]:
    """What is in an adapter ("lora", "hypernetwork"), as the hub tags it; nothing for a whole checkpoint."""
    if parcel.detected.kind == "hypernetwork":
        return [parcel.detected.kind]
    beside = ["hypernetwork"] if parcel.hypernetworks else []
    if parcel.detected.kind == "embedding":
        return ["textual_inversion", *beside]
    if parcel.detected.kind != "adapter":
        return []
    return sorted({kind for terms in load_adapter(parcel.artifact).deltas.values() for term in terms
                   for kind in kinds_of(term)}) + beside


def _front(parcel: Parcel, recipe: Recipe | None, base_model: str | None, kinds: list[str]) -> ModelCardData:
    tags = ["stable-diffusion", "text-to-image", "diffusers", *kinds, "impasto"]
    if recipe is not None and recipe.prior is not None:
        tags.insert(3, "dreambooth")
    more: dict[str, Any] = {}
    if caption := _caption(recipe):
        more["instance_prompt"] = caption
    if parcel.samples:  # the hub shows a picture under its prompt, and wants one
        more["widget"] = [{"text": sample.prompt or "-", "output": {"url": sample.place}} for sample in parcel.samples]
    return ModelCardData(base_model=base_model, library_name="diffusers", pipeline_tag="text-to-image",
                         tags=tags, **more)


def _about(parcel: Parcel, recipe: Recipe | None, base_model: str | None, kinds: list[str]) -> Iterator[str]:
    titles = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "dora": "DoRA", "dense": "difference",
              "textual_inversion": "textual inversion embedding"}
    own = [titles.get(kind, kind) for kind in kinds if not (parcel.hypernetworks and kind == "hypernetwork")]
    what = "/".join(own or kinds) or "fine-tuned checkpoint"
    what += " and a hypernetwork" if own and parcel.hypernetworks else ""
    family = FAMILIES.get(parcel.detected.family, parcel.detected.family)
    on = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else \
        _code(PurePath(recipe.base.place).name) if recipe else ""
    yield f"A {what}{f' for {family}' if family else ''}{f', trained on {on}' if on else ''}, made with Impasto."
    if caption := _caption(recipe):
        yield f"It answers to {_code(caption)}."
    yield ""


def _samples(parcel: Parcel) -> Iterator[str]:
    """A table of pictures over their prompts, three in a row."""
    for start in range(0, len(parcel.samples), 3):
        row = parcel.samples[start : start + 3]
        yield f"| {' | '.join(f'![sample {start + i}]({sample.place})' for i, sample in enumerate(row))} |"
        yield f"|{'---|' * len(row)}"
        yield from [f"| {' | '.join(_text(sample.prompt) for sample in row)} |", ""]


def _made(parcel: Parcel, recipe: Recipe | None) -> Iterator[str]:
    if parcel.told is None:
        yield "It does not say."
        return
    if recipe is None:
        yield "By a recipe of another version of Impasto, which its metadata holds."
        return
    train = recipe.train
    yield from ["| | |", "|---|---|"]
    facts = {
        "method": ", ".join(f"{method.kind}{_rank(method)}" for method in recipe.method),
        "steps": parcel.told.step, "pictures in a step": train.batch_size * train.accumulation,
        "learning rate": f"{train.learning_rate:g}, {train.schedule}", "optimizer": train.optimizer,
        "resolution": recipe.data.resolution if recipe.data else "", "seed": train.seed,
        "prior preservation": f"yes, {_code(recipe.prior.caption or '')}" if recipe.prior else "",
        "ranks": _ranks(parcel), "Impasto": parcel.told.environment.get("impasto", ""),
        "torch": parcel.told.environment.get("torch", ""),
    }
    yield from (f"| {name} | {value if name == 'prior preservation' else _text(str(value))} |"
                for name, value in facts.items() if value != "")
    toml = tomli_w.dumps(without_none(public(recipe))).rstrip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", toml)), default=0))
    yield from ["", "<details><summary>The recipe, without the places of base and pictures</summary>", "",
                f"{fence}toml", toml, fence, "", "</details>", "",
                f"`impasto reproduce {_shown(parcel.weights)} base.path=… {_folders(recipe)}` gives it back from the "
                "file, and says what differs on another machine."]


def public(recipe: Recipe) -> dict[str, Any]:
    """The recipe as anyone may read it: without places on a disk, the name of a base apart."""
    plain = recipe.plain()
    for section, keys in OWN.items():
        plain[section] = plain.get(section) and _without(plain[section], keys)
    for key in ("path", "vae"):
        if plain["base"][key] and not is_hub_id(plain["base"][key]):
            plain["base"][key] = PurePath(plain["base"][key]).name
    plain["output"] = {key: plain["output"][key] for key in ("format", "dtype")}
    return plain


def _folders(recipe: Recipe) -> str:
    """The settings that say where the pictures are."""
    if recipe.data is None:
        return "data.folder=…"
    return " ".join(f"{label(number, recipe.data)}.folder=…" for number in range(len(recipe.data.sets)))


def _without(tables: Any, keys: tuple[str, ...]) -> Any:
    """A section, or each of several, without those keys."""
    if isinstance(tables, list):
        return [_without(table, keys) for table in tables]
    return {key: value for key, value in tables.items() if key not in keys}


def _rank(method: Any) -> str:
    rank = getattr(method, "rank", None)
    return f" of rank {rank}" if rank is not None else ""


def _ranks(parcel: Parcel) -> str:
    """The ranks that an adapter really has, with the number of layers of each, where there are several."""
    if parcel.detected.kind != "adapter":
        return ""
    ranks = [rank for terms in load_adapter(parcel.artifact).deltas.values() for term in terms
             if (rank := rank_of(term)) is not None]
    return ", ".join(f"{rank} ({ranks.count(rank)} layers)" for rank in sorted(set(ranks)))


def _text(words: str) -> str:
    """Plain words in a cell of a table, whatever they hold."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", " ".join(words.split()))


def _code(words: str) -> str:
    """Words as they are to be typed."""
    words = " ".join(words.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", words)), default=0))
    pad = " " if "`" in words else ""
    return f"{fence}{pad}{words}{pad}{fence}" if words else ""


def _shown(name: str) -> str:
    return name.replace("`", "'")
