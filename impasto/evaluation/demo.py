"""The demo: a real fine-tune of the embedded base, from first picture to page, measured by a reader of pictures.

It does what a user would do, with the same functions: draw, train the ready recipe into a folder, load the adapter's
file onto a fresh base, draw the same again. The same call again goes on where it was interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

import impasto
from impasto.core.errors import UserError, nearest
from impasto.core.files import key_of, size_of
from impasto.core.progress import SILENT, Reporter
from impasto.evaluation.demo_folder import Place
from impasto.evaluation.demo_page import demo_report
from impasto.evaluation.demo_result import DemoResult, Material, Score, Scores
from impasto.evaluation.lesson import LESSONS, Amounts, Lesson, old_asked
from impasto.evaluation.quality import Asked, Marks, drawn, mark, settings
from impasto.evaluation.recognition import recognised
from impasto.evaluation.report import write_report
from impasto.families.base import Base
from impasto.families.load import load_base
from impasto.families.picture_info import save_picture
from impasto.families.pictures import Adapters
from impasto.families.sample_settings import SampleSettings
from impasto.mini import check_weights
from impasto.mini.lessons import LESSONS as DRAWN
from impasto.training.environment import choose_device, peak_resident
from impasto.training.recipe import Recipe, load_recipe
from impasto.training.trainer import train

if TYPE_CHECKING:
    from impasto.evaluation.reader import Reader

PAGE = "report.html"


class Stopped(Exception):
    """The training was asked to stop, and has saved: the same call goes on from there."""

    def __init__(self, step: int, by: signal.Signals | None) -> None:
        super().__init__(f"stopped after step {step}")
        self.step, self.by = step, by


def run_demo(lesson: str, folder: Path, seed: int = 0, report: Reporter = SILENT, *, recipe_name: str | None = None,
             overrides: Sequence[str] = (), amounts: Amounts | None = None, force: bool = False) -> DemoResult:
    """Teach the base the lesson of that name (a key of `LESSONS`), and leave a page in `folder` that shows it.

    By the recipe `recipe_name`, or the lesson's own; `overrides` of it as on the command line. `force`: a finished
    demo there is made anew. Raises `UserError`, and `Stopped`.
    """
    if lesson not in LESSONS:
        raise UserError("there is no such lesson", where=lesson, fix=nearest(lesson, LESSONS))
    what, amounts = LESSONS[lesson], amounts or Amounts()
    own = [*what.settings, f"train.seed={seed}", *overrides,
           f"output.dir={json.dumps(str(folder), ensure_ascii=False)}", f"output.name={what.name}"]
    recipe = load_recipe(recipe_name or what.recipe, own)
    if recipe.base.path == "mini":
        check_weights()
    reader = _reader()
    with Place.opened(folder, force=force) as place:
        base = _fresh_base(recipe, report)
        place.begin({"lesson": lesson, "seed": seed, "impasto": impasto.__version__,
                     "amounts": dataclasses.asdict(amounts), "base": base.fingerprint(),
                     "recipe": key_of(recipe.model_dump(mode="json", exclude={"output"}))}, force=force)
        return _Demo(what, seed, recipe, amounts, place, report).run(base, reader)


def _reader() -> Reader:
    from impasto.evaluation.reader import load_reader

    return load_reader()


def _is_base(artifact: Path) -> bool:
    return (artifact / "model_index.json").is_file()


def _fresh_base(recipe: Recipe, report: Reporter, path: Path | None = None) -> Base:
    """The recipe's base as it was, or the one at `path` that has come of it."""
    with report.phase("loading the base"):
        return load_base(path or recipe.base.place, family=recipe.base.family, vae=recipe.base.vae,
                         prediction=recipe.base.prediction, text_encoders=recipe.base.text_encoders,
                         options=recipe.base.options, adapters=recipe.base.adapters if path is None else (),
                         device=choose_device(recipe.train.device), report=report)


