"""Merged checkpoints against the attached adapter, and against sums in fp64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.weighted import Weighted
from impasto.deltas.adapter import Adapter
from impasto.families.apply import apply
from impasto.families.base import Base
from impasto.families.load import load_base
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.formats.checkpoint import open_checkpoint
from impasto.toolbox.blocks import LEVELS, Blocks, level
from impasto.toolbox.convert import convert
from impasto.toolbox.merge import add_difference, merge_adapters, merge_checkpoints
from tests.formats.adapter_cases import random_adapter
from tests.formats.checkpoint_cases import tensors_of
from tests.formats.kind_cases import MAKERS, adapter_of_kind
from tests.toolbox.conftest import LAYOUTS


def saved(adapter: Adapter, path: Path) -> Path:
    save_adapter(adapter, path, dtype=torch.float32)
    return path


@torch.no_grad()
def outputs(base: Base) -> dict[str, Tensor]:
    """What each network makes of fixed inputs."""
    draw = torch.Generator().manual_seed(0)
    states = base.encode_text(["a photo of a cat"])
    latents = torch.randn(1, 4, 8, 8, generator=draw)
    unet = base.components["unet"]
    made = unet(latents, torch.tensor([500]), torch.randn(1, 77, 32, generator=draw)).sample
    return {"unet": made, "text": next(iter(states.values()))}


@pytest.mark.parametrize("kind", [*MAKERS, "mixed"])
def test_a_merged_base_computes_as_one_with_the_adapter_on_it(kind: str, written: Callable[..., Path], tmp_path: Path
                                                              ) -> None:
    file = saved(adapter_of_kind(kind, norms=not kind.startswith("dora")), tmp_path / "a.safetensors")
    strengths = (1.0,) if "dora" in kind or kind == "mixed" else (0.7, -0.5)
    for strength in strengths:
        out = tmp_path / f"{strength}.safetensors"
        merge_adapters(written(), [Weighted(str(file), strength)], out)
        base = load_base(written())
        with apply(base, load_adapter(file), strength):
            expected = outputs(base)
        plain = outputs(base)
        for name, made in outputs(load_base(out)).items():
            torch.testing.assert_close(made, expected[name], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(plain["unet"], expected["unet"], atol=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_each_layout_all_else_stays_to_the_bit(layout: str, written: Callable[..., Path], tmp_path: Path) -> None:
    base, adapter = written(layout, dtype=torch.float16), random_adapter()
    file = saved(adapter, tmp_path / "a.safetensors")
    out = tmp_path / ("out" if layout == "diffusers" else "out.safetensors")
    told = merge_adapters(base, [Weighted(str(file), 0.5)], out)
    before, after = (tensors_of(open_checkpoint(path)) for path in (base, out))
    assert before.keys() == after.keys() and told.changed == len(adapter.layers)
    for name, tensor in before.items():
        layer = name.rpartition(".")[0]
        if layer in adapter.layers and name.endswith(".weight"):
            wanted = tensor.double() + 0.5 * adapter.dense(layer).double().reshape(tensor.shape)
            torch.testing.assert_close(after[name].double(), wanted, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(after[name], wanted.half(), rtol=2e-3, atol=1e-6)
        else:
            assert torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype, name
    if layout == "diffusers":
        others = [path.relative_to(base) for path in base.rglob("*.json")]
        assert others and all((out / path).read_bytes() == (base / path).read_bytes() for path in others)
    if layout == "ldm":
        with safe_open(out, "pt") as opened:
            made = json.loads(opened.metadata()["impasto.made"])["merged"]
        assert made == {"base": base.name, "adapters": [["a.safetensors", 0.5]]}
        assert load_file(base).keys() == load_file(out).keys()


def test_several_at_once_are_rounded_once(written: Callable[..., Path], tmp_path: Path) -> None:
    base = written(dtype=torch.float16)
    one, other = random_adapter(seed=1), random_adapter(seed=2)
    files = [saved(adapter, tmp_path / f"{i}.safetensors") for i, adapter in enumerate((one, other))]
    merge_adapters(base, [Weighted(str(files[0]), 0.3), Weighted(str(files[1]), -0.8)], tmp_path / "out.safetensors")
    before, after = (tensors_of(open_checkpoint(path)) for path in (base, tmp_path / "out.safetensors"))
    for layer in one.layers:
        W = before[f"{layer}.weight"]
        exact = W.double() + (0.3 * one.dense(layer).double() - 0.8 * other.dense(layer).double()).reshape(W.shape)
        gap = (after[f"{layer}.weight"].double() - exact).abs()
        assert bool((gap <= exact.abs() * 2**-11 * 1.01 + 2**-25).all()), layer


def test_a_wider_type_and_keys_of_nobody(written: Callable[..., Path], tmp_path: Path) -> None:
    tensors = load_file(written(dtype=torch.float16)) | {"somebody.else": torch.arange(4)}
    with safe_open(written(dtype=torch.float16), "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, tmp_path / "base.safetensors", metadata | {"sshs_model_hash": "old"})
    file = saved(random_adapter(), tmp_path / "a.safetensors")
    merge_adapters(tmp_path / "base.safetensors", [Weighted(str(file))], tmp_path / "out.safetensors",
                   dtype=torch.float32)
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["somebody.else"], torch.arange(4))
    assert {tensor.dtype for key, tensor in found.items() if key != "somebody.else"} == {torch.float32}
    with safe_open(tmp_path / "out.safetensors", "pt") as opened:
        assert "sshs_model_hash" not in opened.metadata()


def test_blocks_have_strengths_of_their_own(written: Callable[..., Path], tmp_path: Path) -> None:
    adapter = random_adapter()
    file = saved(adapter, tmp_path / "a.safetensors")
    blocks = Blocks.parse("BASE=0, M00=0.5, unet.conv_in=0, IN01=2, OUT02=0")
    merge_adapters(written(), [Weighted(str(file))], tmp_path / "out.safetensors", blocks=blocks)
    before, after = (tensors_of(open_checkpoint(path)) for path in (written(), tmp_path / "out.safetensors"))
    for layer in adapter.layers:
        factor = {"text_encoder": 0.0, "unet.time_embedding": 0.0, "unet.mid_block": 0.5, "unet.conv_in": 0.0}
        own = next((value for start, value in factor.items() if layer.startswith(start)), None)
        if own is None:
            own = {"IN01": 2.0, "OUT02": 0.0}.get(level(layer), 1.0)
        W = before[f"{layer}.weight"]
        wanted = W + own * adapter.dense(layer).reshape(W.shape)
        torch.testing.assert_close(after[f"{layer}.weight"], wanted, rtol=1e-5, atol=1e-5)


def test_levels_are_those_of_the_original_names() -> None:
    """`input_blocks.N` is INN, `output_blocks.N` OUTN: of the real SD 1 network, layer by layer."""
    from impasto.formats.configs import CONFIGS

    part = CONFIGS.get("sd1").parts["unet"]
    for entry in part.entries(part.config):
        words = entry.ldm.split(".")
        expected = {"input_blocks": f"IN{words[1]:0>2}", "output_blocks": f"OUT{words[1]:0>2}", "middle_block": "M00",
                    "out": "OUT11"}.get(words[0], "BASE")
        assert level(f"unet.{entry.name}") == expected, entry
    assert Blocks.parse(",".join(str(i) for i in range(26))).of("unet.mid_block.resnets.0.conv1") == 13
    assert level("text_encoder.text_model.encoder.layers.0.mlp.fc1") == "BASE" and len(LEVELS) == 26


@pytest.mark.parametrize("text, line", [("IN99=1", "no block 'IN99'"), ("1,2,3", "3 of 26 numbers"),
                                        ("M00=x", "not NAME=NUMBER"), ("M00", "not NAME=NUMBER")])
def test_blocks_that_are_none(text: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        Blocks.parse(text)


# --- checkpoints with checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize("first, second", [("ldm", "ldm"), ("diffusers", "ldm"), ("ldm", "diffusers")])
def test_a_weighted_sum_is_that_of_the_weights(first: str, second: str, written: Callable[..., Path], tmp_path: Path
                                               ) -> None:
    paths = [written(first), written(second, seed=1, dtype=torch.float16)]
    out = tmp_path / ("out" if first == "diffusers" else "out.safetensors")
    merge_checkpoints(paths, [0.7, 0.3], out)
    a, b, c = (tensors_of(open_checkpoint(path)) for path in (*paths, out))
    for name, tensor in c.items():
        wanted = 0.7 * a[name].double() + 0.3 * b[name].double()
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-7)
        assert tensor.dtype == a[name].dtype


def test_a_difference_is_added_and_blocks_count(written: Callable[..., Path], tmp_path: Path) -> None:
    paths = [written(), written(seed=1), written(seed=2)]
    add_difference(*paths, 0.5, tmp_path / "out.safetensors", blocks=Blocks.parse("M00=0,text_encoder=2"))
    a, b, c, found = (tensors_of(open_checkpoint(path)) for path in (*paths, tmp_path / "out.safetensors"))
    for name, tensor in found.items():
        own = 0.0 if level(name) == "M00" else 1.0 if name.startswith("text_encoder") else 0.5
        wanted = a[name].double() + own * (b[name].double() - c[name].double())
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-6)
    merge_checkpoints(paths[:2], [0, 1], tmp_path / "blocks.safetensors", blocks=Blocks.parse("M00=0.25"))
    found = tensors_of(open_checkpoint(tmp_path / "blocks.safetensors"))
    name = "unet.mid_block.resnets.0.conv1.weight"
    torch.testing.assert_close(found[name], 0.75 * a[name] + 0.25 * b[name], rtol=1e-5, atol=1e-6)


# --- what cannot be ------------------------------------------------------------------------------------------


def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(written: Callable[..., Path], tmp_path: Path) -> None:
    base, file = written(), saved(random_adapter(), tmp_path / "a.safetensors")
    other = random_adapter(family="sdxl", text=False)
    strange = saved(other, tmp_path / "xl.safetensors")
    wide = Adapter({"unet.conv_out": (random_adapter().deltas["unet.conv_in"][0],)}, family="sd1")
    out = tmp_path / "made" / "out.safetensors"
    cases = [
        (dict(adapters=[strange]), "is an adapter for sdxl"),
        (dict(adapters=[saved(wide, tmp_path / "w.safetensors")]), r"changes unet.conv_out by .*made for another base"),
        (dict(adapters=[saved(Adapter({"unet.up_blocks.7.resnets.0.conv1": wide.deltas["unet.conv_out"]}, family="sd1"),
                              tmp_path / "l.safetensors")]), "does not have"),
        (dict(adapters=[tmp_path / "none.safetensors"]), "no such file"),
        (dict(adapters=[file], out=base), "is one of the inputs"),
        (dict(adapters=[file], out=tmp_path / "made" / "out.ckpt"), "call it out.safetensors"),
        (dict(adapters=[base]), "is a checkpoint, not an adapter; say --weights"),
    ]
    for told, line in cases:
        with pytest.raises(UserError, match=line) as raised:
            merge_adapters(base, [Weighted(str(path)) for path in told["adapters"]], told.get("out", out), force=True)
        assert "\n" not in str(raised.value)
        assert not out.parent.exists()
    (tmp_path / "there.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="is there already"):
        merge_adapters(base, [Weighted(str(file))], tmp_path / "there.safetensors")
    with pytest.raises(UserError, match="too large for F16.*--dtype"):
        merge_adapters(written(dtype=torch.float16), [Weighted(str(file), 1e7)], out)
    assert not list(out.parent.glob("*"))
    inpainting = written(variant="inpainting")
    with pytest.raises(UserError, match="conv_in.weight is .*inpainting"):
        merge_checkpoints([base, inpainting], [0.5, 0.5], out)
    convert(base, tmp_path / "v.safetensors", to="ldm", prediction="v_prediction")
    with pytest.raises(UserError, match="v.safetensors: predicts v_prediction, and .* epsilon: a sum of them"):
        merge_checkpoints([base, tmp_path / "v.safetensors"], [0.5, 0.5], out)
    with pytest.raises(UserError, match="2 checkpoints and 3 weights"):
        merge_checkpoints([base, inpainting], [0.5, 0.5, 1], out)


def test_a_folder_in_shards_is_read_and_another_takes_its_place(written: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(written("diffusers"), folder)
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(weights)
    homes = {name: f"diffusion_pytorch_model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in {*homes.values()}:
        save_file({name: weights[name] for name in names if homes[name] == shard}, folder / "unet" / shard)
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    file = saved(random_adapter(), tmp_path / "a.safetensors")
    for path in (folder, written("diffusers")):
        merge_adapters(path, [Weighted(str(file))], tmp_path / "out", force=True)
        found = tensors_of(open_checkpoint(tmp_path / "out"))
        assert sorted(p.name for p in (tmp_path / "out" / "unet").iterdir()) == [
            "config.json", "diffusion_pytorch_model.safetensors"]
        (tmp_path / "first").exists() or (tmp_path / "out").rename(tmp_path / "first")
    before = tensors_of(open_checkpoint(tmp_path / "first"))
    assert all(torch.equal(found[name], before[name]) for name in before)
    merge_checkpoints([written("diffusers"), folder], [0.5, 0.5], tmp_path / "same")
    same, plain = (tensors_of(open_checkpoint(path)) for path in (tmp_path / "same", written("diffusers")))
    assert all(torch.allclose(same[name], plain[name]) for name in plain)
