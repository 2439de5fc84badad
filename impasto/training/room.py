"""Room on the disk for what a run will leave, asked for before its first step."""

from __future__ import annotations

import shutil

from impasto.core.files import nearest_folder, require_space
from impasto.core.progress import Reporter
from impasto.training.run import Run
from impasto.training.sections import OutputOptions

#: bytes that the log, previews and the like may take
SPARE = 2**24


def ask_for_room(run: Run, output: OutputOptions, checkpoint: int, artifact: int, report: Reporter) -> None:
    """Raise `UserError` where not even one checkpoint and one artifact fit, of so many bytes each.

    Warns where those that the recipe keeps do not: a new checkpoint is written before an old one is forgotten.
    """
    require_space(run.folder, checkpoint + artifact + SPARE, "what this run leaves")
    wanted = max(output.keep + 1 - len(run.checkpoints()), 1) * checkpoint + artifact + SPARE
    free = shutil.disk_usage(nearest_folder(run.folder)).free
    if free < wanted:
        report.warn(f"{run.folder}: the {output.keep} checkpoints that are kept, a new one and the artifact take about "
                    f"{wanted / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free; the run goes on, and stops where "
                    "a save finds no room")
