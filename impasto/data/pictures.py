"""The pictures of a recipe: to learn from, to validate with, and of the class; and the fingerprint of what is learned.

All of them are looked at before anything is loaded, and what is wrong with any of them is told at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from impasto.core.errors import UserError
from impasto.core.files import key_of
from impasto.core.progress import SILENT, Reporter
from impasto.core.rng import seed_for
from impasto.data.augment import Augment
from impasto.data.dataset import check_folder, list_folder, located
from impasto.data.heldout import beyond, divide
from impasto.data.items import Item, collect, draw_world, unweighed
from impasto.data.many import Many
from impasto.data.options import DataOptions, PriorOptions, ValidationOptions, of_class_pictures
from impasto.data.phrasing import Phrasing
from impasto.data.sets import DataSets, label
from impasto.data.shards.items import shard_items


@dataclass(frozen=True)
class Pictures:
    """What a recipe's sets and folders hold; `learned` and `held_out` set by set."""

    learned: Sequence[Item]
    held_out: Sequence[Item]
    of_class: Sequence[Item] | None  # None: `[prior]` names no folder, and they are yet to be drawn, or there are none
    notes: list[str]  # lines for the user: what lies there and is not used, what is held out


def pictures_of(data: DataOptions | DataSets, prior: PriorOptions | None, validation: ValidationOptions | None,
                seed: int, report: Reporter = SILENT) -> Pictures:
    """Look at every picture of all sets, of `[validation]`'s folder and of `[prior]`'s.

    Raises one `UserError` with all files that cannot be used, wherever they lie; then as `divide` does.
    """
    wrong, notes, of_class_notes = _Wrong(), list[str](), list[str]()
    drawn, spare = _drawn(data, validation, seed)
    found = _found(data, report, notes, wrong)
    apart = of_class = None
    if found is not None and validation is not None and validation.folder is not None:
        with wrong.told("validation"):
            listing = list_folder(located(validation.folder), "validation.folder")
            apart = collect(listing, data.sets[0], report, "held-out pictures", notes=notes)
    if prior is not None and prior.folder is not None:
        with wrong.told("prior"):
            listing = list_folder(located(prior.folder), "prior.folder")
            of_class = collect(listing, of_class_pictures(data.sets[0], prior), report, "class pictures", prior.weight,
                               of_class_notes)
    wrong.refuse()
    learned, held_out = found if found is not None else (), ()
    if found is not None and validation is not None:
        learned, held_out, told = divide(found, apart, validation, seed)
        notes += told
    return Pictures(_by_set(drawn, learned), _by_set(spare, held_out), of_class, notes + of_class_notes)


def _drawn(data: DataOptions | DataSets, validation: ValidationOptions | None, seed: int
           ) -> tuple[list[Item], list[Item]]:
    """Pictures of the drawn world, to learn from and to validate with."""
    kept: list[Item] = []
    held_out: list[Item] = []
    for number, one in enumerate(data.sets):
        if one.source == "world":
            assert one.pictures is not None
            own = seed_for(seed, "data", number) if number else seed  # two sets draw different pictures
            drawn = draw_world(one, own, one.pictures + beyond(one.pictures, validation), number)
            kept += drawn[:one.pictures]
            held_out += map(unweighed, drawn[one.pictures:])
    return kept, held_out


def _found(data: DataOptions | DataSets, report: Reporter, notes: list[str], wrong: _Wrong) -> Sequence[Item] | None:
    """Pictures of all folders, or of shards, which are the only set; None where there is neither."""
    found: list[Item] = []
    for number, one in enumerate(data.sets):
        name, own = label(number, data), list[str]()
        with wrong.told(name):
            if one.source == "shards":
                return shard_items(one, report, notes)
            if one.source == "folder":
                folder = located(check_folder(one.folder, f"{name}.folder"))
                found += collect(list_folder(folder, f"{name}.folder"), one, report,
                                 weight=one.loss_weight, notes=own, number=number)
        notes += [f"{name}: {line}" if len(data.sets) > 1 else line for line in own]
    return None if all(one.source == "world" for one in data.sets) else found


def _by_set(drawn: Sequence[Item], found: Sequence[Item]) -> Sequence[Item]:
    if isinstance(found, Many):
        return found
    return sorted([*drawn, *found], key=lambda item: item.handling.number)


@dataclass
class _Wrong:
    """What is wrong with parts of a recipe, gathered to be told at once."""

    found: list[tuple[str, UserError]] = field(default_factory=list)

    @contextlib.contextmanager
    def told(self, part: str) -> Iterator[None]:
        """What goes wrong in the block is of this part."""
        try:
            yield
        except UserError as error:
            self.found.append((part, error))

    def refuse(self) -> None:
        """Raise it, if there is any."""
        if len(self.found) == 1:
            raise self.found[0][1]
        if self.found:
            lines = "".join(f"\n{part}: {error}" for part, error in self.found)
            raise UserError(f"{len(self.found)} sets of pictures cannot be used:{lines}")


def data_fingerprint(data: DataOptions | DataSets, streams: Sequence[Sequence[Item]]) -> str:
    """A digest of contents, captions and cuts, in order, of pictures, and of class pictures if there are any.

    Of one set it is what it ever was; of several it is made of the sets' own.
    """
    if len(data.sets) > 1:
        own = [[item for item in streams[0] if item.handling.number == number] for number in range(len(data.sets))]
        return key_of("sets", [data_fingerprint(one, [items]) for one, items in zip(data.sets, own, strict=True)],
                      [data_fingerprint(data.sets[0], streams[1:])] * (len(streams) > 1))
    one = data.sets[0]
    more = [facts for facts in (Phrasing.of(one).facts, Augment.of(one).facts) if facts]
    return key_of(one.flip, one.background,
                  [items.facts if isinstance(items, Many) else
                   [(item.picture.digest, item.caption, item.placement, *item.own_facts) for item in items]
                   for items in streams],
                  *more)
