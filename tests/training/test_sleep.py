"""What sleeps in a run is let go, and every use of it afterwards finds what it would have found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from impasto.core.errors import UserError
from impasto.families.base import Base
from impasto.training import trainer
from impasto.training.recipe import Recipe, make_recipe
from impasto.training.trainer import train
from tests.checkpoints import write_checkpoint
from tests.families.test_asleep import asleep
from tests.training.conftest import draw, tree

TEXTS = {"text_encoder"}
#: what is trained and looked at -> the recipe, and what sleeps in its steps
RUNS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "previews": ({"method": {"kind": "lora"}}, TEXTS | {"vae"}),
    "a text encoder that trains": ({"method": {"kind": "lora", "targets": ["attention", "text-encoder"]}}, {"vae"}),
    "weights in few bits": ({"base": {"quantize": "nf4", "quantize_text": "int8"}, "method": {"kind": "lora"}},
                            TEXTS | {"vae"}),
    "a whole base, and its average": ({"method": {"kind": "full"}, "train": {"ema": 0.9},
                                       "output": {"save_every": 2}}, TEXTS | {"vae"}),
    "a whole base in bf16": ({"method": {"kind": "full"}, "train": {"precision": "bf16"}}, TEXTS | {"vae"}),
    "differences": ({"method": {"kind": "full", "parts": ["attention"]}, "output": {"format": "delta"}},
                    TEXTS | {"vae"}),
    "validation": ({"method": {"kind": "lora"}, "validation": {"fraction": 0.4, "every": 2, "keep_best": True}},
                   TEXTS | {"vae"}),
    "a teacher": ({"method": {"kind": "lora"}, "objective": {"kind": "teach", "caption": "a dog"}}, TEXTS | {"vae"}),
    "new tokens": ({"method": {"kind": "textual_inversion", "token": "sks dog"}}, {"vae"}),
    "a decoder": ({"method": {"kind": "full", "parts": ["vae-decoder"]}, "objective": {"kind": "reconstruct"}}, TEXTS),
    "class pictures": ({"method": {"kind": "lora"}, "prior": {"caption": "a dog", "images": 2, "steps": 2}},
                       TEXTS | {"vae"}),
    "inpainting": ({"method": {"kind": "lora"}}, TEXTS | {"vae"}),
    "instruct-pix2pix": ({"method": {"kind": "lora"}, "data": {"pairs": "files"}}, TEXTS | {"vae"}),
    "sdxl": ({"method": {"kind": "lora"}}, TEXTS | {"text_encoder_2", "vae"}),
    "sd3": ({"method": {"kind": "lora"}}, TEXTS | {"text_encoder_2", "text_encoder_3", "vae"}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("bases")

    def base(kind: str) -> Path:
        if kind in ("sdxl", "sd3"):
            return write_checkpoint(folder / kind, kind, layout="diffusers")
        return write_checkpoint(folder / kind, layout="diffusers",
                                variant=kind if kind in ("inpainting", "instruct-pix2pix") else "")

    return base


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for key in range(5):
        draw(folder / f"{key}.png", key, (64, 64))
        draw(folder / f"{key}-source.png", 50 + key, (64, 64))
    return folder


def left(folder: Path) -> dict[str, Any]:
    """Everything that a run has left which says what was computed: tensors, and pictures' bytes."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".safetensors":
            found |= {f"{name}: {key}": tensor for key, tensor in load_file(path).items()}
        elif path.suffix == ".png":
            found[name] = path.read_bytes()
    return found


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_is_what_it_is_without_sleep(kind: str, bases: Callable[[str], Path], photos: Path, pairs: Path,
                                           tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections, sleeping = RUNS[kind]
    pictures = pairs if kind == "instruct-pix2pix" else photos
    update, slept = trainer.Trainer._update, list[set[str]]()

    def watched(self: trainer.Trainer, step: int) -> float:
        slept.append({name for name, network in self.base.components.items() if asleep(network)})
        return update(self, step)

    monkeypatch.setattr(trainer.Trainer, "_update", watched)
    base = bases(kind)
    results = []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(Base, "sleep", lambda self, names: None)
        plain = tree(base, pictures, tmp_path / name, **{
            **sections, "base": {"path": str(base), **sections.get("base", {})},
            "train": {"steps": 4, **sections.get("train", {})},
            "sample": {"every": 2, "steps": 2, "prompts": ["sks dog"]},
            "output": {"name": "dog", "dtype": "fp32", **sections.get("output", {})}})
        train(make_recipe({**plain, "method": sections["method"]}))
        results.append(left(tmp_path / name))
    assert slept[:4] == [sleeping] * 4 and slept[4:] == [set()] * 4
    assert results[0].keys() == results[1].keys() and len(results[0]) > 8
    assert [name for name in results[0] if not same(results[0][name], results[1][name])] == []


def test_a_base_that_is_gone_at_a_preview_is_told(recipe: Callable[..., Recipe], mini: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """What was learned up to there is kept, and with the base back the same command goes on."""
    base = tmp_path / "base.safetensors"
    shutil.copy(mini, base)
    made = recipe(base={"path": str(base)}, sample={"every": 3, "steps": 2, "prompts": ["sks dog"]})
    preview = trainer.Trainer._preview

    def late(self: trainer.Trainer, step: int) -> None:
        if step:
            base.unlink()
        preview(self, step)

    monkeypatch.setattr(trainer.Trainer, "_preview", late)
    with pytest.raises(UserError, match="is not what it was when this began.*put the base back"):
        train(made)
    monkeypatch.undo()
    shutil.copy(mini, base)
    assert train(made).resumed_from == 2
