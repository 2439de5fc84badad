from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from impasto.cli import app
from impasto.cli.inspect import block_of
from impasto.deltas.adapter import Adapter
from impasto.deltas.hypernetwork import Hypernetwork
from impasto.deltas.lowrank import LowRank
from impasto.formats.adapters import save_adapter
from tests.checkpoints import write_checkpoint
from tests.cli.running import impasto, one_line

BLOCK = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
TEXT = "text_encoder.text_model.encoder.layers.3.mlp.fc1"


def look(capsys, *arguments: object) -> dict:
    """What `impasto inspect --json` prints, run in this process."""
    with pytest.raises(SystemExit) as ended:
        app.main(["inspect", *map(str, arguments), "--json"])
    assert not ended.value.code
    return json.loads(capsys.readouterr().out)


def text(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        app.main(["inspect", *map(str, arguments)])
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter's file, and dW of its layers in float64 from the definition."""
    draw = torch.Generator().manual_seed(0)
    deltas, dense = {}, {}
    for layer, shape, rank in ((f"{BLOCK}.attn1.to_q", (16, 8), 4), (f"{BLOCK}.attn2.to_k", (16, 32), 2),
                               ("unet.down_blocks.1.resnets.0.conv1", (8, 4, 3, 3), 4), (TEXT, (64, 32), 4)):
        up = torch.randn(shape[0], rank, generator=draw).half().float()
        down = torch.randn(rank, *shape[1:], generator=draw).half().float()
        deltas[layer] = (LowRank.from_factors(up, down, alpha=1.0),)
        dense[layer] = (up.double() @ down.flatten(1).double()) / rank
    path = tmp_path / "dog.safetensors"
    save_adapter(Adapter(deltas, family="sd1"), path, metadata={"ss_output_name": "dog", "hostile": "\x1b[2J\nboo"})
    return path, dense


def test_a_hypernetwork(tmp_path: Path, capsys) -> None:
    path = tmp_path / "net.pt"
    hook = Hypernetwork([320, 768], [1, 1.5, 1], activation="gelu", dropout=(0, 0.3, 0))
    save_adapter(Adapter({}, {"note": "\x1b[2Jmine"}, hooks=(hook,)), path, format="hypernetwork")
    found = look(capsys, path)
    assert (found["kind"], found["family"], found["widths"]) == ("hypernetwork", "sd1", [320, 768])
    assert (found["structure"], found["activation"], found["dropout"]) == ([1, 1.5, 1], "gelu", [0, 0.3, 0])
    own = [parameter for name, parameter in hook.named_parameters() if ".320." in name]
    assert found["norms"]["320"] == pytest.approx(math.sqrt(sum(p.square().sum().item() for p in own)), rel=1e-3)
    assert found["dtypes"] == {"fp16": sum(p.numel() for p in hook.parameters())} and found["metadata"]["note"]
    shown = text(capsys, path)
    assert "hypernetwork for sd1" in shown and "1-1.5-1" in shown and "ComfyUI does not know" in shown
    assert "320, 768" in shown and "\x1b[2J" not in shown


def test_an_adapter(adapter, capsys) -> None:
    path, dense = adapter
    found = look(capsys, path)
    assert (found["kind"], found["family"], found["format"], found["layers"]) == ("adapter", "sd1", "kohya", 4)
    assert found["components"] == {"unet": 3, "text_encoder": 1}
    assert found["ranks"] == {"4": 3, "2": 1}
    assert found["alphas"] == {"1": 4}
    assert found["parameters"] == (16 + 8) * 4 + (16 + 32) * 2 + (8 + 36) * 4 + (64 + 32) * 4 + 4
    assert found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found["metadata"]["ss_output_name"] == "dog"
    unet = math.sqrt(sum(float(w.square().sum()) for layer, w in dense.items() if layer != TEXT))
    assert found["norms"] == pytest.approx({"unet down 1": unet, "text_encoder 3": float(dense[TEXT].norm())}, rel=1e-6)
    assert {p["program"]: p["loaded"] for p in found["programs"]}["ComfyUI"] == 4


def test_an_adapter_in_words(adapter, capsys) -> None:
    shown = text(capsys, adapter[0])
    assert "adapter for sd1: lora, in kohya format" in shown
    assert "unet down 1" in shown and "█" in shown
    assert "4 in 3, 2 in 1" in shown
    assert "\x1b" not in shown and "?[2J boo" in shown  # a file cannot command the terminal


@pytest.mark.parametrize(("kept", "said"), [
    (0, "(not in the file: taken to be the rank)"), (3, "(not in the file for 1 layer: taken to be the rank)"),
    (2, "(not in the file for 2 layers: taken to be the rank)"), (4, "")])
def test_alphas_that_are_not_there(kept: int, said: str, adapter, tmp_path: Path, capsys) -> None:
    tensors = load_file(adapter[0])
    dropped = [key for key in sorted(tensors) if key.endswith(".alpha")][kept:]
    save_file({key: tensors[key] for key in tensors if key not in dropped}, tmp_path / "a.safetensors")
    assert look(capsys, tmp_path / "a.safetensors")["without_alpha"] == 4 - kept
    shown = text(capsys, tmp_path / "a.safetensors")
    assert said in shown and ("taken to be the rank" in shown) == (kept < 4)


def test_an_adapter_in_words_in_ascii(adapter) -> None:
    shown = impasto("inspect", adapter[0], PYTHONIOENCODING="ascii", COLUMNS="50")
    assert shown.returncode == 0 and "###" in shown.stdout
    bars = [line for line in shown.stdout.splitlines() if "##" in line]
    assert bars and max(map(len, bars)) <= 50


def test_a_peft_folder(adapter, tmp_path: Path, capsys) -> None:
    from impasto.formats.adapters import load_adapter

    unet = {layer: terms for layer, terms in load_adapter(adapter[0]).deltas.items() if layer != TEXT}
    folder = tmp_path / "peft"
    save_adapter(Adapter(unet, family="sd1"), folder, format="peft")
    found = look(capsys, folder)
    assert (found["kind"], found["format"], found["layers"]) == ("adapter", "peft", 3)
    assert "adapter for sd1" in text(capsys, folder)


def test_other_kinds_of_change(tmp_path: Path, capsys) -> None:
    """Kinds, ranks and alphas, those of a DoRA's inner change too, and the size of what each holds."""
    from tests.formats.kind_cases import adapter_of_kind

    adapter = adapter_of_kind("mixed")
    save_adapter(adapter, tmp_path / "mixed.safetensors", dtype=torch.float32)
    found = look(capsys, tmp_path / "mixed.safetensors")
    assert (found["kind"], found["family"], found["layers"]) == ("adapter", "sd1", len(adapter.layers))
    assert set(found["deltas"]) == {"lora", "loha", "lokr", "dense", "lora + dora", "loha + dora", "lokr + dora"}
    assert set(found["ranks"]) == {"1", "2", "3"} and set(found["alphas"]) == {"2", "3"}
    assert all(norm > 0 for norm in found["norms"].values())
    plain = adapter_of_kind("loha", text=False)
    save_adapter(plain, tmp_path / "loha.safetensors", dtype=torch.float32)
    squares = sum(float(plain.dense(layer).norm()) ** 2 for layer in plain.layers)
    norms = look(capsys, tmp_path / "loha.safetensors")["norms"].values()
    assert math.isclose(sum(norm**2 for norm in norms), squares, rel_tol=1e-4)
    assert "lokr + dora" in text(capsys, tmp_path / "mixed.safetensors")


@pytest.mark.parametrize(("layer", "block"), [
    ("unet.down_blocks.2.resnets.0.conv1", "unet down 2"), ("unet.mid_block.attentions.0.proj_in", "unet mid"),
    ("unet.up_blocks.10.attentions.1.proj_in", "unet up 10"), ("unet.conv_in", "unet other"),
    ("text_encoder_2.text_model.encoder.layers.11.mlp.fc1", "text_encoder_2 11"),
])
def test_blocks(layer, block) -> None:
    assert block_of(layer) == block


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_a_checkpoint(tmp_path: Path, capsys, layout) -> None:
    path = write_checkpoint(tmp_path / "base.safetensors" if layout == "ldm" else tmp_path / "base", layout=layout)
    found = look(capsys, path)
    assert (found["kind"], found["family"], found["layout"]) == ("checkpoint", "sd1", layout)
    assert set(found["components"]) == {"unet", "text_encoder", "vae"}
    assert found["components"]["text_encoder"]["parameters"] > 49408 * 32
    assert list(found["components"]["unet"]["dtypes"]) == ["fp32"]
    assert "sha256" not in found
    shown = text(capsys, path)
    assert "checkpoint of sd1" in shown and "unet" in shown


def test_a_checkpoint_is_hashed_on_request(tmp_path: Path, capsys) -> None:
    path = write_checkpoint(tmp_path / "base.safetensors")
    assert look(capsys, path, "--hashes")["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_picture_of_another_program(tmp_path: Path, capsys) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat\nSteps: 20, Seed: 1")
    Image.new("RGB", (8, 16)).save(tmp_path / "cat.png", pnginfo=info)
    found = look(capsys, tmp_path / "cat.png")
    assert found["kind"] == "picture" and found["size"] == [8, 16]
    assert found["texts"] == {"parameters": "a cat\nSteps: 20, Seed: 1"}
    assert "command" not in found
    assert "a cat" in text(capsys, tmp_path / "cat.png")


def test_a_tampered_picture_is_no_defect(tmp_path: Path, capsys) -> None:
    for i, told in enumerate(("{", "[]", "{}", '{"settings": 3, "base": 1}', '{"settings": {}}')):
        info = PngImagePlugin.PngInfo()
        info.add_text("impasto", told)
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png", pnginfo=info)
        assert "command" not in look(capsys, tmp_path / f"{i}.png")


def test_a_jpeg_has_no_texts(tmp_path: Path, capsys) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    assert look(capsys, tmp_path / "a.jpg")["texts"] == {}


# --- what is not what it seems -----------------------------------------------------------------------------


def test_a_missing_file(tmp_path: Path) -> None:
    assert "no such file" in one_line(impasto("inspect", tmp_path / "none.safetensors"))


@pytest.mark.parametrize("content", [
    b"", b"just some text, and long enough for a header", b"<!DOCTYPE html><html>", b"\x80\x02}q\x00.",
    b"version https://git-lfs.github.com/spec/v1\n", struct.pack("<Q", 10**15) + b"{}",
    b"\x89PNG\r\n\x1a\n broken",
], ids=["empty", "text", "html", "pickle", "lfs", "long header", "broken png"])
def test_what_is_no_model_is_one_line(tmp_path: Path, capsys, content) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        app.main(["inspect", str(path)])
    shown = capsys.readouterr()
    assert ended.value.code == 1
    assert shown.err.startswith(f"error: {path}: ") and shown.err.count("\n") == 1


def test_an_error_as_json(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_text("text")
    shown = impasto("inspect", path, "--json")
    assert shown.returncode == 1
    told = json.loads(shown.stdout)["error"]
    assert told["where"] == str(path) and told["what"]


def test_an_empty_folder(tmp_path: Path) -> None:
    assert str(tmp_path) in one_line(impasto("inspect", tmp_path))


def test_what_impasto_does_not_read_is_still_described(tmp_path: Path, capsys) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "face.safetensors"
    save_file({"control_model.time_embed.0.weight": torch.zeros(4, 768)}, path, metadata={"name": "face"})
    found = look(capsys, path)
    assert (found["kind"], found["tensors"], found["parameters"]) == ("controlnet", 1, 4 * 768)
    assert found["metadata"] == {"name": "face"} and found["unread"]
    assert "controlnet" in text(capsys, path)


def test_a_folder_that_lacks_a_network_says_which(tmp_path: Path, capsys) -> None:
    folder = write_checkpoint(tmp_path / "xl", "sdxl", layout="diffusers")
    shutil.rmtree(folder / "text_encoder_2")
    assert f"{Path('text_encoder_2', 'config.json')}: no such file" in look(capsys, folder)["unread"]


@pytest.mark.parametrize("pickled", [False, True])
def test_embeddings_tell_their_tokens(tmp_path: Path, capsys, pickled: bool) -> None:
    from safetensors.torch import save_file

    values = torch.zeros(2, 768)
    values[0, :2], values[1, 5] = torch.tensor([3.0, 4.0]), 0.25
    path = tmp_path / ("face.pt" if pickled else "face.safetensors")
    if pickled:
        torch.save({"string_to_param": {"*": values}, "name": "other"}, path)
    else:
        save_file({"emb_params": values}, path, metadata={"name": "face"})
    found = look(capsys, path)
    assert (found["kind"], found["family"], found["format"]) == ("embedding", "sd1", "webui-embedding")
    assert found["tokens"] == {"face": {"text_encoder": {"vectors": 2, "width": 768, "norms": [5.0, 0.25]}}}
    told = text(capsys, path)
    assert "embedding for sd1" in told and "5 0.25" in told and ("names" in told) == pickled


def test_a_file_of_strange_tensors_is_no_error(tmp_path: Path, capsys) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file({"weights": torch.zeros(4, dtype=torch.int64)}, path)
    found = look(capsys, path)
    assert (found["kind"], found["dtypes"], found["first"]) == ("unknown", {"int64": 4}, ["weights"])
    assert "nothing that is known here" in text(capsys, path)


def test_an_old_checkpoint_is_read_and_its_names_are_told(tmp_path: Path, capsys) -> None:
    from safetensors.torch import load_file

    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": load_file(write_checkpoint(tmp_path / "new.safetensors"))}, path)
    found = look(capsys, path)
    assert (found["kind"], found["family"]) == ("checkpoint", "sd1")
    assert "torch._utils._rebuild_tensor_v2" in found["imports"]
