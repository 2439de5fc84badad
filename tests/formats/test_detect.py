"""What a file is, from its header alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

from impasto.core.errors import UserError
from impasto.formats.configs import CONFIGS
from impasto.formats.detect import Detected, detect
from tests.checkpoints import component_configs, write_checkpoint

UNET = "model.diffusion_model.input_blocks.0.0.weight"
CONTEXT = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def file(path: Path, *names: str, metadata: dict[str, str] | None = None, **shapes: tuple[int, ...]) -> Path:
    tensors = {name: torch.zeros(1) for name in names} | {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(("variant", "title"), [
    ("", "an SD 1.x checkpoint"), ("inpainting", "an SD 1.x inpainting checkpoint"),
    ("instruct-pix2pix", "an SD 1.x instruct-pix2pix checkpoint")])
@pytest.mark.parametrize(("name", "layout"), [("a.safetensors", "ldm"), ("a.ckpt", "ldm"), ("a", "diffusers")])
def test_sd1(tmp_path: Path, name, layout, variant, title) -> None:
    found = detect(write_checkpoint(tmp_path / name, layout=layout, variant=variant))
    assert found == Detected("checkpoint", "sd1", layout, variant)
    assert found.title == title


@pytest.mark.parametrize(("names", "shapes", "family", "kind"), [
    # the keys by which diffusers' own loader tells them (`CHECKPOINT_KEY_NAMES`), and some beside
    (["conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
      "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"], {UNET: (320, 4, 3, 3)}, "sdxl",
     "checkpoint"),
    (["conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"], {UNET: (384, 4, 3, 3)},
     "sdxl-refiner", "checkpoint"),
    (["cond_stage_model.model.token_embedding.weight"], {CONTEXT: (320, 1024), UNET: (320, 4, 3, 3)}, "sd2",
     "checkpoint"),
    (["model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias"], {}, "sd3", "checkpoint"),
    (["joint_blocks.0.context_block.adaLN_modulation.1.bias"], {}, "sd3", "checkpoint"),
    (["double_blocks.0.img_attn.norm.key_norm.scale"], {}, "flux", "checkpoint"),
    (["double_blocks.0.img_attn.norm.key_norm.scale", "single_stream_modulation.lin.weight"], {}, "flux2",
     "checkpoint"),
    (["double_blocks.0.img_attn.norm.key_norm.scale", "distilled_guidance_layer.in_proj.bias"], {}, "chroma",
     "checkpoint"),
    ([], {UNET: (320, 4, 3, 3), CONTEXT: (320, 768)}, "sd1", "unet"),
    ([], {UNET: (320, 4, 3, 3), CONTEXT: (320, 2048)}, "sdxl", "unet"),
    ([], {UNET: (320, 4, 3, 3), CONTEXT: (320, 33)}, "", "unet"),
])
def test_families_by_structure(tmp_path: Path, names, shapes, family, kind) -> None:
    found = detect(file(tmp_path / "a.safetensors", *names, **shapes))
    assert (found.kind, found.family) == (kind, family)


def test_metadata_tell_where_structure_does_not(tmp_path: Path) -> None:
    shapes = {UNET: (8, 4, 3, 3), CONTEXT: (8, 768)}
    for metadata, family in (({"impasto.family": "sdxl"}, "sdxl"), ({"format": "pt"}, "sd1"),
                             ({"modelspec.architecture": "stable-diffusion-v1"}, "sd1"),
                             ({"ss_base_model_version": "sd_v2_768_v"}, "sd2")):
        assert detect(file(tmp_path / "a.safetensors", metadata=metadata, **shapes)).family == family


@pytest.mark.parametrize(("names", "kind", "layout"), [
    (["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"], "adapter", "kohya"),
    (["lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"], "adapter", "kohya"),
    (["lora_unet_mid_block_attentions_0_proj_in.lokr_w1"], "adapter", "kohya"),
    (["unet.mid_block.attentions.0.proj_in.lora_A.weight"], "adapter", "peft"),
    (["unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight"], "adapter", "peft"),
    (["emb_params"], "embedding", ""), (["clip_l", "clip_g"], "embedding", ""), (["<cat>"], "embedding", "diffusers"),
    (["control_model.time_embed.0.weight"], "controlnet", ""),
    (["controlnet_cond_embedding.conv_in.weight"], "controlnet", ""),
    (["first_stage_model.encoder.conv_in.weight"], "vae", "ldm"),
    (["encoder.down.0.block.0.conv1.weight"], "vae", "ldm"),
    (["encoder.down_blocks.0.resnets.0.conv1.weight"], "vae", "diffusers"),
    (["text_model.final_layer_norm.weight"], "text encoder", ""), (["something.else"], "unknown", ""),
])
def test_kinds(tmp_path: Path, names, kind, layout) -> None:
    found = detect(file(tmp_path / "a.safetensors", *names))
    assert (found.kind, found.layout) == (kind, layout)


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("bundle_emb.cat.clip_l", "bundle_emb.cat.clip_g")])
def test_an_embedding_for_two_text_encoders_is_of_the_family_that_it_says(tmp_path: Path, names) -> None:
    for family in ("sd3", "sdxl"):
        assert detect(file(tmp_path / "a.safetensors", *names, metadata={"impasto.family": family})).family == family
    assert detect(file(tmp_path / "a.safetensors", *names)).family == "sdxl"


@pytest.mark.parametrize(("name", "shape", "metadata", "kind"), [
    ("cat", (2, 768), {}, "embedding"), ("cat", (1, 2048), {}, "embedding"), ("<cat>", (768,), {}, "embedding"),
    ("cat", (768,), {"impasto.token": "cat"}, "embedding"), ("bias", (768,), {}, "unknown"),
    ("mean", (1024,), {}, "unknown"), ("cat", (2, 2, 768), {}, "unknown"), ("cat", (2, 33), {}, "unknown"),
])
def test_a_vector_by_itself_is_an_embedding_if_it_says_so(tmp_path: Path, name, shape, metadata, kind) -> None:
    assert detect(file(tmp_path / "a.safetensors", metadata=metadata, **{name: shape})).kind == kind


def test_no_tensor_of_a_network_looks_like_an_adapter() -> None:
    for part in CONFIGS.get("sd1").parts.values():
        from impasto.formats.detect import detect_names

        shapes = {entry.name: entry.shape for entry in part.entries(part.config)}
        assert detect_names(shapes, {}).kind in ("unet", "vae", "text encoder")


def test_the_family_of_an_adapter(tmp_path: Path) -> None:
    down = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
    up = down.replace("down.weight", "up.weight")
    assert detect(file(tmp_path / "a.safetensors", **{up: (320, 4), down: (4, 2048)})).family == "sdxl"
    assert detect(file(tmp_path / "a.safetensors", **{up: (320, 4), down: (4, 2048)},
                       metadata={"ss_base_model_version": "sd_v1"})).family == "sd1"


def test_a_unet_in_diffusers_names(tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_config(component_configs()["unet"])
    assert isinstance(unet, UNet2DConditionModel)
    unet.save_pretrained(tmp_path)
    assert detect(tmp_path) == Detected("unet", layout="diffusers")
    assert detect(tmp_path / "diffusion_pytorch_model.safetensors") == Detected("unet", layout="diffusers")


@pytest.mark.parametrize(("pipeline", "unet", "text", "family"), [
    ("StableDiffusionXLPipeline", {}, {}, "sdxl"), ("StableDiffusion3Pipeline", {}, {}, "sd3"),
    ("FluxPipeline", {}, {}, "flux"), ("Flux2Pipeline", {}, {}, "flux2"), ("PixArtSigmaPipeline", {}, {}, "pixart"),
    ("StableDiffusionPipeline", {"in_channels": 4}, {"hidden_act": "quick_gelu"}, "sd1"),
    ("StableDiffusionPipeline", {"use_linear_projection": True}, {"hidden_act": "gelu"}, "sd2"),
    ("LatentConsistencyModelPipeline", {}, {}, "sd1"), ("SomethingElse", {}, {}, ""),
])
def test_folders(tmp_path: Path, pipeline, unet, text, family) -> None:
    for name, config in (("unet", unet), ("text_encoder", text)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    assert detect(tmp_path) == Detected("checkpoint", family, "diffusers")


def test_a_refiner_has_the_second_text_encoder_alone(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert detect(tmp_path).family == "sdxl-refiner"


def test_other_folders(tmp_path: Path) -> None:
    assert detect(tmp_path).kind == "unknown"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert detect(tmp_path) == Detected("adapter", layout="peft")
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        detect(tmp_path)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_pictures(tmp_path: Path, ending) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / f"a.{ending}")
    assert detect(tmp_path / f"a.{ending}").kind == "picture"


@pytest.mark.parametrize(("content", "kind"), [
    ({"string_to_param": {"*": torch.zeros(2, 768)}, "name": "cat"}, "embedding"),
    ({"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.zeros(2, 768))})}, "embedding"),
    ({768: ({"linear.0.weight": torch.zeros(2)}, {}), "layer_structure": [1, 2, 1]}, "hypernetwork"),
    ({"<cat>": torch.zeros(768)}, "embedding"),
    ({"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.zeros(2, 2)}, "adapter"),
])
def test_old_files(tmp_path: Path, content: dict[Any, Any], kind) -> None:
    torch.save(content, tmp_path / "a.pt")
    assert detect(tmp_path / "a.pt").kind == kind


def test_names_do_not_decide(tmp_path: Path) -> None:
    """A safetensors file under any other name is read as what it is; a pickle called .safetensors is refused."""
    assert detect(file(tmp_path / "a.ckpt", "emb_params")).kind == "embedding"
    # the length of the header may begin with a pickle's first byte
    for n in range(200):
        path = file(tmp_path / "b.ckpt", "emb_params", metadata={"x": "y" * n})
        if path.read_bytes()[0] == 0x80:
            break
    else:
        raise AssertionError("none of these headers has such a length")
    assert detect(path).kind == "embedding"
    torch.save({"a": torch.zeros(1)}, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="pickle"):
        detect(tmp_path / "c.safetensors")


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        detect(tmp_path / "none.safetensors")
    for content in (b"", b"hello, this is a text", b"\0" * 100):
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="a.safetensors"):
            detect(tmp_path / "a.safetensors")


def test_titles() -> None:
    assert Detected("vae").title == "a vae" and Detected("adapter").title == "an adapter"
    assert Detected("embedding", "sdxl").title == "an SDXL embedding"
    assert Detected("checkpoint", "flux").title == "a Flux checkpoint"
    assert Detected("unknown").title == "nothing that is known here"


def test_torch_is_not_needed(tmp_path: Path) -> None:
    path = file(tmp_path / "a.safetensors", "emb_params")
    program = ("import sys; from impasto.formats.detect import detect; "
               f"print(detect({str(path)!r}).kind, 'torch' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["embedding", "False"]
