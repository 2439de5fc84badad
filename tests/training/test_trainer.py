"""The loop: what it computes, what it leaves, and how it stops."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from impasto.core import files
from impasto.core.errors import UserError
from impasto.core.progress import Reporter
from impasto.families.load import load_base
from impasto.formats.adapters import load_adapter
from impasto.training import run, trainer
from impasto.training.recipe import Recipe
from impasto.training.trainer import train

RecipeMaker = Callable[..., Recipe]


def losses(folder: str) -> list[float]:
    lines = (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_a_run_leaves_what_the_readme_says(recipe: RecipeMaker) -> None:
    made = recipe(sample={"every": 3, "steps": 2, "prompts": ["sks dog", "a (red:1.3) dog"]}, output={"save_every": 2})
    outcome = train(made)
    folder = Path(made.output.dir)
    assert outcome.artifact == folder / "dog.safetensors" and outcome.step == 6
    assert {p.name for p in folder.iterdir() if not p.name.startswith(".")} == {
        "dog.safetensors", "dog-000002.safetensors", "dog-000004.safetensors", "checkpoints", "previews",
        "tensorboard", "log.jsonl", "recipe.toml"}
    assert sorted(p.name for p in (folder / "previews").iterdir()) == [
        f"{step:06d}-{i}.png" for step in (0, 3, 6) for i in (0, 1)]
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["000004", "000006"]
    assert len(losses(made.output.dir)) == 6
    with safe_open(folder / "dog.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_steps"] == "6" and json.loads(metadata["impasto.recipe"])["method"][0]["rank"] == 4
    assert json.loads(metadata["impasto.recipe"])["data"]["folder"] == Path(made.data.folder).name  # no private paths


def test_previews_come_from_fixed_seeds_and_change_with_training_only(recipe: RecipeMaker) -> None:
    sample = {"every": 3, "steps": 2, "prompts": ["sks dog"]}
    train(recipe("a", sample=sample, train={"learning_rate": 0.05}))
    train(recipe("b", sample=sample, train={"learning_rate": 0.05, "seed": 1}))
    pictures = {name: [Image.open(Path(recipe(name).output.dir) / "previews" / f"{s:06d}-0.png").tobytes()
                       for s in (0, 3, 6)] for name in "ab"}
    assert pictures["a"][0] == pictures["b"][0]
    assert len({*pictures["a"], *pictures["b"]}) == 5


def test_same_seed_same_weights_and_another_seed_others(recipe: RecipeMaker) -> None:
    results = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(recipe(name, train={"seed": seed}))
        results[name] = load_file(Path(recipe(name).output.dir) / "dog.safetensors")
    assert all(torch.equal(results["a"][key], results["b"][key]) for key in results["a"])
    assert any(not torch.equal(results["a"][key], results["c"][key]) for key in results["a"])


def test_accumulation_equals_a_larger_batch(recipe: RecipeMaker, photos: Path, tmp_path: Path) -> None:
    """Two micro-batches of 2 take the draws of one batch of 4, and the mean of their gradients."""
    folder = tmp_path / "one"
    folder.mkdir()
    shutil.copy(photos / "1.png", folder)  # one picture, four times in each step
    train(recipe("a", data={"folder": str(folder)}, train={"batch_size": 4}))
    train(recipe("b", data={"folder": str(folder)}, train={"batch_size": 2, "accumulation": 2}))
    assert losses(recipe("a").output.dir) == pytest.approx(losses(recipe("b").output.dir), rel=1e-4)


def test_gradient_checkpointing_changes_nothing_but_memory(recipe: RecipeMaker) -> None:
    method = {"targets": ["attention", "text-encoder"]}
    train(recipe("a", method=method))
    train(recipe("b", method=method, train={"checkpointing": True}))
    assert losses(recipe("a").output.dir) == pytest.approx(losses(recipe("b").output.dir), rel=1e-5)


def test_bf16_follows_fp32(recipe: RecipeMaker) -> None:
    train(recipe("a"))
    train(recipe("b", train={"precision": "bf16"}))
    assert losses(recipe("a").output.dir) == pytest.approx(losses(recipe("b").output.dir), rel=0.05)
    state = load_file(Path(recipe("b").output.dir) / "checkpoints" / "000006" / "state.safetensors")
    assert all(t.dtype == torch.float32 for name, t in state.items() if name.startswith("method."))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_fp32_on_a_gpu(recipe: RecipeMaker, precision: str) -> None:
    train(recipe("a", train={"device": "cuda", "precision": "fp32"}))
    train(recipe("b", train={"device": "cuda", "precision": precision}))
    assert losses(recipe("a").output.dir) == pytest.approx(losses(recipe("b").output.dir), rel=0.05)


@pytest.mark.gpu
def test_resume_is_exact_on_a_gpu_where_kernels_are_deterministic(recipe: RecipeMaker) -> None:
    cuda = {"device": "cuda", "deterministic": True}
    train(recipe("straight", train=cuda))
    train(recipe("two", train={**cuda, "steps": 4}))
    assert train(recipe("two", train=cuda)).resumed_from == 4
    a, b = (load_file(Path(recipe(name).output.dir) / "dog.safetensors") for name in ("straight", "two"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_it_learns(recipe: RecipeMaker) -> None:
    """On one picture, with many steps, the loss at the end is lower than at the start."""
    made = recipe(train={"steps": 60, "learning_rate": 1e-2, "batch_size": 4},
                  method={"targets": ["all"], "rank": 8}, output={"checkpoint_every": 1000})
    train(made)
    curve = losses(made.output.dir)
    assert sum(curve[-15:]) < 0.9 * sum(curve[:15])


def test_the_artifact_is_the_adapter_that_was_trained(recipe: RecipeMaker, mini: Path) -> None:
    made = recipe(output={"dtype": "fp32"})
    train(made)
    adapter = load_adapter(Path(made.output.dir) / "dog.safetensors")
    state = load_file(Path(made.output.dir) / "checkpoints" / "000006" / "state.safetensors")
    trained = sum(t.numel() for name, t in state.items() if name.startswith("method."))
    assert sum(p.numel() for terms in adapter.deltas.values() for term in terms for p in term.parameters()) == trained
    assert set(adapter.deltas) == set(load_base(mini).targets("attention"))
    assert adapter.base == load_base(mini).fingerprint() and adapter.family == "sd1"
    assert any(adapter.dense(layer).abs().max() > 0 for layer in adapter.deltas)


def test_epochs_count_pictures(recipe: RecipeMaker) -> None:
    """Five pictures in three buckets of 2, 2 and 1 with batches of two are three steps."""
    made = recipe(train={"steps": None, "epochs": 2})
    assert train(made).step == 6


def test_class_pictures_come_on_top_with_their_weight(recipe: RecipeMaker, class_pictures: Path) -> None:
    prior = {"caption": "a photo of a dog", "folder": str(class_pictures)}
    for weight in (0.0, 1.0):
        train(recipe(f"w{weight}", prior={**prior, "weight": weight}, train={"steps": 2}))
    train(recipe("none", train={"steps": 2}))
    first = {name: losses(recipe(name).output.dir)[0] for name in ("w0.0", "w1.0", "none")}
    assert first["w0.0"] == pytest.approx(first["none"], rel=1e-5)
    assert first["w1.0"] > 1.5 * first["none"]


def test_nan_stops_with_step_files_and_advice(recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    original = trainer.step_losses

    def poisoned(base, batch, objective, draws):
        result = original(base, batch, objective, draws)
        return result * float("nan") if draws.step == 3 else result

    monkeypatch.setattr(trainer, "step_losses", poisoned)
    with pytest.raises(UserError, match=r"not finite at step 4, with .*\.png.*learning_rate.*000002"):
        train(recipe())
    monkeypatch.setattr(trainer, "step_losses", original)
    assert train(recipe()).resumed_from == 2


@pytest.mark.parametrize("place", ["checkpoint", "artifact"])
def test_a_full_disk_loses_nothing(recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def full(*args: object, **keywords: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    straight = recipe("straight")
    train(straight)
    made = recipe("full")
    with monkeypatch.context() as patch:
        calls = [0]
        owner, name = (run, "save_tensors") if place == "checkpoint" else (files.os, "replace")
        original = getattr(owner, name)

        def second_time(*args, **keywords):
            calls[0] += 1
            if (calls[0] == 2) if place == "checkpoint" else str(args[1]).endswith("dog.safetensors"):
                return full()
            return original(*args, **keywords)

        patch.setattr(owner, name, second_time)
        with pytest.raises(UserError, match="disk is full"):
            train(made)
    assert not list(Path(made.output.dir).rglob("*.part")) and not (Path(made.output.dir) / "dog.safetensors").exists()
    assert train(made).resumed_from == (2 if place == "checkpoint" else 6)
    a, b = (load_file(Path(r.output.dir) / "dog.safetensors") for r in (straight, made))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_two_runs_in_one_directory(recipe: RecipeMaker) -> None:
    made = recipe()
    with run.Run.open(Path(made.output.dir), "dog"), pytest.raises(UserError, match="already training here"):
        train(made)


def test_changed_pictures_are_noticed_at_resume(recipe: RecipeMaker, tmp_path: Path) -> None:
    from tests.training.conftest import draw
    folder = tmp_path / "pictures"
    folder.mkdir()
    draw(folder / "a.png", 1, (64, 64))
    train(recipe(data={"folder": str(folder)}))
    draw(folder / "a.png", 2, (64, 64))
    with pytest.raises(UserError, match="have changed since this run was stopped"):
        train(recipe(data={"folder": str(folder)}, train={"steps": 8}))


def test_the_live_line_has_loss_speed_and_memory(recipe: RecipeMaker) -> None:
    class Heard(Reporter):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def phase(self, title: str, total: int | None = None, unit: str = ""):
            from contextlib import contextmanager

            @contextmanager
            def block():
                yield lambda n, status="": self.lines.append(status)
            return block()

    heard = Heard()
    train(recipe(), heard)
    live = [line for line in heard.lines if "loss" in line]
    assert len(live) == 6 and "pictures/s" in live[0] and "GiB" in live[0]


@pytest.mark.slow
def test_compile_follows_eager(recipe: RecipeMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The UNet is traced whole, forward and backward; inductor's C++, minutes of it, is left to its own tests."""
    train(recipe("a", train={"steps": 2}))
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: original(self, backend="aot_eager"))
    train(recipe("b", train={"steps": 2, "compile": True}))
    assert losses(recipe("a").output.dir) == pytest.approx(losses(recipe("b").output.dir), rel=1e-4)


def test_a_recipe_without_data_says_so(recipe: RecipeMaker) -> None:
    made = recipe()
    made = made.model_copy(update={"data": None})
    with pytest.raises(UserError, match=r"\[data\] is missing"):
        train(made)


