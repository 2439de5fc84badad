"""Validation: a fixed question, asked again and again, that never disturbs what it asks about."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from impasto.core.progress import Reporter
from impasto.core.rng import generator
from impasto.training.previews import evaluating
from impasto.training.recipe import Recipe
from impasto.training.run import Run
from impasto.training.trainer import Trainer, train
from impasto.training.validation import FixedDraws, Validation
from tests.heard import Heard
from tests.training.conftest import draw
from tests.training.test_resume import assert_equal, entries, on_call, tensors

RecipeMaker = Callable[..., Recipe]


@pytest.fixture
def held_out(tmp_path: Path) -> str:
    """Two pictures of two shapes that are in no other folder."""
    folder = tmp_path / "held out"
    folder.mkdir()
    draw(folder / "a.png", 11, (64, 64))
    draw(folder / "b.png", 12, (64, 128))
    return str(folder)


def made(recipe: Recipe) -> Iterator[Trainer]:
    with Run.open(Path(recipe.output.dir), "dog") as run:
        yield Trainer(recipe, run, Reporter())


def validations(recipe: Recipe) -> list[tuple[int, float]]:
    return [(entry["step"], entry["validation"]) for entry in entries(recipe.output.dir) if "validation" in entry]


def weights(recipe: Recipe, name: str = "dog") -> dict[str, torch.Tensor]:
    return load_file(Path(recipe.output.dir) / f"{name}.safetensors")


def told(path: Path) -> int:
    """After which step an artifact was made."""
    with safe_open(path, "pt") as file:
        return int(file.metadata()["impasto.step"])


def test_draws_are_of_the_picture_and_the_repeat_and_times_are_stratified() -> None:
    uses = [(picture, repeat) for picture in ("a", "b") for repeat in range(4)]
    draws = FixedDraws(5, uses, 4)
    times, noise = draws.uniform("time"), draws.normal("noise", (3,))
    for row, (picture, repeat) in enumerate(uses):
        own = generator(5, "validation", picture, repeat, "time")
        assert times[row].item() == pytest.approx((repeat + torch.rand((), generator=own).item()) / 4, abs=1e-7)
        assert repeat / 4 <= times[row] < (repeat + 1) / 4
        alone = FixedDraws(5, [(picture, repeat)], 4)
        assert alone.normal("noise", (3,))[0].equal(noise[row]) and alone.uniform("time")[0] == times[row]
    assert len({tuple(row.tolist()) for row in noise}) == 8
    assert draws.uniform("cells", (2,)).shape == (8, 2) and draws.uniform("time").max() < 1


def test_the_loss_is_the_mean_of_the_steps_losses_by_hand(recipe: RecipeMaker, held_out: str) -> None:
    """One draw at a time, from the process's own formulas: q(x_t | x_0), the prediction, the squared error."""
    options = recipe(validation={"folder": held_out, "repeats": 3}, method={"dropout": 0.5})
    for each in made(options):
        base, process = each.base, each.base.process
        with evaluating(each.trained.values()):
            ours = each.validation.loss(base, each.objective, each.precision, each.device)
            torch.manual_seed(7)
            assert each.validation.loss(base, each.objective, each.precision, each.device) == ours
            by_hand = []
            for place, item in enumerate(each.source.held_out):
                for repeat in range(3):
                    batch, digest = each.source.validation_batch([place]), item.picture.digest

                    def drawn(use: str, shape: tuple[int, ...], key: tuple[str, int] = (digest, repeat)) -> Tensor:
                        return torch.randn(shape, generator=generator(0, "validation", *key, use))[None]

                    assert batch.moments is not None and batch.text is not None
                    shape = (4, *batch.moments.shape[2:])
                    u = torch.rand((), generator=generator(0, "validation", digest, repeat, "time"))
                    time = ((repeat + u) / 3 * 1000).long()[None]
                    x0, noise = base.latents(batch.moments, drawn("latent", shape)), drawn("noise", shape)
                    alpha, sigma = process.alpha_sigma(time)
                    x_t = alpha[:, None, None, None] * x0 + sigma[:, None, None, None] * noise
                    with torch.no_grad():
                        predicted = base.predict(x_t, time, base.condition(batch.text, batch.geometry))
                    by_hand.append((predicted - noise).square().mean().item())
        assert ours == pytest.approx(sum(by_hand) / 6, rel=1e-5)


