"""The demo's familiar thing, a purple striped heart, under names that say something of it: lessons for cells.

By its class ("sks heart"), by a wrong one ("sks house") and by none ("sks"), as DreamBooth's authors compare them
(Ruiz et al. 2022, arXiv:2208.12242, section 4.3). Importing this lists them among the demo's lessons.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from PIL import Image

from impasto.evaluation.lesson import LESSONS
from impasto.evaluation.quality import Asked
from impasto.mini import lessons

#: lesson -> what its captions call the heart
NAMED = {"heart-by-its-class": f"sks {lessons.FAMILIAR.shape}", "heart-by-a-wrong-class": "sks house",
         "heart-by-no-class": "sks"}
FAMILIAR = LESSONS["familiar"]


def pictures(name: str) -> list[tuple[str, Image.Image]]:
    """The familiar thing's pictures, with captions that call it so."""
    return [(caption.replace(lessons.FAMILIAR_NAME, name), picture)
            for caption, picture in lessons.familiar_pictures()]


def asked(name: str, count: int, seed: int) -> list[Asked]:
    """The prompts for the familiar thing, by that name."""
    return [replace(each, prompt=each.prompt.replace(lessons.FAMILIAR_NAME, name))
            for each in FAMILIAR.asked(count, seed)]


for _lesson, _name in NAMED.items():
    lessons.LESSONS[f"mini:{_lesson}"] = partial(pictures, _name)
    LESSONS[_lesson] = replace(FAMILIAR, name=_lesson, settings=(f"data.folder=mini:{_lesson}",),
                               asked=partial(asked, _name))
