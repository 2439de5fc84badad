"""What the facts about a folder mean for training: what a run would refuse, what is likely to hurt, what to know.

Facts in, verdict out: nothing here reads a file.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from impasto.data.findings import Alike, Finding, Level, all_findings, are, number, sharpness
from impasto.data.inventory import Inventory
from impasto.data.shapes import Shapes, shapes_of
from impasto.data.similar import alike, ranked
from impasto.data.wording import Tags, tag_statistics


@dataclass(frozen=True)
class Checked:
    """A folder with all that was found."""

    inventory: Inventory
    findings: list[Finding]  # refused ones first, then warnings, then notes
    groups: list[Alike]
    tags: Tags | None
    unused: dict[str, list[str]]  # picture -> why it cannot be used

    @property
    def fit(self) -> bool:
        """Whether a run would take the folder as it is."""
        return not any(finding.level is Level.REFUSED for finding in self.findings)

    @property
    def used(self) -> list[str]:
        """The pictures that can be used, in order."""
        return [name for name in self.inventory.listing.pictures if name not in self.unused]

    def count(self, level: Level) -> int:
        """How many findings are of a level."""
        return sum(finding.level is level for finding in self.findings)


@dataclass(frozen=True)
class Verdict:
    """Whether a run would begin, in a line, and what to do, the most important first."""

    fit: bool
    line: str
    advice: list[str]


def check(inventory: Inventory, *, near: bool = True) -> Checked:
    """All findings about one folder. `near`: pictures that look alike too, not exact copies alone."""
    groups = exact_copies(inventory) + (near_duplicates(inventory) if near else [])
    phrasing = inventory.phrasing
    tags = None if inventory.data.caption is not None else tag_statistics(
        map(phrasing.body, inventory.captions.values()), phrasing.separator)
    findings = all_findings(inventory, groups, tags)
    pictures = set(inventory.listing.pictures)
    unused: dict[str, list[str]] = {}
    for finding in findings:
        for name, reason in finding.names.items():
            if finding.level is Level.REFUSED and name in pictures:
                unused.setdefault(name, []).append(reason)
    return Checked(inventory, findings, groups, tags, unused)


def check_all(inventories: Sequence[Inventory], *, near: bool = True) -> list[Checked]:
    """All folders of a run, and what they have in common."""
    checked = [check(inventory, near=near) for inventory in inventories]
    own: dict[str, str] = {}
    for folder in checked:
        looks = folder.inventory.looks
        both = {name: f"is {own[look.digest]}" for name, look in looks.items() if look.digest in own}
        if both and folder.inventory.of_class:
            place = sum(finding.level is Level.REFUSED for finding in folder.findings)
            folder.findings.insert(place, Finding(
                Level.WARNING, "in both", f"{are(both, 'picture')} among the pictures to learn from too",
                "take them out of prior.folder: class pictures are to show others", both))
        elif both:
            folder.findings.append(Finding(Level.NOTE, "in several sets", f"{are(both, 'picture')} in a set before too",
                                           "", both))
        of = folder.inventory.title.partition(" of ")[2]
        own = {look.digest: f"{name} of {of}" if of else name for name, look in looks.items()} | own
    return checked


def verdict(checked: Sequence[Checked]) -> Verdict:
    """One line on all folders, and what to do."""
    fit = all(folder.fit for folder in checked)
    wanted = Level.WARNING if fit else Level.REFUSED
    advice = list(dict.fromkeys(f"{finding.kind}: {finding.fix}" for folder in checked
                                for finding in folder.findings if finding.level is wanted and finding.fix))
    counts = Counter[str]()
    for folder in checked:
        counts["class picture" if folder.inventory.of_class else "picture"] += len(folder.used)
    sets = sum(not folder.inventory.of_class for folder in checked)
    used = " and ".join(number(count, noun) + (f" in {sets} sets" if noun == "picture" and sets > 1 else "")
                        for noun, count in counts.items())
    if not fit:
        bad = sum(len(folder.unused) for folder in checked)
        files = sum(len(set(finding.names) - set(folder.inventory.listing.pictures)) for folder in checked
                    for finding in folder.findings if finding.level is Level.REFUSED)
        told = [number(bad, "picture")] * bool(bad) + [number(files, "other file")] * bool(files)
        return Verdict(False, f"not fit to train yet: a run would refuse {' and '.join(told)}", advice)
    warnings = sum(folder.count(Level.WARNING) for folder in checked)
    seen = f", with {number(warnings, 'warning')}" if warnings else ", and nothing to warn of"
    return Verdict(True, f"fit to train: {used}{seen}", advice)


# --- copies ------------------------------------------------------------------------------------------------


def exact_copies(inventory: Inventory) -> list[Alike]:
    """Pictures whose files have the same bytes."""
    by_digest: dict[str, list[str]] = {}
    for name, look in inventory.looks.items():
        by_digest.setdefault(look.digest, []).append(name)
    return [Alike(names, [0] * len(names), True) for names in by_digest.values() if len(names) > 1]


def near_duplicates(inventory: Inventory) -> list[Alike]:
    """Pictures that look alike, of exact copies the first alone."""
    by_digest: dict[str, str] = {}
    for name, look in inventory.looks.items():
        by_digest.setdefault(look.digest, name)
    distinct = list(by_digest.values())
    looks = [inventory.looks[name] for name in distinct]
    hashes = [int(look.hash, 16) if look.hash else None for look in looks]
    found = []
    for group in alike(hashes, [bytes.fromhex(look.colours) for look in looks]):
        order, far = ranked(np.array(group), np.array([hashes[i] for i in group], np.uint64),
                            np.array([looks[i].height * looks[i].width for i in group]))
        found.append(Alike([distinct[group[place]] for place in order], far.tolist(), False))
    return found


# --- summaries ---------------------------------------------------------------------------------------------


def shapes(checked: Checked) -> Shapes:
    """How large the pictures are, and what becomes of them."""
    placed = checked.inventory.placed
    names = list(placed)
    return shapes_of(Counter(look.size for look in checked.inventory.looks.values()),
                     Counter(p.bucket for p in checked.inventory.all_cuts),
                     np.array([p.cropped for p in placed.values()]), np.array([p.scale for p in placed.values()]),
                     lambda i: names[i])


# --- for machines ------------------------------------------------------------------------------------------


def plain(checked: Checked) -> dict[str, Any]:
    """Everything about a folder, each picture with all facts, JSON-able. Sizes are [height, width]."""
    inventory = checked.inventory
    found = shapes(checked)
    return {
        "title": inventory.title, "folder": str(inventory.listing.folder), "fit": checked.fit,
        "data": inventory.data.model_dump(mode="json"), "batch_size": inventory.batch,
        "pictures": len(inventory.listing.pictures), "used": len(checked.used),
        "findings": [dataclasses.asdict(finding) for finding in checked.findings],
        "shapes": dataclasses.asdict(found) | {"buckets": [{"bucket": list(size), "pictures": count}
                                                           for size, count in found.buckets.items()]},
        "alike": [dataclasses.asdict(group) for group in checked.groups],
        "tags": None if checked.tags is None else dataclasses.asdict(checked.tags),
        "files": {name: _plain_picture(checked, name) for name in inventory.listing.pictures},
    }


def _plain_picture(checked: Checked, name: str) -> dict[str, Any]:
    inventory = checked.inventory
    look, placement = inventory.looks.get(name), inventory.placements.get(name)
    told: dict[str, Any] = {"used": name not in checked.unused, "why_not": checked.unused.get(name, []),
                            "caption": inventory.captions.get(name), "chunks": inventory.chunks.get(name)}
    if inventory.phrasing.facts and name in inventory.captions:
        told["trained_as"] = inventory.phrasing.plain(inventory.captions[name])
    if look is not None:
        told |= dataclasses.asdict(look) | {"sharpness": round(sharpness(look), 5)}
    if placement is not None:
        told |= {"bucket": list(placement.bucket), "resized": list(placement.resized), "crop": list(placement.crop),
                 "cropped": round(placement.cropped, 5), "scale": round(placement.scale, 5)}
    return told
