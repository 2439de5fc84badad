"""`impasto dataset check` of shards: what is printed, for people and for machines."""

from __future__ import annotations

from typing import Any

from impasto.cli.console import RichReporter, emit
from impasto.cli.dataset_text import finding_lines, lines, wrapped
from impasto.core.errors import UserError
from impasto.data.check import check_all, plain, verdict
from impasto.data.dataset import list_folder, located
from impasto.data.inventory import take_inventory
from impasto.data.options import DataOptions, PriorOptions, of_class_pictures
from impasto.data.shards.check import CheckedShards, check_shards
from impasto.data.shards.check import plain as plain_shards
from impasto.data.shards.table import WORDS

#: buckets in the text
ROWS = 8


def check_and_print(data: DataOptions, prior: PriorOptions | None, batch: int, *, page: bool, as_json: bool) -> bool:
    """Look at shards, and at the folder of class pictures where there is one; whether a run would begin."""
    if page:
        raise UserError("the page with all crops is made of folders only", where="--html",
                        fix="leave it out, or unpack a shard into a folder and look at that")
    report = RichReporter()
    checked = check_shards(data, batch, report)
    others = []
    if prior is not None and prior.folder is not None:
        listing = list_folder(located(prior.folder))
        others = check_all([take_inventory(listing, of_class_pictures(data, prior), batch, report, "class pictures")])
    fit = checked.fit and all(other.fit for other in others)
    if as_json:
        told: dict[str, Any] = {"fit": fit, "verdict": checked.line, "advice": checked.advice, "page": None,
                                "folders": [plain_shards(checked), *map(plain, others)]}
        emit(told)
    else:
        print("\n".join(shard_lines(checked)))
        if others:
            print("\n" + "\n".join(lines(others, verdict(others), None)))
    return fit


def shard_lines(checked: CheckedShards) -> list[str]:
    """Everything worth reading about shards."""
    data, table = checked.survey.data, checked.survey.table
    told = [*wrapped(checked.line, 0), *(line for advice in checked.advice[:4] for line in wrapped(advice, 2, "-> "))]
    more = f" and {len(table.shards) - 1:,} more" if len(table.shards) > 1 else ""
    told += ["", *wrapped(f"shards: {table.shards[0].shown}{more}", 0)]
    wrong = ", ".join(f"{checked.counts[use]:,} {words}" for use, words in WORDS.items() if checked.counts[use])
    buckets = f"buckets of about {data.resolution}x{data.resolution}, in steps of {data.bucket_step}" if data.buckets \
        else f"squares of {data.resolution}"
    told += wrapped(f"{checked.counts[0]:,} of {len(table):,} samples can be used" + (f"; {wrong}" if wrong else "")
                    + f"; {buckets}, batches of {checked.batch}", 2)
    shapes = list(checked.shapes.items())
    if shapes:
        shown = ", ".join(f"{count:,} at {width}x{height}" for (height, width), count in shapes[:ROWS])
        told += wrapped(shown + (f", and {len(shapes) - ROWS:,} more buckets" if len(shapes) > ROWS else ""), 2)
    return told + finding_lines(checked.findings)
