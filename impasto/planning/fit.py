"""What to change so that a run fits a card: means in the order of what they cost, each tried on a forecast."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from impasto.core.errors import UserError
from impasto.core.progress import SILENT, Reporter
from impasto.methods import METHODS
from impasto.planning.forecast import Forecast
from impasto.training.recipe import Recipe, make_recipe

#: a change of less than this share of the peak is none
WORTH = 0.005
#: ranks are not halved below this one
LEAST_RANK = 4


@dataclass(frozen=True)
class Change:
    """Settings to change together, by their keys ("train.checkpointing"), and what that costs, in words."""

    settings: Mapping[str, Any]
    costs: str

    @property
    def overrides(self) -> list[str]:
        """As they are said on the command line."""
        return [f"{key}={_said(value)}" for key, value in self.settings.items()]


@dataclass(frozen=True)
class Made:
    """A change that was made, and the peak without and with it, in bytes."""

    change: Change
    before: int
    after: int


@dataclass(frozen=True)
class Fit:
    """A recipe that fits; or, if none does, the one of the lowest peak."""

    recipe: Recipe
    made: tuple[Made, ...]
    forecast: Forecast
    fits: bool


#: what a recipe will take
Forecaster = Callable[[Recipe], Forecast]


def fit(recipe: Recipe, room: int, forecast: Forecaster, first: Forecast | None = None, report: Reporter = SILENT
        ) -> Fit:
    """The cheapest changes after which `forecast` says that a run needs no more than `room` bytes.

    Means are added from the cheapest to the dearest until it fits; then those that are not needed after all, or whose
    settings a later one has anew, are taken back, the dearest first. `first`: the forecast of the recipe as it is.
    Raises what the first forecast raises.
    """
    forecast = _once(forecast)
    now, current, made = first or forecast(recipe), recipe, list[Made]()
    alone = now
    with report.phase("looking for what to change"):
        for means in MEANS:
            while now.peak_bytes > room and (change := means(current, now)) is not None:
                tried = _tried(current, [change], forecast)
                if tried is None or tried[1].peak_bytes > (1 - WORTH) * now.peak_bytes:
                    break
                made.append(Made(change, now.peak_bytes, tried[1].peak_bytes))
                current, now = tried
        fits, count = now.peak_bytes <= room, len(made)
        for each in reversed(made[:-1]):
            others = [one for one in made if one is not each]
            later = {key for one in made[made.index(each) + 1:] for key in one.change.settings}
            if not fits and not each.change.settings.keys() <= later:
                continue
            tried = _tried(recipe, [one.change for one in others], forecast)
            if tried is not None and tried[1].peak_bytes <= max(room, now.peak_bytes):
                made, (current, now) = others, tried
        if len(made) < count:
            made = _anew(recipe, alone, [one.change for one in made], forecast)
    return Fit(current, tuple(made), now, fits)


def _once(forecast: Forecaster) -> Forecaster:
    """A forecaster that is asked once for each recipe."""
    known: dict[str, Forecast] = {}

    def asked(recipe: Recipe) -> Forecast:
        key = recipe.model_dump_json()
        if key not in known:
            known[key] = forecast(recipe)
        return known[key]

    return asked


def _anew(recipe: Recipe, first: Forecast, changes: Sequence[Change], forecast: Forecaster) -> list[Made]:
    """Changes with the peaks that they have without those that were taken back."""
    made, before = list[Made](), first.peak_bytes
    for count, change in enumerate(changes, 1):
        tried = _tried(recipe, changes[:count], forecast)
        after = before if tried is None else tried[1].peak_bytes
        made.append(Made(change, before, after))
        before = after
    return made


def changed(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with these settings; what it leaves to defaults stays left to them. Raises `UserError`."""
    tree: Any = recipe.model_dump(mode="json", exclude_unset=True)
    for key, value in settings.items():
        *sections, last = key.split(".")
        node = tree
        for name in sections:
            node = node[int(name)] if isinstance(node, list) else node.setdefault(name, {})
        node[last] = value
    return make_recipe(tree)


def _tried(recipe: Recipe, changes: Sequence[Change], forecast: Forecaster) -> tuple[Recipe, Forecast] | None:
    """The recipe with changes, and its forecast; None where one of them is refused."""
    settings = {key: value for change in changes for key, value in change.settings.items()}
    try:
        other = changed(recipe, settings)
        return other, forecast(other)
    except UserError:
        return None


def _said(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, list) else str(value)


# --- the means, from the cheapest to the dearest ---------------------------------------------------------


def _precision(recipe: Recipe, now: Forecast) -> Change | None:
    if recipe.train.precision != "fp32":
        return None
    return Change({"train.precision": "bf16"}, "rounding of what is computed; as a rule nobody sees it")


def _captions(recipe: Recipe, now: Forecast) -> Change | None:
    """Text encoders that nothing trains leave the card where captions can be encoded beforehand."""
    data: Any = recipe.data
    if data is None or not (getattr(data, "shuffle_tags", False) or getattr(data, "tag_dropout", 0)):
        return None
    return Change({"data.shuffle_tags": False, "data.tag_dropout": 0.0},
                  "tags keep their order: captions are encoded once, and the text encoders leave the card")