def test_it_disturbs_nothing(recipe: RecipeMaker, held_out: str) -> None:
    sections: dict[str, Any] = dict(method={"dropout": 0.2, "targets": ["attention", "text-encoder"]},
                                    train={"ema": 0.5}, data={"flip": True})
    without = recipe("without", **sections)
    watched = recipe("with", **sections, validation={"folder": held_out, "every": 1})
    train(without)
    train(watched)
    assert_equal(*({name: tensor for folder in (made.output.dir,) for name, tensor in
                    load_file(Path(folder) / "checkpoints/000006/state.safetensors").items()}
                   for made in (without, watched)))
    assert_equal(weights(without), weights(watched))
    loss = [[entry["loss"] for entry in entries(each.output.dir) if "loss" in entry] for each in (without, watched)]
    assert loss[0] == loss[1]
    assert [step for step, _ in validations(watched)] == list(range(7)) and validations(without) == []


def test_the_best_is_kept_and_is_what_was_shown(recipe: RecipeMaker, held_out: str,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([0.1, 0.9, 0.5, math.nan, 0.7])
    monkeypatch.setattr(Validation, "loss", lambda *_: next(losses))
    watched = recipe(validation={"folder": held_out, "every": 2}, train={"steps": 7, "ema": 0.5},
                     output={"save_every": 4})
    heard = Heard()
    outcome = train(watched, heard)
    folder = Path(watched.output.dir)
    assert told(folder / "dog-best.safetensors") == 4 and told(folder / "dog.safetensors") == 7
    assert_equal(weights(watched, "dog-best"), weights(watched, "dog-000004"))
    assert heard.warnings == ["the validation loss is not finite at step 6"] and outcome.validation == 0.7
    assert validations(watched) == [(0, 0.1), (2, 0.9), (4, 0.5), (6, None), (7, 0.7)]
    assert any("validation every 2 steps, with 4 draws for each of 2" in line for line in heard.notes)


def test_a_whole_base_is_replaced_by_a_better_one(recipe: RecipeMaker, held_out: str,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 1.0])
    monkeypatch.setattr(Validation, "loss", lambda *_: next(losses))
    watched = recipe(validation={"folder": held_out, "every": 1}, train={"steps": 2}, output={"format": "auto"})
    plain = watched.plain() | {"method": [{"kind": "full"}]}
    watched = Recipe.model_validate(plain)
    train(watched)
    folder = Path(watched.output.dir)
    assert told(folder / "dog-best" / "unet" / "diffusion_pytorch_model.safetensors") == 2
    assert not list(folder.glob("*.part"))


