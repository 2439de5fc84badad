"""`[output] push_to`: the artifact goes to the hub when the run ends. A failure there is told, and loses nothing."""

from __future__ import annotations

import shlex
from pathlib import Path

from impasto.core.errors import UserError
from impasto.core.progress import Reporter
from impasto.training.sections import OutputOptions


def announce(output: OutputOptions, report: Reporter) -> None:
    """Say before the first step what would be in the way at the end."""
    if output.push_to is None:
        return
    from impasto.training.sharing.hub import check_access

    try:
        check_access(output.push_to)
    except UserError as error:
        report.warn(f"output.push_to: {error}; there is time until the run ends")


def push_after(output: OutputOptions, artifact: Path, report: Reporter) -> None:
    """Push what the run has left, if the recipe asks for it."""
    if output.push_to is None:
        return
    from impasto.training.sharing.card import write_card
    from impasto.training.sharing.hub import push
    from impasto.training.sharing.parcel import pack

    try:
        parcel = pack(artifact)
        url = push(parcel.with_card(write_card(parcel, output.push_to)), output.push_to,
                   private=output.push_private, report=report)
    except (UserError, OSError) as error:
        private = " --private" if output.push_private else ""
        report.warn(f"was not pushed: {error}. Later: impasto push {shlex.quote(str(artifact))} {output.push_to}"
                    f"{private}")
    else:
        report.note(f"pushed: {url}")
