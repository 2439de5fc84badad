"""`impasto dataset check` of shards: what is printed, for people and for machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from impasto.cli.console import RichReporter, emit
from impasto.cli.dataset_text import finding_lines, lines, shape_lines, tag_lines, verdict_lines, wrapped
from impasto.data.check import Verdict, check_all, plain, verdict
from impasto.data.dataset import list_folder, located
from impasto.data.findings import number
from impasto.data.inventory import take_inventory
from impasto.data.options import DataOptions, PriorOptions, of_class_pictures
from impasto.data.shards.check import CheckedShards, check_shards
from impasto.data.shards.check import plain as plain_shards
from impasto.data.shards.table import WORDS


def check_and_print(data: DataOptions, prior: PriorOptions | None, batch: int, *, near: bool, page: Path | None,
                    as_json: bool) -> bool:
    """Look at shards, and at the folder of class pictures where there is one; whether a run would begin.

    `near`: look for near-copies too; `page`: where the page goes.
    """
    report = RichReporter()
    checked = check_shards(data, batch, report, near=near)
    others = []
    if prior is not None and prior.folder is not None:
        listing = list_folder(located(prior.folder))
        others = check_all([take_inventory(listing, of_class_pictures(data, prior), batch, report, "class pictures")],
                           near=near)
    found = Verdict(checked.fit and all(other.fit for other in others), checked.line, checked.advice)
    if page is not None:
        from impasto.evaluation.dataset_page import write_page
        from impasto.evaluation.dataset_parts import folder_part, shards_part

        write_page([shards_part(checked), *map(folder_part, others)], found, page, report)
    if as_json:
        told: dict[str, Any] = {"fit": found.fit, "verdict": found.line, "advice": found.advice,
                                "page": None if page is None else str(page),
                                "folders": [plain_shards(checked), *map(plain, others)]}
        emit(told)
    else:
        print("\n".join(shard_lines(checked)))
        if others:
            print("\n" + "\n".join(lines(others, verdict(others), None)))
        if page is not None:
            print(f"\npage: {page}")
    return found.fit


def shard_lines(checked: CheckedShards) -> list[str]:
    """Everything worth reading about shards."""
    data, table = checked.survey.data, checked.survey.table
    told = verdict_lines(Verdict(checked.fit, checked.line, checked.advice))
    told += ["", *wrapped(f"shards: {checked.where}", 0)]
    wrong = ", ".join(f"{checked.counts[use]:,} {words}" for use, words in WORDS.items() if checked.counts[use])
    buckets = f"buckets of about {data.resolution}x{data.resolution}, in steps of {data.bucket_step}" if data.buckets \
        else f"squares of {data.resolution}"
    told += wrapped(f"{checked.counts[0]:,} of {len(table):,} samples can be used" + (f"; {wrong}" if wrong else "")
                    + f"; {buckets}, batches of {checked.batch}", 2)
    if data.caption is None:
        told += wrapped(f"{number(checked.words.captions, 'caption')}, {checked.words.different:,} different", 2)
    return told + shape_lines(checked.shapes) + finding_lines(checked.findings) + tag_lines(checked.words.tags)
