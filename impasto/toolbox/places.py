"""Where outputs may go, and what of their making they tell."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from impasto.core.errors import UserError


def check_output(out: Path, inputs: Iterable[Path | str], *, force: bool = False, ending: str = "") -> None:
    """Raise a `UserError` if `out` is one of the inputs, is there already without `force`, or would not end as such a
    file's name does."""
    for path in map(Path, inputs):
        if path.exists() and (path.resolve() == out.resolve() or path.is_dir() and path.resolve() in
                              out.resolve().parents):
            raise UserError("is one of the inputs, which are never changed", where=out, fix="choose another place")
    if out.exists() and not force:
        raise UserError("is there already", where=out, fix="choose another place, or say --force")
    if ending and out.suffix != ending:
        raise UserError(f"would be a {ending} file under another name", where=out,
                        fix=f"call it {out.name.removesuffix(out.suffix)}{ending}")


def made_of(**facts: object) -> dict[str, str]:
    """Metadata that says what a file came of."""
    return {"impasto.made": json.dumps(facts, sort_keys=True, ensure_ascii=False)}
