"""Runs that train a base's own weights: from random ones, on the drawn world, averaged, resumed, opened elsewhere."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from impasto.core.errors import UserError
from impasto.families.load import load_base
from impasto.training import trainer
from impasto.training.ema import Ema
from impasto.training.recipe import Recipe, make_recipe
from impasto.training.trainer import train
from tests.checkpoints import write_checkpoint
from tests.training.test_resume import die, on_call

WORLD: dict[str, Any] = {"source": "world", "pictures": 8, "resolution": 64, "buckets": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "mini", layout="diffusers")


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(name: str = "run", **sections: Any) -> Recipe:
        tree: dict[str, Any] = {
            "base": {"path": str(folder)}, "data": WORLD, "method": {"kind": "full"},
            "train": {"steps": 4, "batch_size": 2, "device": "cpu", "ema": 0.9, "learning_rate": 1e-3},
            "sample": {"every": 0}, "output": {"dir": str(tmp_path / name), "dtype": "fp32", "checkpoint_every": 2}}
        return make_recipe({**tree, **{key: {**tree.get(key, {}), **value} for key, value in sections.items()}})

    return make


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {f"{file.parent.name}.{key}": tensor for file in sorted(path.rglob("*.safetensors"))
            for key, tensor in load_file(file).items()}


def test_a_whole_base_is_left_and_diffusers_draws_with_it(recipe: Callable[..., Recipe], folder: Path) -> None:
    outcome = train(recipe())
    assert outcome.artifact is not None and outcome.artifact.is_dir()
    before, after = load_base(folder).fingerprint(), load_base(outcome.artifact).fingerprint()
    assert {name for name in after if before[name] != after[name]} == {"unet"}
    pipe = StableDiffusionPipeline.from_pretrained(outcome.artifact, local_files_only=True)
    assert pipe("a red star", num_inference_steps=2, height=64, width=64).images[0].size == (64, 64)
    assert train(recipe()).artifact == outcome.artifact  # the same command again has nothing to do


def test_random_weights_need_no_weights_in_the_folder(recipe: Callable[..., Recipe], folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".away"))
    try:
        artifact = train(recipe(base={"init": "random"})).artifact
        with pytest.raises(UserError, match="has no weights that can be read"):
            train(recipe("other"))
    finally:
        for file in folder.rglob("*.away"):
            file.rename(file.with_suffix(".safetensors"))
    assert artifact is not None and load_base(artifact).family == "sd1"


def test_a_vae_learns_to_reconstruct_and_its_scale_is_measured(recipe: Callable[..., Recipe]) -> None:
    made = recipe(method={"parts": ["vae"]}, objective={"kind": "reconstruct"}, data={"doodles": 0.25},
                  train={"steps": 40, "optimizer": "muon", "learning_rate": 4e-3, "ema": 0.0})
    artifact = train(made).artifact
    losses = [entry["loss"] for entry in entries(made)]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert artifact is not None
    scale = load_base(artifact).components["vae"].config.scaling_factor  # pyright: ignore
    assert scale != pytest.approx(0.18215)


def test_a_text_encoder_learns_what_captions_say(recipe: Callable[..., Recipe]) -> None:
    made = recipe(method={"parts": ["text-encoder"]}, objective={"kind": "classify"}, data={"pictures": 32},
                  train={"steps": 60, "batch_size": 16, "learning_rate": 5e-3, "ema": 0.0})
    train(made)
    losses = [entry["loss"] for entry in entries(made)]
    assert sum(losses[-8:]) < 0.6 * sum(losses[:8])


def entries(recipe: Recipe) -> list[dict[str, Any]]:
    import json

    lines = (Path(recipe.output.dir) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


KINDS: dict[str, dict[str, Any]] = {
    "unet and text encoder": {"method": {"parts": ["unet", "text-encoder"]}, "data": {"caption_dropout": 0.5}},
    "vae by muon": {"method": {"parts": ["vae"]}, "objective": {"kind": "reconstruct"},
                    "train": {"optimizer": "muon"}},
    "classify": {"method": {"parts": ["text-encoder"]}, "objective": {"kind": "classify"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_bit_equal(kind: str, recipe: Callable[..., Recipe]) -> None:
    """Weights, averages, the objective's own weights and the optimizer's state all come back."""
    killed_and_straight(recipe("straight", **KINDS[kind]), recipe("broken", **KINDS[kind]))


def killed_and_straight(straight: Recipe, broken: Recipe) -> None:
    """One run as it is, the same killed in its fourth step and started again: they leave equal weights."""
    expected = train(straight).artifact
    process = multiprocessing.get_context("forkserver").Process(target=killed, args=(broken.plain(),))
    process.start()
    process.join()
    assert process.exitcode == -9
    outcome = train(broken)
    assert outcome.resumed_from == 2 and outcome.artifact is not None and expected is not None
    found, wanted = weights(outcome.artifact), weights(expected)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def killed(plain: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    on_call(trainer.Trainer, "_accumulate", 4, die)
    train(make_recipe(plain))


def test_what_cannot_be_joined_or_saved_is_said_before_the_run(recipe: Callable[..., Recipe]) -> None:
    plain = recipe().plain()
    with pytest.raises(UserError, match="leaves a whole base behind and cannot be joined"):
        make_recipe({**plain, "method": [{"kind": "full"}, {"kind": "lora", "rank": 2}]})
    with pytest.raises(UserError, match="output.format is diffusers, or delta for what .*, not kohya"):
        recipe(output={"format": "kohya"})
    with pytest.raises(UserError, match="draws pictures and captions itself"):
        recipe(data={"folder": "photos"})


def test_the_average_is_its_recurrence_in_float64() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    ema, expected = Ema([parameter], 0.9), torch.zeros(3, dtype=torch.float64)
    for step in range(1, 30):
        parameter.data = torch.sin(torch.arange(3.0) + step)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.data.double()
    kept = parameter.data.clone()
    with ema.shown():
        torch.testing.assert_close(parameter.data.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(parameter.data, kept)
