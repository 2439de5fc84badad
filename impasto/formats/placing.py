"""Finding a network's tensors in a file: its configuration, and the place of each tensor that it wants."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from impasto.core.errors import UserError
from impasto.formats.configs import Part
from impasto.formats.entries import Entry
from impasto.formats.source import Place, Source
from impasto.formats.tensor_files import TensorFile

#: more tensors than any network of these families has: a configuration that wants them is no real one
MOST_TENSORS = 20_000


def spelled(keys: Iterable[str], prefix: str, spelling: Callable[[str], str]) -> dict[str, str]:
    """Today's name -> key. Of two keys that come to the same name the one that is it counts, else the first; the other
    is surplus."""
    found: dict[str, str] = {}
    for key in keys:
        own = key.removeprefix(prefix)
        name = spelling(own)
        found[name] = key if name == own else found.get(name, key)
    return found


def derived(path: Path, name: str, part: Part, spelled: Mapping[str, str], file: TensorFile) -> dict[str, Any]:
    """A component's configuration: the published one, what shapes tell, what the file records."""
    with _naming(path):
        config = {**part.config, **part.derive({word: file.shapes[key] for word, key in spelled.items()})}
    config.update(_recorded(path, name, part, file.metadata))
    groups = config.get("norm_num_groups", 1)
    if any(width % groups for width in config.get("block_out_channels", ())):
        raise UserError(f"has a {name} whose channels {config['block_out_channels']} are no multiples of {groups}, "
                        "the groups of its norms", where=path,
                        fix="such a file records its settings in the metadata impasto.config; or use a folder")
    return config


def _recorded(path: Path, name: str, part: Part, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file of ours records of the settings that shapes do not tell."""
    try:
        told = json.loads(metadata.get("impasto.config", "{}")).get(name, {})
        kinds = {key: type(part.config[key]) for key in part.untold}
        good = all(type(value) is kinds[key] and (kinds[key] is str or min(_listed(value)) > 0)
                   for key, value in told.items())
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise UserError(f"has metadata impasto.config that cannot be read for its {name}", where=path,
                        fix="known settings: " + ", ".join(part.untold))
    return told


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def place(path: Path, name: str, part: Part, config: Mapping[str, Any], spelled: Mapping[str, str],
          file: TensorFile, *, ldm: bool) -> Source:
    """Find every tensor that the configuration wants. `UserError` for those missing, or of another shape."""
    places: dict[str, Place] = {}
    missing: list[str] = []
    wrong: list[str] = []
    for entry in _entries(path, part, config):
        wanted = entry.ldm if ldm else entry.name
        if ldm and entry.how == "identity":
            places[entry.name] = Place("", entry.shape, how=entry.how)
            continue
        key = spelled.get(wanted)
        if key is None:
            missing.append(wanted)
        elif _squeezed(file.shapes[key]) != _squeezed(shape := entry.ldm_shape if ldm else entry.shape):
            wrong.append(f"{key} is {file.shapes[key]}, where {shape} belongs")
        else:
            places[entry.name] = Place(key, entry.shape, entry.piece, entry.how) if ldm else Place(key, entry.shape)
    if missing:
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        total = len(missing) + len(wrong) + len(places)
        raise UserError(f"lacks {len(missing)} of {total} tensors of its {name}: {shown}", where=path,
                        fix="the file is incomplete: download it again")
    if wrong:
        raise UserError(f"has tensors of another shape than its {name} wants: {wrong[0]}", where=path,
                        fix="the file is damaged, or its configuration is another one's")
    return Source(file, places)


def _entries(path: Path, part: Part, config: Mapping[str, Any]) -> list[Entry]:
    entries = []
    with _naming(path):
        for entry in part.entries(config):
            entries.append(entry)
            if not all(isinstance(n, int) for n in entry.shape):
                raise TypeError(f"{entry.name} would be {entry.shape}")
            if len(entries) > MOST_TENSORS:
                raise UserError("describes a network of too many tensors")
    return entries


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors about a network name the file; a configuration that makes no sense is the user's to mend."""
    try:
        yield
    except UserError as error:
        raise UserError(error.what, where=path, fix=error.fix) from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"has a configuration that describes no network ({error})", where=path,
                        fix="download it again") from error


def left_over(source: Source) -> list[str]:
    """The file's keys that the component does not take."""
    taken = {place.key for place in source.places.values()}
    return [key for key in source.file.shapes if key not in taken and not key.endswith("position_ids")]


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the 1×1 window of a convolution, which a linear layer lacks."""
    return shape[:2] if len(shape) > 2 and set(shape[2:]) == {1} else shape
