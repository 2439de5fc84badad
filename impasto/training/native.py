"""The size of pictures where a recipe names none: the one that the base was made for, told from its header."""

from __future__ import annotations

import pydantic

from impasto.core.errors import UserError
from impasto.data.options import DataOptions
from impasto.families.load import locate
from impasto.formats.checkpoint import Checkpoint, open_checkpoint
from impasto.training.recipe import Recipe


def at_native_size(recipe: Recipe, checkpoint: Checkpoint | None = None) -> Recipe:
    """The recipe, its sets of pictures at the base's own size where they have none: 1024 for SDXL, say.

    The base is that of the recipe, or `checkpoint`, opened already.

    Raises `UserError` for a base that cannot be opened, or bounds of buckets that leave its size out.
    """
    data = recipe.data
    if data is None or all(_sized(one) for one in data.sets):
        return recipe
    if checkpoint is None:
        checkpoint = open_checkpoint(locate(recipe.base.place, download=recipe.base.download), weights=False)
    side = checkpoint.predicting(recipe.base.prediction).native_size
    if not side:
        return recipe
    sets = [one if _sized(one) else _at(one, side) for one in data.sets]
    changed = sets[0] if isinstance(data, DataOptions) else type(data).model_construct(sets)
    return recipe.model_copy(update={"data": changed})


def _sized(data: DataOptions) -> bool:
    return bool({"resolution", "resolutions"} & data.model_fields_set)


def _at(data: DataOptions, side: int) -> DataOptions:
    told = {key: value for key, value in data.model_dump().items() if key in data.model_fields_set}
    try:
        return DataOptions.model_validate({**told, "resolution": side})
    except pydantic.ValidationError as error:
        what = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise UserError(f"{what}; the resolution is the base's own", where="data", fix="give data.resolution") from None
