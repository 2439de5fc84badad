"""Textual inversion in the loop: what a run leaves, exact resume, together with LoRA, and pictures with the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from impasto.cli import app
from impasto.core.errors import UserError
from impasto.families.load import load_base
from impasto.families.tokens import TokenVectors
from impasto.formats.adapters import load_adapter
from impasto.training import trainer
from impasto.training.metadata import metadata, shareable
from impasto.training.recipe import Recipe, make_recipe
from impasto.training.trainer import Trainer, train
from impasto.training.verdicts import Verdicts
from tests.heard import Heard
from tests.training.conftest import tree
from tests.training.test_resume import assert_equal, spawn, tensors

CAT = {"kind": "textual_inversion", "token": "<cat>", "vectors": 2, "initial": "bearded old cat"}
LORA = {"kind": "lora", "rank": 2}


def recipe(mini: Path, photos: Path, out: Path, *methods: dict[str, Any], **sections: Any) -> Recipe:
    made = tree(mini, photos, out, **{"data": {"caption": "a photo of <cat>, asleep"}, **sections})
    return make_recipe({**made, "method": list(methods) or [CAT]})


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"{step:06d}" / "state.safetensors")


def test_what_a_run_trains_and_leaves(mini: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                      ) -> None:
    """The base is the same bit for bit, the optimizer knows the new rows alone, the artifact is one small file."""
    sample, report = {"every": 6, "steps": 2, "prompts": ["<cat>"]}, Heard()
    made = recipe(mini, photos, tmp_path / "run", sample=sample)
    bases: list[Any] = []
    original = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, *rest: bases.append(self.base) or original(self, *rest))
    outcome = train(made, report)
    for name, module in load_base(mini).components.items():
        after = bases[0].components[name].state_dict()
        assert all(torch.equal(value, after[key]) for key, value in module.state_dict().items())
    assert outcome.artifact is not None and outcome.artifact == tmp_path / "run" / "dog.safetensors"
    kept = state(tmp_path / "run", 6)
    rows = kept["method.0.text_encoder.<cat>.vectors"]
    assert {tuple(t.shape) for name, t in kept.items() if name.startswith("optimizer.") and t.numel() > 1} == {(2, 32)}
    loaded = load_adapter(outcome.artifact)
    assert set(load_file(outcome.artifact)) == {"emb_params"} and not loaded.deltas
    torch.testing.assert_close(loaded.embeddings["<cat>"]["text_encoder"], rows, rtol=1e-3, atol=1e-5)
    assert loaded.family == "sd1" and loaded.base == load_base(mini).fingerprint()
    assert json.loads(loaded.metadata["impasto.recipe"])["method"][0]["token"] == "<cat>"
    assert any("'bearded old cat' is 3 tokens" in line for line in report.notes)
    pictures = [Image.open(tmp_path / "run" / "previews" / f"{step:06d}-0.png").tobytes() for step in (0, 6)]
    assert pictures[0] != pictures[1]


def test_several_tokens_are_several_files(mini: Path, photos: Path, tmp_path: Path) -> None:
    method = {"kind": "textual_inversion", "tokens": {"<cat>": {}, "asleep now": {}}}
    train(recipe(mini, photos, tmp_path / "run", method, data={"caption": "<cat> asleep now"}))
    assert {path.name for path in (tmp_path / "run").glob("*.safetensors")} == {
        "dog.safetensors", "dog-cat.safetensors", "dog-asleep_now.safetensors"}
    assert set(load_adapter(tmp_path / "run" / "dog.safetensors").embeddings) == {"<cat>", "asleep now"}


def test_pivotal_tuning_rests_half_way(mini: Path, photos: Path, tmp_path: Path) -> None:
    """The vectors stand still from the fourth step of six on, the LoRA goes on; one file holds both."""
    train(recipe(mini, photos, tmp_path / "run", {**CAT, "stop": 0.5}, LORA,
                 output={"checkpoint_every": 1, "keep": 9}))
    kept = [state(tmp_path / "run", step) for step in range(1, 7)]
    rows = [one["method.0.text_encoder.<cat>.vectors"] for one in kept]
    assert [torch.equal(a, b) for a, b in zip(rows, rows[1:], strict=False)] == [False, False, True, True, True]
    ups = [next(t for name, t in one.items() if name.startswith("method.1") and name.endswith("up")) for one in kept]
    assert not any(torch.equal(a, b) for a, b in zip(ups, ups[1:], strict=False))
    both = load_adapter(tmp_path / "run" / "dog.safetensors")
    assert both.deltas and list(both.embeddings) == ["<cat>"]
    assert "bundle_emb.<cat>.string_to_param.*" in load_file(tmp_path / "run" / "dog.safetensors")


@pytest.mark.parametrize("moment", ["in step 5", "before the manifest"])
def test_killed_and_resumed_equals_uninterrupted(mini: Path, photos: Path, tmp_path: Path, moment: str) -> None:
    methods = ({**CAT, "stop": 4, "project": True, "norm_penalty": 0.5}, LORA)
    whole, broken = (recipe(mini, photos, tmp_path / name, *methods, train={"accumulation": 2, "ema": 0.9})
                     for name in ("whole", "broken"))
    trainer.train(whole)
    assert spawn(broken, moment) == -9
    assert spawn(broken) == 0
    assert_equal(tensors(whole.output.dir), tensors(broken.output.dir))


def test_batches_without_the_token_are_no_error(mini: Path, photos: Path, tmp_path: Path) -> None:
    train(recipe(mini, photos, tmp_path / "run", data={"caption": "a <cat>", "caption_dropout": 0.8},
                 train={"batch_size": 1, "checkpointing": True}))


def test_a_token_may_go_without_a_gradient_for_long() -> None:
    """Of several tokens one may be in none of the first pictures; a layer of a LoRA may not."""
    verdicts = Verdicts({"method.0.text_encoder.<a>": TokenVectors(torch.zeros(1, 4)),
                         "method.1.unet.layer": torch.nn.Linear(2, 2)})
    with pytest.raises(UserError, match=r"nothing reaches unet.layer: "):
        for step in range(5):
            verdicts.gradients(step)


def test_captions_without_the_token_end_the_run_before_it_begins(mini: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no caption contains the token '<cat>'.*a photo of <cat>"):
        train(recipe(mini, photos, tmp_path / "run", data={"caption": "a photo of a cat"}))
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_generate_with_what_a_run_has_left(mini: Path, photos: Path, tmp_path: Path) -> None:
    train(recipe(mini, photos, tmp_path / "run", train={"learning_rate": 0.5}))

    def drawn(name: str, *more: object) -> bytes:
        arguments = ["generate", mini, "a <cat>, asleep", "--seed", 3, "--size", "32x32", "--steps", 2, "--device",
                     "cpu", "-o", tmp_path / name, *more]
        with pytest.raises(SystemExit, match="0"):
            app.main([str(argument) for argument in arguments])
        return Image.open(tmp_path / name / "001-3.png").tobytes()

    file = tmp_path / "run" / "dog.safetensors"
    assert drawn("with", "--adapter", file) == drawn("again", "--adapter", f"{file}:0.2") != drawn("without")


def test_places_on_the_disk_stay_private(mini: Path, photos: Path, tmp_path: Path) -> None:
    train(recipe(mini, photos, tmp_path / "first"))
    old = tmp_path / "first" / "dog.safetensors"
    for name, method in (("one", {"kind": "textual_inversion", "token": "<cat>", "initial_file": str(old)}),
                         ("many", {"kind": "textual_inversion", "tokens": {"<cat>": {"initial_file": str(old)}}})):
        outcome = train(recipe(mini, photos, tmp_path / name, method))
        assert outcome.artifact is not None
        told = load_adapter(outcome.artifact).metadata["impasto.recipe"]
        assert str(tmp_path) not in told and '"dog.safetensors"' in told


def test_places_of_masks_stay_private_and_the_rate_told_is_the_one_used(mini: Path, photos: Path,
                                                                         tmp_path: Path) -> None:
    made = recipe(mini, photos, tmp_path / "run")
    there = {**made.plain()["data"], "mask": "files", "masks": "/home/me/masks"}
    assert shareable({**made.plain(), "data": there})["data"]["masks"] == "masks"
    told = metadata(make_recipe({**made.plain(), "method": [{**CAT, "learning_rate": 0.005}]}), 1, base={}, data="",
                    environment={})
    assert told["ss_learning_rate"] == "0.005"


@pytest.mark.parametrize("caption, template", [
    ("{<cat>|<dog>} on a table", None), ("a <cat>\na <dog>", None), ("on a table", "{a <cat>|a <dog>}, {}")])
def test_a_token_may_be_in_what_chance_takes(caption: str, template: str | None, mini: Path, photos: Path,
                                             tmp_path: Path) -> None:
    for picture in photos.glob("*.png"):
        picture.with_suffix(".txt").write_text(caption, encoding="utf-8")
    data = {"caption": None, "wildcards": True, "caption_template": template}
    method = {"kind": "textual_inversion", "tokens": {"<cat>": {}, "<dog>": {}}}
    assert train(recipe(mini, photos, tmp_path / "run", method, data=data)).artifact is not None


@pytest.mark.parametrize("method, said", [
    ({"kind": "textual_inversion", "token": "dog"}, "is a word that text_encoder knows already"),
    ({"kind": "lora", "warm_start": "none.safetensors"}, "no such file"),
    ({"kind": "lora", "text_encoder_stop": 0.5}, "no layer of a text encoder is trained"),
    ({"kind": "full", "weights": "bf16"}, "bf16 weights need a computation in bf16"),
    ({"kind": "hypernetwork", "widths": [7]}, "no attention of this base reads a context of width 7"),
])
def test_options_that_do_not_fit_are_told_before_pictures_are_encoded(
        method: dict[str, Any], said: str, mini: Path, photos: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    def encoded(*_: Any, **__: Any) -> None:
        raise AssertionError("pictures are encoded")

    monkeypatch.setattr(trainer, "prepare_source", encoded)
    with pytest.raises(UserError, match=said):
        train(recipe(mini, photos, tmp_path / "run", method))
