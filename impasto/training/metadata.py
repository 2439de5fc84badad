"""What an artifact tells of how it was made. All values are strings, as safetensors asks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

import impasto
from impasto.data.shards.access import is_url
from impasto.families.load import is_hub_id
from impasto.families.weights import Merged
from impasto.formats.checkpoint import WORDS
from impasto.training.recipe import Recipe

#: keys that name places on the user's disk: only their last part goes into a file that may be shared
PLACES = [("base", "path"), ("base", "vae"), ("base", "adapters"), ("base", "text_encoders"), ("method", "warm_start"),
          ("data", "folder"), ("data", "masks"), ("data", "sources"), ("data", "shards"), ("data", "cache"),
          ("prior", "folder"), ("validation", "folder"), ("output", "dir")]

#: keys that say whom else to tell of a run: they are of the one who trains, not of what is trained
TOLD = ["trackers", "track_every", "push_to", "push_private"]


def metadata(recipe: Recipe, step: int, *, base: dict[str, str], data: str,
             environment: dict[str, str], merged: Sequence[Merged] = (), prediction: str = "") -> dict[str, str]:
    """kohya's `ss_*` keys that other programs show, and under `impasto.` all that `impasto reproduce` needs: the
    recipe, fingerprints of the base's components as its files hold them and of the data, what adapters were merged into
    it before, in how many bits it was held, and what last bits depend on. `prediction`: of the base's network, of which
    the specification of models has two kinds."""
    train = recipe.train
    held = {key: kind for key in ("quantize", "quantize_text") if (kind := getattr(recipe.base, key)) != "none"}
    before = [{"file": each.name, "hash": each.digest, "strength": each.strength} for each in merged]
    return {
        **({"impasto.merged": json.dumps(before)} if before else {}),
        **({"modelspec.prediction_type": WORDS[prediction]} if prediction in WORDS else {}),
        **({"impasto.quantised": json.dumps(held)} if held else {}),
        "ss_learning_rate": str(recipe.method[0].learning_rate or train.learning_rate),
        "ss_lr_scheduler": train.schedule,
        "ss_lr_warmup_steps": str(train.warmup),
        "ss_optimizer": train.optimizer + _arguments(train.optimizer_options),
        "ss_batch_size_per_device": str(train.batch_size),
        "ss_gradient_accumulation_steps": str(train.accumulation),
        "ss_steps": str(step),
        "ss_seed": str(train.seed),
        "ss_mixed_precision": train.precision,
        "ss_output_name": recipe.output.name or PurePath(recipe.output.dir).name,
        "ss_sd_model_name": PurePath(recipe.base.path or "").name,
        "ss_clip_skip": str(recipe.base.clip_skip + 1),
        "ss_resolution": str(recipe.data.resolution) if recipe.data else "",
        "impasto.version": impasto.__version__,
        "impasto.step": str(step),
        "impasto.recipe": json.dumps(shareable(recipe.plain())),
        "impasto.base": json.dumps(base),
        "impasto.data": data,
        "impasto.environment": json.dumps(environment),
    }


def _arguments(options: dict[str, Any]) -> str:
    """(name=value, …) behind an optimizer's name, as kohya has it."""
    return f"({','.join(f'{key}={value}' for key, value in options.items())})" if options else ""


def shareable(plain: dict[str, Any]) -> dict[str, Any]:
    """The recipe with every place cut to its last part, a base's hub id apart, and without whom to tell of it."""
    for name, key in PLACES:
        tables = plain.get(name) or {}
        for section in tables if isinstance(tables, list) else [tables]:
            place = section.get(key)
            if place and not ((name, key) == ("base", "path") and is_hub_id(place)):
                section[key] = [_last(one) for one in place] if isinstance(place, list) else _last(place)
    for method in plain["method"]:
        for table in (method, *(method.get("tokens") or {}).values()):
            if table.get("initial_file"):
                table["initial_file"] = _last(table["initial_file"])
    plain["output"] = {key: value for key, value in plain["output"].items() if key not in TOLD}
    return plain


def _last(place: str) -> str:
    return PurePath(urlsplit(place).path if is_url(place) else place).name
