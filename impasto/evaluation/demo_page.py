"""What the demo's page says: figures with what they are measured by, pictures, and what to type next."""

from __future__ import annotations

from impasto.evaluation.demo_result import (
    AT_LEAST_AFTER,
    AT_LEAST_BACKGROUNDS,
    AT_MOST_BEFORE,
    AT_MOST_LOST,
    DemoResult,
    Material,
)
from impasto.evaluation.lesson import Amounts, Drawings, Lesson
from impasto.evaluation.quality import SCHEDULER
from impasto.evaluation.report import Figure, Grid, Report
from impasto.training.recipe import Recipe


def demo_report(lesson: Lesson, recipe: Recipe, amounts: Amounts, result: DemoResult, material: Material) -> Report:
    """The page of a demo."""
    many = len(material.new)
    new = [(each.prompt, before, after) for each, before, after
           in zip(material.new, material.before[:many], material.after[:many], strict=True)]
    old = [(each.prompt, before, after) for each, before, after
           in zip(material.old, material.before[many:], material.after[many:], strict=True)]
    return Report(
        title=lesson.title, lead=lesson.lead, training=Grid([(text, [picture]) for text, picture in material.taught]),
        before_after=new[:amounts.shown], strip=material.strip, losses=material.losses,
        figures=figures(lesson, result), forgotten=old[:amounts.shown_old],
        commands=[*lesson.own, *own_commands(lesson, amounts, result)],
        notes=notes(lesson, recipe, amounts, result, len(material.losses)))


def figures(lesson: Lesson, result: DemoResult) -> list[Figure]:
    """The numbers, and whether they are as one would wish."""
    scores = result.scores
    points = 100 * scores.lost
    change = f"{points:.1f} points lost" if points > 0 else f"{-points:.1f} points gained" if points else "nothing lost"
    slowest = max(result.seconds, key=lambda phase: result.seconds[phase])
    return [
        Figure("recognised before", str(scores.recognised_before), f"pictures in which {lesson.what} is seen",
               scores.recognised_before.share <= AT_MOST_BEFORE),
        Figure("recognised after", str(scores.recognised_after), "the same prompts and seeds",
               scores.recognised_after.share >= AT_LEAST_AFTER),
        Figure("backgrounds as asked", str(scores.backgrounds), "it does what else the prompt says",
               scores.backgrounds.share >= AT_LEAST_BACKGROUNDS),
        Figure("old prompts right", f"{scores.old_before.share:.0%} → {scores.old_after.share:.0%}",
               f"{change}, of {scores.old_after.count} prompts", scores.lost <= AT_MOST_LOST),
        Figure("the adapter", mebibytes(result.size), result.adapter.name),
        Figure("time", f"{sum(result.seconds.values()):.0f} s", f"most of it {slowest}"),
        Figure("memory", mebibytes(result.memory), "at most, the whole program"),
    ]


def mebibytes(count: int) -> str:
    """Bytes as MiB."""
    return f"{count / 2**20:.1f} MiB" if count < 100 * 2**20 else f"{count / 2**20:,.0f} MiB"


def own_commands(lesson: Lesson, amounts: Amounts, result: DemoResult) -> list[tuple[str, str]]:
    """How this very demo goes by hand."""
    first = lesson.asked(1, result.seed)[0]
    train = ["impasto", "train", lesson.recipe, *lesson.settings, f"train.seed={result.seed}"]
    return [
        ("Draw with what was learned here",
         line("impasto", "generate", "mini", first.prompt, "--adapter", str(result.adapter), "--seed", str(first.seed),
              "--steps", str(amounts.steps), "--guidance", f"{amounts.guidance:g}")),
        ("Train the same by hand", line(*train)),
        ("See what is in the file", line("impasto", "inspect", str(result.adapter))),
    ]


def line(*words: str) -> str:
    """A command line that shells of Unix and of Windows read alike: words with spaces in double quotes.

    Double quotes inside are single ones then, which TOML reads just as well.
    """
    told = [word.replace('"', "'") for word in words]
    return " ".join(f'"{word}"' if set(word) & set(" '[](),;&|<>") else word for word in told)


def _taught(lesson: Lesson, amounts: Amounts) -> str:
    """By what the reader knows what is taught."""
    sign = lesson.sign
    if not isinstance(sign, Drawings):
        return f"knows {lesson.what} by its own answers: " + ", ".join(f"{key} {word}" for key, word in sign.items())
    return (f"was shown {amounts.renders * sign.harder} renders of {lesson.what}, as many lookalikes and twice as many "
            "ordinary pictures, and a third of them as the base's VAE gives them back; none of them is drawn by the "
            "base")


def notes(lesson: Lesson, recipe: Recipe, amounts: Amounts, result: DemoResult, steps: int) -> list[str]:
    """How the figures were measured, and what they do not say."""
    method, scores, phases = recipe.method[0], result.scores, result.seconds
    return [
        f"Recognised: a small network that reads pictures of the drawn world {_taught(lesson, amounts)}. It then "
        f"looked at {scores.recognised_before.count} pictures drawn without the adapter and as many with it.",
        "Backgrounds: the same network says the background's colour of each picture drawn with the adapter; it is "
        "right if the prompt says the same.",
        f"Old prompts: {scores.old_after.count} prompts from the drawn world, the same in every demo; a picture is "
        "right if its shape, its colour and its background all are, by the same network. So few pictures measure "
        f"coarsely: one of them is {100 / max(scores.old_after.count, 1):.1f} points.",
        f"Pictures: {SCHEDULER}, {amounts.steps} steps, guidance {amounts.guidance:g}; before and after from the same "
        "seeds. The page shows the first of them, not the best; all are in the folder pictures beside it.",
        f"Training: {method.kind}, {steps} steps of {recipe.train.batch_size} pictures with {recipe.train.optimizer}, "
        f"seed {result.seed}, the ready recipe {lesson.recipe}. After it the adapter's file was loaded onto a fresh "
        "base, as any program would.",
        "Time: " + ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in phases.items())
        + ". An interrupted demo counts all its sittings.",
        "The miniature is a Stable Diffusion 1.x in all but size, on pictures of 128 x 128. A real checkpoint has "
        "over a hundred times the weights, wants a graphics card, and is taught by the commands above.",
    ]
