"""`[data]` or `[[data]]`: one set of pictures, or several in one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pydantic

from impasto.data.options import DataOptions


class DataSets(pydantic.RootModel[list[DataOptions]]):
    """`[[data]]`, two times or more. Each set has every option of `[data]` for itself, but for the cache."""

    @pydantic.model_validator(mode="after")
    def _agree(self) -> DataSets:
        if len(self.root) < 2:
            raise ValueError("one set of pictures is [data], not [[data]]")
        for number, one in enumerate(self.root):
            if one.source == "shards":
                raise ValueError(f"data.{number} has source = \"shards\", which is a run's only set: put all shards "
                                 "into one [data], or unpack them into folders")
        shares = [one.share is not None for one in self.root]
        if any(shares) and not all(shares):
            raise ValueError(f"data.{shares.index(False)} has no share, and others have: give all sets one, or none")
        if len({one.cache for one in self.root} - {None}) > 1:
            raise ValueError("all sets have one cache: say it once")
        return self

    @property
    def sets(self) -> Sequence[DataOptions]:
        """All of them, in their order."""
        return tuple(self.root)

    # --- what a run has once ------------------------------------------------------------------------------
    @property
    def resolution(self) -> int:
        """Pixels: the largest one."""
        return max(one.resolution for one in self.root)

    @property
    def caption(self) -> str | None:
        """The first caption that a set has for all of its pictures."""
        return next((one.caption for one in self.root if one.caption), None)

    @property
    def folder(self) -> str | None:
        """The first folder."""
        return next((one.folder for one in self.root if one.folder), None)


def one_or_several(value: Any) -> DataOptions | DataSets | None:
    """Check what a recipe has as `data`: a table, or a list of them, of which a single one is a table too.

    Raises `ValueError`, pydantic's own among them.
    """
    if value is None or isinstance(value, DataOptions | DataSets):
        return value
    if isinstance(value, list) and len(value) > 1:
        return DataSets.model_validate(value)
    one = DataOptions.model_validate(value[0] if isinstance(value, list) and value else value)
    if one.share is not None:
        raise ValueError("share is of several sets, [[data]]")
    return one


def cache_folder(data: DataOptions | DataSets) -> str | None:
    """The folder of the one cache; None: the user's cache directory."""
    return next((one.cache for one in data.sets if one.cache), None)


def label(number: int, data: DataOptions | DataSets) -> str:
    """What a set is called in messages: data, or data.0, data.1 of several."""
    return f"data.{number}" if len(data.sets) > 1 else "data"