@dataclasses.dataclass(frozen=True)
class _Demo:
    """One demo under way."""

    lesson: Lesson
    seed: int
    recipe: Recipe
    amounts: Amounts
    place: Place
    report: Reporter

    def run(self, base: Base, reader: Reader) -> DemoResult:
        new, old = self.lesson.asked(self.amounts.new, self.seed), old_asked(self.amounts.old)
        with self.place.timed("drawing before"):
            before = self._draw("before", base, [*new, *old])
        del base  # the run loads its own
        with self.place.timed("training"):
            outcome = train(self.recipe, self.report)
        if outcome.artifact is None:
            raise Stopped(outcome.step, outcome.stopped_by)
        with self.place.timed("drawing after"):
            fresh = _fresh_base(self.recipe, self.report)
            taught = _fresh_base(self.recipe, self.report, outcome.artifact) if _is_base(outcome.artifact) else fresh
            adapters = ((outcome.artifact, 1.0),) if taught is fresh else ()
            after = self._draw("after", taught, [*new, *old], adapters)
        with self.place.timed("reading"), self.report.phase("reading the pictures"):
            scores = self._read(reader, fresh, new, old, before, after)
        result = DemoResult(self.lesson.name, self.seed, outcome.artifact, self.place.folder / PAGE, scores,
                            size_of(outcome.artifact), self.place.seconds, peak_resident())
        material = Material(new, old, before, after, lesson_of(self.recipe), strip(self.place.folder),
                            losses(self.place.folder))
        write_report(demo_report(self.lesson, self.recipe, self.amounts, result, material), result.page)
        self.place.finish(result.plain())
        return result

    def _draw(self, when: str, base: Base, asked: list[Asked], adapters: Adapters = ()) -> list[Image.Image]:
        """The pictures of a folder pictures/before or pictures/after: those that are not there yet are drawn."""
        how = self._settings()
        paths = [self.place.folder / "pictures" / when / f"{i:03}-{each.seed}.png" for i, each in enumerate(asked)]
        left = [i for i, path in enumerate(paths) if not path.exists()]
        with self.report.phase(f"pictures {when}"):
            pictures = drawn(base, [asked[i] for i in left], how, adapters=adapters, report=self.report)
            for i, picture in zip(left, pictures, strict=True):
                save_picture(picture, paths[i], prompt=asked[i].prompt, negative="", seed=asked[i].seed, settings=how,
                             base=base, adapters=adapters)
        return [_opened(path) for path in paths]

    def _settings(self) -> SampleSettings:
        return settings(_side(self.recipe), self.amounts.steps, self.amounts.guidance)

    def _read(self, reader: Reader, base: Base, new: list[Asked], old: list[Asked], before: list[Image.Image],
              after: list[Image.Image]) -> Scores:
        side, many = _side(self.recipe), len(new)
        first, last = (sum(seen) for seen in recognised(
            self.lesson.sign, reader, base, [before[:many], after[:many]], side, self.amounts.renders, self.seed))
        marks = mark(new, reader.read(after[:many]))
        kept = [mark(old, reader.read(pictures[many:])) for pictures in (before, after)]
        return Scores(Score(first, many), Score(last, many), _score(marks, "background"),
                      *(_score(each, "all three") for each in kept))


def _score(marks: Marks, question: str) -> Score:
    return Score(*marks.counts.get(question, (0, 0)))


def _side(recipe: Recipe) -> int:
    assert recipe.data is not None
    return recipe.data.resolution


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def lesson_of(recipe: Recipe) -> list[tuple[str, Image.Image]]:
    """The captions and pictures that the recipe learns from."""
    assert recipe.data is not None
    make = DRAWN.get(recipe.data.folder or "")
    return make() if make else []


def strip(folder: Path) -> list[tuple[int, Image.Image]]:
    """The previews of the first prompt, by step."""
    return [(int(path.name.split("-")[0]), _opened(path)) for path in sorted((folder / "previews").glob("*-0.png"))]


def losses(folder: Path) -> list[float]:
    """The loss of each step, from the run's log."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]