def _previews(recipe: Recipe, now: Forecast) -> Change | None:
    if "preview" not in now.moment or not recipe.sample.every:
        return None
    return Change({"sample.every": 0}, "no pictures while it trains")


def _checkpointing(recipe: Recipe, now: Forecast) -> Change | None:
    if recipe.train.checkpointing is True:
        return None
    return Change({"train.checkpointing": True}, "about a third more time; equal results")


def _micro_batches(recipe: Recipe, now: Forecast) -> Change | None:
    size = recipe.train.batch_size
    if size % 2 or recipe.train.fused_backward:
        return None
    return Change({"train.batch_size": size // 2, "train.accumulation": 2 * recipe.train.accumulation},
                  "a little time; the gradient of as many pictures")


def _weights(recipe: Recipe, now: Forecast) -> Change | None:
    """Full fine-tuning with weights of 16 bits, rounded by chance; what is computed with them has 16 bits too."""
    for number, method in enumerate(recipe.method):
        if getattr(method, "weights", None) == "fp32":
            narrow = {} if recipe.train.precision in ("auto", "bf16") else {"train.precision": "bf16"}
            return Change({f"method.{number}.weights": "bf16", **narrow}, "weights in 16 bits, rounded up or down by "
                          "chance, so that small steps count on the average")
    return None


def _fused(recipe: Recipe, now: Forecast) -> Change | None:
    """Gathered micro-batches become one again, as gradients that are let go add up to nothing: what that costs, the
    forecast says."""
    train = recipe.train
    if train.fused_backward or not any(METHODS.get(method.kind).in_place for method in recipe.method):
        return None
    settings: dict[str, Any] = {"train.fused_backward": True, "train.clip": 0.0}
    if train.accumulation > 1:
        settings |= {"train.batch_size": train.batch_size * train.accumulation, "train.accumulation": 1}
    return Change(settings, "gradients are not clipped" if train.clip else "equal results")


def _eight_bits(recipe: Recipe, now: Forecast) -> Change | None:
    if recipe.train.optimizer != "adamw":
        return None
    return Change({"train.optimizer": "adamw8bit"}, "states in eight bits; needs the package bitsandbytes")


def _quantised(kind: str, costs: str, key: str, order: tuple[str, ...]) -> Callable[[Recipe, Forecast], Change | None]:
    def means(recipe: Recipe, now: Forecast) -> Change | None:
        if getattr(recipe.base, key) not in order:
            return None
        return Change({f"base.{key}": kind}, costs)

    return means


def _offload(what: str, costs: str) -> Callable[[Recipe, Forecast], Change | None]:
    def means(recipe: Recipe, now: Forecast) -> Change | None:
        there: list[str] = list(recipe.train.offload)
        # states in eight bits share their tables, and cannot move: whole ones can, and are not there at all
        whole = {"train.optimizer": "adamw"} if (what, recipe.train.optimizer) == ("optimizer", "adamw8bit") else {}
        return None if what in there else Change({"train.offload": [*there, what], **whole}, costs)

    return means


def _rank(recipe: Recipe, now: Forecast) -> Change | None:
    ranks = {number: rank for number, method in enumerate(recipe.method)
             if isinstance(rank := getattr(method, "rank", None), int) and rank >= 2 * LEAST_RANK}
    return Change({f"method.{number}.rank": rank // 2 for number, rank in ranks.items()},
                  "room for less to be learned") if ranks else None


#: section and key of all that the means set
TOUCHED = (("train", "precision"), ("sample", "every"), ("data", "shuffle_tags"), ("data", "tag_dropout"),
           ("train", "checkpointing"), ("train", "batch_size"), ("train", "accumulation"), ("method", "weights"),
           ("train", "fused_backward"), ("train", "clip"), ("train", "optimizer"), ("base", "quantize"),
           ("base", "quantize_text"), ("train", "offload"), ("method", "rank"))

#: each is asked again, while it has an answer and helps
MEANS: tuple[Callable[[Recipe, Forecast], Change | None], ...] = (
    _precision, _previews, _captions, _checkpointing, _micro_batches, _fused, _weights, _eight_bits,
    _quantised("int8", "frozen weights in a byte each, with a scale for each output; some time", "quantize", ("none",)),
    _quantised("int8", "text encoders' weights in a byte each", "quantize_text", ("none",)),
    _offload("optimizer", "the optimizer's states lie in the computer's memory, and are fetched for each step"),
    _quantised("nf4", "frozen weights in half a byte each: they are about a tenth off; some time", "quantize",
               ("none", "int8")),
    _offload("activations", "what the backward needs lies in the computer's memory, and is fetched: slow"),
    _offload("blocks", "the network's blocks lie in the computer's memory, and are fetched: slow"),
    _rank,
)
