"""What is known of a recipe's base without its weights: a file's header, a folder's config.json files, or, where there
is no file at all, what the family's authors have published.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from impasto.core.errors import UserError
from impasto.families import FAMILIES
from impasto.families.load import locate, open_vae
from impasto.formats.checkpoint import Checkpoint, open_checkpoint
from impasto.formats.configs import CONFIGS, FamilyConfig
from impasto.formats.source import Source
from impasto.formats.tensor_files import NoTensors
from impasto.formats.text_files import open_text_encoders
from impasto.training.recipe import BaseOptions


@dataclass(frozen=True)
class Known:
    """A base's configurations."""

    checkpoint: Checkpoint
    #: of each component: the checkpoint, but for a VAE and text encoders that the recipe has others of
    sources: dict[str, Checkpoint]
    #: one line each: what was assumed
    notes: tuple[str, ...]

    @property
    def is_there(self) -> bool:
        """Whether there is a file, and not its family's name alone."""
        return self.checkpoint.path.exists()


def told(options: BaseOptions) -> Known:
    """What is known of a recipe's base, none of whose files need be there if its family is named.

    Raises `UserError` if neither its path nor its family says what it is, and for files that do not go with it.
    """
    checkpoint, notes = _checkpoint(options)
    family, folder = checkpoint.family, checkpoint.path
    sources = dict.fromkeys(checkpoint.components, checkpoint)
    if options.vae is not None and _is_there(options.vae):
        sources["vae"] = open_vae(locate(options.vae), family)
    elif options.vae is not None:
        notes.append(f"{options.vae} is not there: planned with the base's own VAE")
    if options.text_encoders and all(map(_is_there, options.text_encoders)):
        sources |= open_text_encoders(map(locate, options.text_encoders), family,
                                      folder if folder.is_dir() else folder.parent)
    elif options.text_encoders:
        notes.append("a file of base.text_encoders is not there: planned with the base's own")
    return Known(checkpoint, sources, tuple(notes))


def _checkpoint(options: BaseOptions) -> tuple[Checkpoint, list[str]]:
    """The checkpoint of the base itself, and lines on what was assumed."""
    if options.path is None or options.family is not None and not _is_there(options.path):
        assert options.family is not None, "a recipe has one of both"
        FAMILIES.get(options.family)  # a name that is not known is an error, with the nearest one
        where = f"{options.path} is not there: " if options.path is not None else ""
        found = _published(CONFIGS.get(options.family), Path(options.path or options.family))
        notes = [f"{where}planned for {options.family} as its authors have published it"]
        if "prediction_type" not in found.scheduler and "Flow" not in str(found.scheduler.get("_class_name")):
            found = found.predicting(options.prediction or "epsilon")
            if options.prediction is None:
                notes.append("the base is taken for the one that predicts the noise: base.prediction=v_prediction is "
                             "the other")
        return found.predicting(options.prediction), notes
    found = open_checkpoint(locate(options.path, download=options.download), weights=False)
    if found.family not in FAMILIES:
        raise UserError("is no base that can be trained", where=options.path, fix="supported: " + ", ".join(FAMILIES))
    if options.family is not None and found.family != options.family:
        raise UserError(f"is a checkpoint of {found.family}, not {options.family}", where=options.path,
                        fix=f"family = {found.family!r}, or leave it out")
    return found.predicting(options.prediction), []


def _is_there(path: str) -> bool:
    """Whether a base lies here, a hub id in the local cache included."""
    try:
        locate(path)
    except UserError:
        return False
    return True


def _published(table: FamilyConfig, path: Path) -> Checkpoint:
    """A family's checkpoint as its authors have published it, in one file that is nowhere."""
    return Checkpoint(path=path, family=table.name, layout="ldm",
                      configs={name: dict(part.config) for name, part in table.parts.items()},
                      scheduler=dict(table.scheduler),
                      sources={name: Source(NoTensors(), {}) for name in table.parts})
