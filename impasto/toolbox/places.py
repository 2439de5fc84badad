"""Where outputs may go, and what of their making they tell."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from impasto.core.errors import UserError

#: what lies in a folder that holds a model and nothing else: one of these makes it one that --force may replace
MARKS = ("model_index.json", "adapter_config.json", "config.json", "unet/adapter_config.json",
         "text_encoder/adapter_config.json")


def check_output(out: Path, inputs: Iterable[Path | str | None], *, force: bool = False, ending: str | None = ""
                 ) -> None:
    """Raise a `UserError` if `out` would touch one of the inputs, is there already without `force`, or would not be
    called as what it is.

    `ending`: of a file's name; "" is for a folder, None for either. Only a folder that holds a model gives way to
    another.
    """
    if not out.name or out.name == "..":
        raise UserError("is no name of a file or folder", where=out, fix="give one to be made")
    resolved = out.resolve()
    for path in (Path(path).resolve() for path in inputs if path is not None and Path(path).exists()):
        if path == resolved or path.is_dir() and path in resolved.parents:
            raise UserError("is one of the inputs, which are never changed", where=out, fix="choose another place")
        if resolved in path.parents:
            raise UserError(f"holds one of the inputs, {path.name}, which are never changed", where=out,
                            fix="choose another place")
    if ending and out.suffix != ending:
        raise UserError(f"would be a {ending} file under another name", where=out,
                        fix=f"call it {out.name.removesuffix(out.suffix)}{ending}")
    if ending == "" and out.suffix in (".safetensors", ".ckpt", ".pt", ".bin"):
        raise UserError("would be a folder under a file's name", where=out, fix=f"call it {out.stem}")
    if not out.exists():
        return
    if not force:
        raise UserError("is there already", where=out, fix="choose another place, or say --force")
    if out.is_dir() and (ending or not any((out / mark).is_file() for mark in MARKS) and any(out.iterdir())):
        raise UserError("is a folder that holds something else than a model", where=out, fix="choose another place")
    if out.is_file() and ending == "":
        raise UserError("is a file, and the result is a folder", where=out, fix="choose another place")


def made_of(**facts: object) -> dict[str, str]:
    """Metadata that says what a file came of."""
    return {"impasto.made": json.dumps(facts, sort_keys=True, ensure_ascii=False)}


def left_out(names: Sequence[str], why: str) -> tuple[str, ...]:
    """A line about what is not in the output, or none."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (f"left out, {why}: {', '.join(names[:3])}{more}",) if names else ()
