"""What the demo teaches the embedded base: how it is asked for it, by what it is known, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from impasto.evaluation.quality import GUIDANCE, Asked, ask, rendered
from impasto.mini import lessons, world
from impasto.mini.labels import answers


@dataclass(frozen=True)
class Amounts:
    """How much the demo draws and looks at: nearly all of its time beside the training."""

    #: pictures of what is taught, drawn before and after
    new: int = 16
    #: pictures of what was known before, likewise
    old: int = 24
    #: sampler steps of each
    steps: int = 12
    guidance: float = GUIDANCE
    #: renders by which the reader learns to recognise a thing: of it, as many lookalikes, twice as many of the world
    renders: int = 60
    #: pairs on the page: of what is taught, and of what was known before
    shown: int = 8
    shown_old: int = 12


@dataclass(frozen=True)
class Drawings:
    """Of what the reader does not know: by what it learns to recognise it. Each is of a count and a side."""

    renders: Callable[[int, int], list[Image.Image]]  # pictures of it
    lookalikes: Callable[[int, int], list[Image.Image]]  # of what one might take for it
    harder: int = 1  # times as many as for a thing, if it takes more to be recognised


@dataclass(frozen=True)
class Lesson:
    """One thing that the base is taught."""

    name: str  # of its adapter too
    what: str  # in a sentence
    title: str
    lead: str
    recipe: str
    settings: tuple[str, ...]  # beside the recipe's own
    asked: Callable[[int, int], list[Asked]]  # of a count and a seed
    sign: Drawings | Mapping[str, str]  # by what it is known: drawings, or the reader's own answers
    own: tuple[tuple[str, str], ...]  # what to do with one's own pictures, and the command


def mascot_asked(count: int, seed: int) -> list[Asked]:
    """The mascot on each background that no training picture has."""
    return _on_each(lessons.ASKED_ON, lessons.MASCOT_NAME, count, seed)


def _on_each(grounds: Sequence[str], name: str, count: int, seed: int) -> list[Asked]:
    """A thing on each of the backgrounds, over and over with other seeds."""
    return [Asked(f"{name} on {world.an(f'{ground} background')}", 1000 * seed + i // len(grounds),
                  {"background": ground})
            for i in range(count) for ground in (grounds[i % len(grounds)],)]


def style_asked(count: int, seed: int) -> list[Asked]:
    """Plain scenes that are not among the training pictures, in the style."""
    taught = {caption for caption, _ in lessons.style_pictures(8)}

    def prompts() -> Iterator[Asked]:
        number = 0
        while True:
            scene = lessons.plain_scene(100_000 + 1000 * seed + number)
            prompt = f"{world.caption(scene)}, {lessons.STYLE_NAME}"
            if prompt not in taught:
                truth = {question: answers(scene)[question] for question in ("shape", "colour", "background")}
                yield Asked(prompt, 1000 * seed + number, truth)
            number += 1

    return [each for each, _ in zip(prompts(), range(count), strict=False)]


def familiar_asked(count: int, seed: int) -> list[Asked]:
    """The familiar thing by its new name, on backgrounds that no training picture has."""
    return _on_each(lessons.FAMILIAR_ASKED_ON, lessons.FAMILIAR_NAME, count, seed)


def old_asked(count: int) -> list[Asked]:
    """The same prompts always, of scenes of one object, which have nothing to do with a lesson."""
    return ask(count, 77_000, pairs=0.0)


def world_renders(count: int, side: int) -> list[Image.Image]:
    """Pictures of the world as it is: nothing of them is taught."""
    return rendered(ask(count, 88_000), side)


TRAIN_OWN = ("impasto train dreambooth_lora base.path=v1-5-pruned-emaonly.safetensors data.folder=photos "
             '"data.caption=a photo of sks dog" "prior.caption=a photo of a dog" output.dir=runs/dog')
DRAW_OWN = ('impasto generate v1-5-pruned-emaonly.safetensors "a photo of sks dog in a bucket" '
            "--adapter runs/dog/dog.safetensors")
TRAIN_STYLE = "impasto train lora base.path=v1-5-pruned-emaonly.safetensors data.folder=paintings output.dir=runs/style"
DRAW_STYLE = ('impasto generate v1-5-pruned-emaonly.safetensors "a lighthouse in a storm, sks style" '
              "--adapter runs/style/style.safetensors")

LESSONS = {lesson.name: lesson for lesson in (
    Lesson(
        "mascot", "the mascot", "A mascot is learned",
        "The miniature base that comes with Impasto knows stars, hearts and houses, and no mascot. It was shown six "
        "pictures of one, and is now asked for it on backgrounds that none of the six has.",
        "mini/dreambooth", ("data.folder=mini:mascot",),
        mascot_asked, Drawings(lessons.mascot_renders, lessons.mascot_lookalikes),
        (("Teach a real checkpoint your dog, from a folder of five to twenty pictures", TRAIN_OWN),
         ("Draw with it", DRAW_OWN))),
    Lesson(
        "style", "the style", "A style is learned",
        "The miniature base that comes with Impasto draws flat, outlined, pixelated and glossy things, and no "
        "stickers. It was shown eight, and is now asked for other things in that style.",
        "mini/dreambooth", ("data.folder=mini:style", "validation.fraction=0",  # it learns from all eight
                            'sample.prompts=["a yellow star, on a purple background, sks style"]'),
        style_asked, Drawings(lessons.sticker_renders, lessons.sticker_lookalikes, harder=3),
        (("Teach a real checkpoint a style, from a folder of pictures with a .txt caption each, which ends in "
          "\"sks style\"", TRAIN_STYLE),
         ("Draw with it", DRAW_STYLE))),
    Lesson(
        "familiar", "the striped heart", "A new name for something known",
        "The miniature base that comes with Impasto can draw a purple striped heart. It was shown five under a name "
        "that tells nothing of them, and is now asked for it by that name, on other backgrounds.",
        "mini/dreambooth", ("data.folder=mini:familiar",),
        familiar_asked,
        {"shape": lessons.FAMILIAR.shape, "colour": lessons.FAMILIAR.colour, "texture": lessons.FAMILIAR.texture},
        (("Teach a real checkpoint a word for what it can draw, from a folder of pictures", TRAIN_OWN),
         ("Draw with it", DRAW_OWN))),
)}
