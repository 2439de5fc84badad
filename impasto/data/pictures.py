"""The pictures of a recipe's sets: to learn from, and to validate with; and the fingerprint of what is learned from."""

from __future__ import annotations

from collections.abc import Sequence

from impasto.core.errors import UserError
from impasto.core.files import key_of
from impasto.core.progress import SILENT, Reporter
from impasto.core.rng import seed_for
from impasto.data.augment import Augment
from impasto.data.dataset import list_folder, located
from impasto.data.heldout import beyond, divide
from impasto.data.items import Item, collect, draw_world
from impasto.data.many import Many
from impasto.data.options import DataOptions, ValidationOptions
from impasto.data.phrasing import Phrasing
from impasto.data.sets import DataSets, label
from impasto.data.shards.items import shard_items


def pictures_of(data: DataOptions | DataSets, validation: ValidationOptions | None, seed: int,
                report: Reporter = SILENT, notes: list[str] | None = None) -> tuple[Sequence[Item], Sequence[Item]]:
    """The pictures to learn from, and those that are held out; both set by set.

    Raises `UserError` as `collect` and `divide` do; of several sets that cannot be used, it tells of all.
    """
    if data.sets[0].source == "shards":  # the only set
        return _divided(shard_items(data.sets[0], report, notes), data, validation, seed, report, notes)
    kept: list[Item] = []
    held_out: list[Item] = []
    found: list[Item] = []
    refused: list[tuple[str, UserError]] = []
    for number, one in enumerate(data.sets):
        if one.source == "world":
            assert one.pictures is not None
            own = seed_for(seed, "data", number) if number else seed  # two sets draw different pictures
            drawn = draw_world(one, own, one.pictures + beyond(one.pictures, validation), number)
            kept += drawn[:one.pictures]
            held_out += drawn[one.pictures:]
            continue
        told: list[str] = []
        try:
            found += collect(list_folder(located(str(one.folder))), one, report, weight=one.loss_weight, notes=told,
                             number=number)
        except UserError as error:
            refused.append((label(number, data), error))
        if notes is not None:
            notes += [f"{label(number, data)}: {line}" if len(data.sets) > 1 else line for line in told]
    _refuse(refused)
    if found and validation is not None:
        learned, out = _divided(found, data, validation, seed, report, notes)
        found = list(learned)
        held_out += out
    return (sorted([*kept, *found], key=lambda item: item.handling.number),
            sorted(held_out, key=lambda item: item.handling.number))


def _divided(items: Sequence[Item], data: DataOptions | DataSets, validation: ValidationOptions | None, seed: int,
             report: Reporter, notes: list[str] | None) -> tuple[Sequence[Item], Sequence[Item]]:
    """Pictures of folders, or of shards, to learn from and to validate with."""
    if validation is None:
        return items, []
    apart = None if validation.folder is None else \
        collect(list_folder(located(validation.folder)), data.sets[0], report, "held-out pictures", notes=notes)
    kept, held_out, told = divide(items, apart, validation, seed)
    if notes is not None:
        notes += told
    return kept, held_out


def _refuse(refused: Sequence[tuple[str, UserError]]) -> None:
    """Raise what is wrong with the sets, all of it at once."""
    if len(refused) == 1:
        raise refused[0][1]
    if refused:
        raise UserError(f"{len(refused)} sets of pictures cannot be used:"
                        + "".join(f"\n{name}: {error}" for name, error in refused), where="data")


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
                   [(item.picture.digest, item.caption, item.placement) for item in items] for items in streams],
                  *more)
