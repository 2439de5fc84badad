"""Our layouts against what the original implementations have, key by key."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from pathlib import Path

import pytest
import torch

from impasto.core.errors import UserError
from impasto.formats.checkpoint import open_checkpoint
from impasto.formats.configs import CONFIGS, FamilyConfig, Part
from impasto.formats.detect import Detected, detect, detect_names
from impasto.formats.entries import Config
from impasto.formats.header import header_bytes, read_header
from tests.formats.original_keys import FOLDER, LISTS, OTHERS, TWINS, UNWRITTEN, Shape, keys_of, text_of, unwritten

NAMES = [name for names in LISTS.values() for name in names]
#: of the families that are read
PAIRS = [(family, name) for family in CONFIGS for name in LISTS.get(family, ())]


def inner(part: Part, keys: dict[str, Shape]) -> dict[str, Shape]:
    """Those of a list's keys that are one part's, as `derive` takes them."""
    return {part.ldm_spelling(key.removeprefix(part.prefix)): shape
            for key, shape in keys.items() if key.startswith(part.prefix)}


def written(part: Part, config: Config) -> dict[str, Shape]:
    """What we write of a part, under the names that the lists have."""
    keys = {part.prefix + entry.ldm: entry.ldm_shape for entry in part.entries(config)}
    keys |= {part.prefix + extra.ldm: extra.shape for extra in part.extras(config)}
    return {TWINS.get(key, key): shape for key, shape in keys.items()}


@pytest.mark.parametrize("family", list(CONFIGS))
def test_every_family_that_is_read_has_a_list(family) -> None:
    assert family in LISTS, "make a list of its original keys and name it in original_keys.LISTS"


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_our_keys_and_shapes_are_the_original_ones(family, name) -> None:
    table: FamilyConfig = CONFIGS.get(family)
    theirs, ours = keys_of(name), {}
    for part in table.parts.values():
        published = name == LISTS[family][0]
        ours |= written(part, part.config if published else {**part.config, **part.derive(inner(part, theirs))})
    assert {key: shape for key, shape in ours.items() if theirs.get(key) != shape} == {}
    assert [key for key in theirs if key not in ours and not unwritten(key)] == []


@pytest.mark.parametrize("family", [family for family, name in PAIRS if name == LISTS[family][0]])
def test_the_published_configuration_is_told_by_the_original_shapes(family) -> None:
    table: FamilyConfig = CONFIGS.get(family)
    for name, part in table.parts.items():
        derived = part.derive(inner(part, keys_of(LISTS[family][0])))
        assert derived and {key: part.config.get(key) for key in derived} == derived, name


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in LISTS for name in LISTS[family]])
def test_the_family_is_told_by_the_original_keys(family, name) -> None:
    keys = keys_of(name)
    assert detect_names(keys, {}) == Detected("checkpoint", family, "ldm")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    for channels, variant in ((8, "instruct-pix2pix"), (9, "inpainting")) if first in keys else ():
        other = keys | {first: (keys[first][0], channels, 3, 3)}
        assert detect_names(other, {}) == Detected("checkpoint", family, "ldm", variant)


def test_every_row_of_the_table_is_of_use() -> None:
    everything = {key for name in NAMES for key in keys_of(name)} | {"model_ema.decay"}
    for pattern in UNWRITTEN:
        assert any(unwritten(key) for key in everything), pattern
    assert everything >= set(TWINS.values()) and not everything & set(TWINS)


def test_each_list_is_of_a_family_and_says_where_it_is_from() -> None:
    assert sorted(path.name for path in FOLDER.glob("*.gz")) == sorted(f"{name}.txt.gz" for name in NAMES)
    for name in (*NAMES, *OTHERS):
        assert re.match(r"# .+\n# from (github\.com/\S+ at [0-9a-f]{40}|diffusers [\d.]+|transformers [\d.]+): ",
                        text_of(name)) and len(keys_of(name)) >= 20, name


# --- files that are none of ours -------------------------------------------------------------------------

SAID = {
    "auraflow": "an AuraFlow checkpoint", "cascade-b": "a Stable Cascade checkpoint",
    "cascade-c": "a Stable Cascade checkpoint", "chroma": "a Chroma checkpoint", "controlnet": "a controlnet",
    "controlnet-diffusers": "a controlnet", "esrgan": "an image upscaler", "flux": "a Flux checkpoint",
    "flux-diffusers": "a Flux transformer", "hidream": "a HiDream checkpoint",
    "hunyuandit": "a HunyuanDiT checkpoint", "ip-adapter": "an IP-Adapter", "llama": "a language model",
    "lumina": "a Lumina checkpoint", "motion-module": "an AnimateDiff motion module",
    "pixart": "a PixArt checkpoint", "pixart-diffusers": "a PixArt transformer",
    "qwen-image": "a Qwen-Image checkpoint", "safety-checker": "a safety checker", "t2i-adapter": "a T2I-Adapter",
    "t2i-adapter-diffusers": "a T2I-Adapter", "unclip": "a Stable unCLIP checkpoint",
    "upscaler-x4": "a Stable Diffusion upscaler checkpoint", "video": "a Stable Video Diffusion checkpoint",
    "wan": "a Wan video checkpoint", "z-image": "a Z-Image checkpoint",
}


def sparse(path: Path, name: str) -> Path:
    """A file with the tensors of a list, all zero; it takes no room."""
    head, _ = header_bytes({key: ("F16", shape) for key, shape in keys_of(name).items()}, {})
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + 2 * sum(map(math.prod, keys_of(name).values())))
    return path


def test_each_has_its_answer() -> None:
    assert sorted(SAID) == OTHERS


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named_plainly(name) -> None:
    keys = keys_of(name)
    assert detect_names(keys, {}).title == SAID[name]
    if "checkpoint" in SAID[name] and not any(key.startswith("model.") for key in keys):  # as ComfyUI packs them
        packed = {f"model.diffusion_model.{key}": shape for key, shape in keys.items()}
        assert detect_names(packed, {}).title == SAID[name]


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_as_a_base_are_refused_in_one_line(tmp_path, name) -> None:
    with pytest.raises(UserError, match=f"is {SAID[name]}, (not a checkpoint|which is not supported)") as caught:
        open_checkpoint(sparse(tmp_path / "a.safetensors", name))
    assert "\n" not in str(caught.value)


def test_packed_files_are_named_in_one_line(tmp_path) -> None:
    """GGUF: the magic, version 3, number of tensors, number of settings (github.com/ggml-org/ggml, docs/gguf.md)."""
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1000, 20) + bytes(4096))
    for read in (open_checkpoint, detect, read_header):
        with pytest.raises(UserError, match=r"a\.gguf: is a GGUF file") as caught:
            read(tmp_path / "a.gguf")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "title"), [
    # as Real-ESRGAN's and IP-Adapter's authors publish theirs
    ({"params_ema": {"conv_first.weight": torch.zeros(1)}}, "an image upscaler"),
    ({"image_proj": {"proj.weight": torch.zeros(1)}, "ip_adapter": {"1.to_k_ip.weight": torch.zeros(1)}},
     "an IP-Adapter"),
])
def test_weights_in_inner_tables(tmp_path, content, title) -> None:
    torch.save(content, tmp_path / "a.pth")
    assert detect(tmp_path / "a.pth").title == title
    with pytest.raises(UserError, match=f"is {title}, not a checkpoint"):
        open_checkpoint(tmp_path / "a.pth")


# --- the lists against published files -------------------------------------------------------------------

TEXTS, T5 = "text_encoders.", "text_encoders.t5xxl."


def in_file(name: str, without: str = "-") -> dict[str, Shape]:
    """What a published file holds: the list, less what the program makes by itself, and what is there twice."""
    keys = keys_of(name)
    made = {key for key in keys if key.startswith(("denoiser.", "model.model_sampling."))
            or key.startswith(TEXTS) and unwritten(key)}
    twins = {twin: keys[key] for twin, key in TWINS.items() if key in keys}
    ema: dict[str, Shape] = {"model_ema.decay": (), "model_ema.num_updates": ()} if "betas" in keys else {}
    return {key: shape for key, shape in {**keys, **twins, **ema}.items()
            if key not in made and not key.startswith(without)}


@pytest.mark.parametrize(("name", "without", "count"), [
    ("sdxl-base", "-", 2515), ("sd3-medium", TEXTS, 735), ("sd3-medium", T5, 1448), ("sd3-medium", "-", 1668)])
def test_published_files_have_as_many_tensors(name, without, count) -> None:
    """As public inventories of the files have them."""
    assert len(in_file(name, without)) == count


def test_the_published_sdxl_has_such_shapes() -> None:
    """sd_xl_base_1.0.safetensors: number of tensors by dimensions and by component, bytes of all in float16."""
    keys = in_file("sdxl-base")
    assert Counter(map(len, keys.values())) == {0: 1, 1: 1442, 2: 949, 4: 123}
    assert Counter(key.partition(".")[0] for key in keys) == {
        "conditioner": 587, "first_stage_model": 248, "model": 1680}
    assert 2 * sum(map(math.prod, keys.values())) == 6_937_675_890


@pytest.mark.parametrize(("name", "without", "width", "size"), [
    # v1-5-pruned-emaonly, v2-1_768-ema-pruned, sd_xl_base_1.0, sd_xl_refiner_1.0
    ("sd1.5", "-", 4, 4_265_146_304), ("sd2.1", "-", 4, 5_214_604_494),
    ("sdxl-base", "-", 2, 6_938_078_334), ("sdxl-refiner", "-", 2, 6_075_981_930),
    # sd3_medium, sd3_medium_incl_clips, sd3_medium_incl_clips_t5xxlfp16, sd3.5_medium, sd3.5_large
    ("sd3-medium", TEXTS, 2, 4_337_667_306), ("sd3-medium", T5, 2, 5_973_224_240),
    ("sd3-medium", "-", 2, 15_761_074_532), ("sd3.5-medium", TEXTS, 2, 5_107_104_286),
    ("sd3.5-large", TEXTS, 2, 16_460_379_262),
])
def test_published_files_are_as_large(name, without, width, size) -> None:
    """SD 1 and 2 nearly to the byte (their metadata are known), the others up to a thumbnail in the metadata."""
    keys = in_file(name, without)
    types = {key: ("I64", 8) for key in keys if key.endswith("position_ids") and width == 4}
    types |= {key: ("I32", 4) for key in keys if key.endswith("num_updates")}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}} if width == 4 else {}
    end = 0
    for key in sorted(keys, key=lambda key: (types.get(key, ("", 0))[1] != 8, key)):  # widest type first
        dtype, bytes_each = types.get(key, (f"F{8 * width}", width))
        begin, end = end, end + math.prod(keys[key]) * bytes_each
        header[key] = {"dtype": dtype, "shape": keys[key], "data_offsets": [begin, end]}
    rest = size - end - 8 - len(json.dumps(header, separators=(",", ":")))
    assert 0 <= rest < (8 if width == 4 else 40_000)
