"""Runs that train parts of a base: what is left beside them, what a file of the difference holds, resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from impasto.core.errors import UserError
from impasto.families.apply import apply
from impasto.families.load import load_base
from impasto.families.save import save_folder
from impasto.formats.adapters import load_adapter
from impasto.mini import world
from impasto.training import artifacts
from impasto.training.recipe import Recipe, make_recipe
from impasto.training.trainer import train
from tests.checkpoints import write_checkpoint
from tests.training.test_full import entries, killed_and_straight

WORLD: dict[str, Any] = {"source": "world", "pictures": 8, "resolution": 64, "buckets": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "mini.safetensors")


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(name: str = "run", **sections: Any) -> Recipe:
        tree: dict[str, Any] = {
            "base": {"path": str(base)}, "data": WORLD, "method": {"kind": "full"},
            "train": {"steps": 4, "batch_size": 2, "device": "cpu", "learning_rate": 1e-3},
            "sample": {"every": 0}, "output": {"dir": str(tmp_path / name), "dtype": "fp32", "checkpoint_every": 2}}
        return make_recipe({**tree, **{key: {**tree.get(key, {}), **value} for key, value in sections.items()}})

    return make


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Of a base, in fp32."""
    return {f"{name}.{key}": tensor for name, network in load_base(path).components.items()
            for key, tensor in network.state_dict().items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_but_the_chosen_weights_are_left_bit_for_bit(precision: str, recipe: Callable[..., Recipe], base: Path
                                                         ) -> None:
    """Also where the run computes in less precision than the file has."""
    made = recipe(method={"parts": ["keys-values", "down_blocks.1"]}, train={"precision": precision})
    outcome = train(made)
    assert outcome.artifact is not None
    before, after = tensors_of(base), tensors_of(outcome.artifact)
    chosen = {path for path in before if ".attn2.to_k." in path or ".attn2.to_v." in path
              or path.startswith("unet.down_blocks.1.")}
    assert before.keys() == after.keys()
    assert {path for path in before if not torch.equal(before[path], after[path])} == chosen
    state = load_file(Path(made.output.dir) / "checkpoints/000004/state.safetensors")
    assert {key.removeprefix("method.0.") for key in state if key.startswith("method.")} == chosen
    moments = {key for key in state if key.startswith("optimizer.") and key.endswith("/exp_avg")}
    assert len(moments) == len(chosen) and len(state) == 4 * len(chosen)  # weight, two moments and a count


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_a_killed_run_ends_bit_equal(kind: str, recipe: Callable[..., Recipe]) -> None:
    """bf16: the rounding's draws go on too, and the average and the moments, which are fp32."""
    sections: dict[str, Any] = {
        "method": {"parts": ["keys-values", "norms", "text-encoder"], "weights": kind},
        "train": {"precision": "bf16", "ema": 0.9}, "data": {"caption_dropout": 0.5}}
    straight, broken = recipe("straight", **sections), recipe("broken", **sections)
    killed_and_straight(straight, broken)
    states = [load_file(Path(each.output.dir) / "checkpoints/000004/state.safetensors") for each in (straight, broken)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    trained = {tensor.dtype for key, tensor in states[0].items() if key.startswith("method.")}
    assert trained == {torch.bfloat16 if kind == "bf16" else torch.float32}
    assert {tensor.dtype for key, tensor in states[0].items() if not key.startswith("method.")} == {torch.float32}


# --- the difference ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [["unet"], ["keys-values", "norms"], ["biases", r"text_encoder.*(fc1|norm)"]])
def test_a_difference_and_the_base_are_what_was_trained(parts: list[str], recipe: Callable[..., Recipe], base: Path
                                                        ) -> None:
    whole = train(recipe("whole", method={"parts": parts})).artifact
    delta = train(recipe("delta", method={"parts": parts}, output={"format": "delta"})).artifact
    assert whole is not None and delta is not None and delta.name == "delta.safetensors"
    before, after, adapter = tensors_of(base), tensors_of(whole), load_adapter(delta)
    sums = dict(before)
    for path, (term,) in adapter.deltas.items():
        for leaf, change in term.tensors().items():
            sums[f"{path}.{leaf}"] = before[f"{path}.{leaf}"] + change
    for path, tensor in after.items():
        torch.testing.assert_close(sums[path], tensor, rtol=0, atol=2e-7 * max(1.0, tensor.abs().max().item()))
    assert {f"{path}.{leaf}" for path, (term,) in adapter.deltas.items() for leaf, change in term.tensors().items()
            if change.count_nonzero()} == {path for path in before if not torch.equal(before[path], after[path])}

    trained, carried = load_base(whole), load_base(base)
    latents, time = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 900])
    with torch.no_grad(), apply(carried, adapter):
        theirs, ours = (each.predict(latents, time, each.condition(each.encode_text(["a cat", "a dog"])))
                        for each in (trained, carried))
        plain = load_base(base)
        apart = plain.predict(latents, time, plain.condition(plain.encode_text(["a cat", "a dog"])))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (apart - theirs).abs().max() > 1e-3


