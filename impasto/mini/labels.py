"""A scene's truth as numbers: what a caption can be asked for, and what a reader of pictures looks for."""

from __future__ import annotations

from impasto.mini.shapes import SHAPES
from impasto.mini.world import COLOURS, POSITIONS, RELATIONS, SIZES, STYLES, TEXTURES, Scene

#: each question with its answers
QUESTIONS: dict[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES), "colour": tuple(COLOURS), "accent": tuple(COLOURS), "texture": TEXTURES,
    "background": tuple(COLOURS), "position": tuple(POSITIONS), "size": tuple(SIZES), "style": STYLES,
    "relation": tuple(RELATIONS), "second shape": tuple(SHAPES), "second colour": tuple(COLOURS),
}
LABEL_SIZES = tuple(len(answers) for answers in QUESTIONS.values())

#: the labels of a picture of which nothing is known
NOTHING = (-1,) * len(QUESTIONS)


def answers(scene: Scene) -> dict[str, str]:
    """The answer to each question that makes sense of this scene."""
    first, *others = scene.objects
    found = {"shape": first.shape, "colour": first.colour, "background": scene.background}
    if first.accent:
        found["accent"] = first.accent
    if others:
        return found | {"relation": scene.relation, "second shape": others[0].shape, "second colour": others[0].colour}
    return found | {"texture": first.texture, "position": first.position, "size": first.size, "style": scene.style}


def labels(scene: Scene) -> tuple[int, ...]:
    """The number of each answer among the question's answers, -1 where the question makes no sense."""
    found = answers(scene)
    return tuple(choices.index(found[question]) if question in found else -1
                 for question, choices in QUESTIONS.items())