def test_it_ends_early_and_the_same_command_does_not_go_on(recipe: RecipeMaker, held_out: str,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([0.1, 0.5, 0.6, 0.7])
    monkeypatch.setattr(Validation, "loss", lambda *_: next(losses))
    keys = {"folder": held_out, "every": 1, "patience": 2}
    heard = Heard()
    outcome = train(recipe(validation=keys), heard)
    folder = Path(recipe().output.dir)
    assert outcome.step == 3 and outcome.artifact == folder / "dog.safetensors" and outcome.stopped_by is None
    assert outcome.ended is not None and "is 0.5, of step 1; none of the 2 validations since" in outcome.ended
    assert any("ended after step 3" in line for line in heard.notes)
    assert told(folder / "dog.safetensors") == 3 and told(folder / "dog-best.safetensors") == 1
    again = train(recipe(validation=keys))
    assert again.resumed_from == again.step == 3 and again.ended == outcome.ended
    assert len(validations(recipe())) == 4
    losses = iter([0.4, 0.3, 0.2])
    assert train(recipe(validation={**keys, "patience": 4})).step == 6  # patience may grow


@pytest.mark.parametrize("call", [("_accumulate", 5), ("_keep", 4)])
def test_killed_and_resumed_it_has_the_same_best_and_the_same_log(recipe: RecipeMaker, held_out: str,
                                                                  call: tuple[str, int],
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def die(*_: Any, **keywords: Any) -> None:
        raise Killed

    keys = {"validation": {"folder": held_out, "every": 1}, "train": {"learning_rate": 0.02}}
    straight, killed = recipe("straight", **keys), recipe("killed", **keys)
    train(straight)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, call[0], getattr(Trainer, call[0]))  # put back afterwards
        on_call(Trainer, *call, die)
        with pytest.raises(Killed):
            train(killed)
    train(killed)
    assert validations(straight) == validations(killed) and len(validations(straight)) == 7
    manifests = [json.loads((Path(each.output.dir) / "checkpoints/000006/manifest.json").read_text())
                 for each in (straight, killed)]
    assert manifests[0]["values"]["validation"] == manifests[1]["values"]["validation"]
    assert manifests[0]["values"]["validation"]["best"] == min(loss for step, loss in validations(straight) if step)
    assert_equal(weights(straight, "dog-best"), weights(killed, "dog-best"))
    assert_equal(weights(straight), weights(killed))


def test_a_stop_does_not_wait_for_a_validation_or_a_preview(recipe: RecipeMaker, held_out: str,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """The next sitting begins with what the stop has put off, and ends as if there had been none."""
    keys: dict[str, Any] = {"validation": {"folder": held_out, "every": 2}, "sample": {"every": 3, "steps": 1}}
    straight, stopped = recipe("straight", **keys), recipe("stopped", **keys)
    train(straight)
    with monkeypatch.context() as patch:
        patch.setattr(FixedDraws, "__init__", FixedDraws.__init__)  # put back afterwards
        # 8 uses of pictures of two shapes are 4 batches: this is the second one of the validation after step 4
        on_call(FixedDraws, "__init__", 10, lambda: os.kill(os.getpid(), signal.SIGTERM), after=True)
        outcome = train(stopped)
    assert outcome.step == 4 and outcome.stopped_by == signal.SIGTERM
    assert [step for step, _ in validations(stopped)] == [0, 2]
    resumed = train(stopped)
    assert resumed.resumed_from == 4 and validations(stopped) == validations(straight)
    assert_equal(tensors(straight.output.dir), tensors(stopped.output.dir))
    assert_equal(weights(straight, "dog-best"), weights(stopped, "dog-best"))

    at_a_preview = recipe("at a preview", **keys)
    assert train(at_a_preview, stop_after=3).step == 3
    previews = Path(at_a_preview.output.dir) / "previews"
    assert not (previews / "000003-0.png").exists()
    train(at_a_preview)
    kept = Path(straight.output.dir) / "previews" / "000003-0.png"
    assert (previews / "000003-0.png").read_bytes() == kept.read_bytes()


def test_an_older_checkpoint_does_not_tell_of_the_last_validation(recipe: RecipeMaker, held_out: str) -> None:
    for trainer in made(recipe(validation={"folder": held_out, "every": 1})):
        own = trainer.validation
        assert own.missed(0) and own.missed(6)
        state = own.state()
        del state["at"]
        own.load(state)
        assert not own.missed(6)


def test_killed_before_the_first_checkpoint_nothing_is_told_twice(recipe: RecipeMaker, held_out: str,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    watched = recipe(validation={"folder": held_out, "every": 1}, output={"checkpoint_every": 100})
    original = Trainer._update
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", lambda self, step: 1 / 0 if step == 2 else original(self, step))
        with pytest.raises(ZeroDivisionError):
            train(watched)
    train(watched)
    assert [step for step, _ in validations(watched)] == list(range(7))


def test_other_pictures_are_another_question(recipe: RecipeMaker, held_out: str) -> None:
    keys = {"folder": held_out, "every": 1}
    train(recipe(validation=keys))
    draw(Path(held_out) / "a.png", 13, (64, 64))
    heard = Heard()
    train(recipe(validation=keys, train={"steps": 7}), heard)
    assert "the held-out pictures have changed: the lowest loss so far is forgotten" in heard.warnings


def test_of_the_drawn_world_and_of_few_pictures(recipe: RecipeMaker, mini: Path, tmp_path: Path) -> None:
    tree = recipe().plain() | {"data": {"source": "world", "pictures": 20, "resolution": 64, "buckets": False}}
    tree["output"]["dir"] = str(tmp_path / "world")
    tree["train"]["steps"] = 2
    tree["validation"] = {}
    world = Recipe.model_validate(tree)
    train(world)
    assert [step for step, _ in validations(world)] == [0, 2]
    train(recipe("few", train={"steps": 2}))
    assert validations(recipe("few")) == [] and not (tmp_path / "few" / "dog-best.safetensors").exists()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_several_processes_end_together(mini: Path, photos: Path, held_out: str, tmp_path: Path) -> None:
    from tests.training.conftest import tree
    from tests.training.test_processes import run

    keys = {"steps": 6, "batch_size": 2, "learning_rate": 1e-12}  # the loss stays what it is, to its last bits
    made = tree(mini, photos, tmp_path / "run", train=keys, data={"buckets": False},
                validation={"folder": held_out, "every": 1, "patience": 1})
    done = run(tmp_path, made, 2)
    assert done.returncode == 0 or "did not change" in done.stderr, done.stderr
    steps = [entry["step"] for entry in entries(str(tmp_path / "run")) if "loss" in entry]
    assert steps and len(steps) < 6