def test_a_difference_is_told_from_the_file_and_not_from_rounded_weights(recipe: Callable[..., Recipe], base: Path
                                                                         ) -> None:
    """In bf16 training begins with the file's own values: what has hardly moved differs hardly."""
    delta = train(recipe(method={"parts": ["conv_in"]}, train={"precision": "bf16", "learning_rate": 1e-9, "steps": 6},
                         output={"format": "delta"})).artifact
    assert delta is not None
    (term,) = load_adapter(delta).deltas["unet.conv_in"]
    assert all(0 < change.abs().max() < 1e-7 for change in term.tensors().values())


def test_differences_that_no_file_holds_are_refused_before_the_run(recipe: Callable[..., Recipe]) -> None:
    delta = {"format": "delta"}
    for parts, line in ((["vae-decoder"], "unet and text_encoder alone.*output.format=diffusers"),
                        (["text-encoder"], "token_embedding.*linear layers, convolutions and norms alone.*exclude")):
        objective = {"kind": "reconstruct"} if "vae" in parts[0] else {}
        made = recipe("-".join(parts), method={"parts": parts}, output=delta, objective=objective)
        with pytest.raises(UserError, match=line):
            train(made)
        assert not entries_or_none(made)
    with pytest.raises(UserError, match="random weights come from no file"):
        recipe(base={"init": "random"}, output=delta)
    with pytest.raises(UserError, match='output.format = "delta" is of what full leaves; lora'):
        make_recipe({**recipe().plain(), "method": [{"kind": "lora"}], "output": delta})


def entries_or_none(recipe: Recipe) -> list[dict[str, Any]]:
    return entries(recipe) if (Path(recipe.output.dir) / "log.jsonl").exists() else []


def test_a_base_that_changes_during_the_run_is_noticed_at_the_save(
        recipe: Callable[..., Recipe], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(base.read_bytes())
    save = artifacts.Artifacts.save

    def late(self: artifacts.Artifacts, path: Path, step: int) -> None:
        write_checkpoint(copy.with_suffix(".new.safetensors"), seed=1).replace(copy)
        save(self, path, step)

    monkeypatch.setattr(artifacts.Artifacts, "save", late)
    made = recipe(base={"path": str(copy)}, method={"parts": ["conv_in"]}, output={"format": "delta"},
                  validation={"fraction": 0})
    with pytest.raises(UserError, match="is not what it was when this run began"):
        train(made)
    monkeypatch.undo()
    copy.write_bytes(base.read_bytes())
    assert train(made).resumed_from == 4  # nothing that was learned is lost


# --- parts -------------------------------------------------------------------------------------------------


def test_a_part_that_nothing_reaches_is_named(recipe: Callable[..., Recipe]) -> None:
    made = recipe(base={"clip_skip": 1}, train={"steps": 6},
                  method={"parts": ["keys-values", r"^text_encoder.*layers\.1\.mlp\.fc1\.bias"]})
    with pytest.raises(UserError, match=r"nothing reaches text_encoder\.text_model\.encoder\.layers\.1\.mlp\.fc1"):
        train(made)


def test_a_decoder_learns_alone(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """One that is damaged mends, on pictures that it was not shown; the encoder and the scale of latents stay."""
    hurt = load_base("mini")
    with torch.no_grad():
        hurt.parameter("vae.decoder.conv_norm_out.weight").mul_(0.5)
    save_folder(hurt, tmp_path / "hurt", dtype=torch.float32)
    artifact = train(recipe(base={"path": str(tmp_path / "hurt")}, method={"parts": ["vae-decoder"]},
                            objective={"kind": "reconstruct"}, train={"steps": 15, "learning_rate": 3e-3})).artifact
    assert artifact is not None
    before, after = tensors_of(tmp_path / "hurt"), tensors_of(artifact)
    changed = {path for path in before if not torch.equal(before[path], after[path])}
    assert changed == {path for path in before if path.startswith(("vae.decoder.", "vae.post_quant_conv."))}
    mended, pixels = load_base(artifact), held_out()
    assert mended.latent_scale == hurt.latent_scale
    with torch.no_grad():
        l1 = [(each.decode_latents(each.latents(each.encode_images(pixels), torch.zeros(8, 4, 8, 8))) - pixels)
              .abs().mean().item() for each in (hurt, mended)]
    assert l1[1] < 0.85 * l1[0]


def held_out() -> Tensor:
    """Pictures of the drawn world that the run has not seen, (8, 3, 64, 64) in [-1, 1]."""
    pictures = [np.asarray(world.draw(world.scene(10_000 + i), 64, i)) for i in range(8)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
