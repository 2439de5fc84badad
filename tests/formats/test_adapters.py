"""What holds for every adapter format, and files that are no adapters or broken ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.lowrank import LowRank
from impasto.formats.adapters import CODECS, DTYPES, load_adapter, save_adapter
from tests.formats.adapter_cases import dense, random_adapter, worst

#: those that hold changes of weights
FORMATS = [name for name in CODECS if "deltas" in CODECS.get(name).holds]

KEY = "lora_unet_conv_in"
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def target(folder: Path, format: str, name: str = "a") -> Path:
    return folder / (name if format == "peft" else f"{name}.safetensors")


def kohya_file(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(tensors, path, metadata)
    return path


def pair(key: str = KEY) -> dict[str, torch.Tensor]:
    up, down = torch.ones(8, 2, 1, 1), torch.ones(2, 4, 3, 3)
    return {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}


def loha() -> dict[str, torch.Tensor]:
    return {f"{KEY}.hada_w{half}_a": torch.ones(8, 2) for half in "12"} | \
        {f"{KEY}.hada_w{half}_b": torch.ones(2, 36) for half in "12"}


# --- every format ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("alpha", [None, 1.0, 4.0])
@pytest.mark.parametrize("rslora", [False, True])
def test_round_trip_in_fp32(tmp_path: Path, format: str, alpha: float | None, rslora: bool) -> None:
    adapter = random_adapter(alpha=alpha, rslora=rslora)
    save_adapter(adapter, target(tmp_path, format), format=format, dtype=torch.float32)
    loaded = load_adapter(target(tmp_path, format))
    assert worst(dense(loaded), dense(adapter)) < 1e-6
    assert (loaded.family, loaded.base) == (adapter.family, adapter.base)
    assert loaded.metadata.items() >= adapter.metadata.items()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_file_holds_is_kept_by_the_next_save(tmp_path: Path, format: str, dtype: torch.dtype) -> None:
    """load -> save -> load, in the file's own type: the same deltas, from every format to every other."""
    save_adapter(random_adapter(), target(tmp_path, format), format=format, dtype=dtype)
    first = load_adapter(target(tmp_path, format))
    for other in FORMATS:
        save_adapter(first, target(tmp_path, other, "b"), format=other, dtype=dtype)
        assert worst(dense(load_adapter(target(tmp_path, other, "b"))), dense(first)) < 1e-6


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_storage_rounds_once(tmp_path: Path, format: str, dtype: torch.dtype) -> None:
    adapter = random_adapter(alpha=1.0)
    save_adapter(adapter, target(tmp_path, format), format=format, dtype=dtype)
    assert worst(dense(load_adapter(target(tmp_path, format))), dense(adapter)) < torch.finfo(dtype).eps


@pytest.mark.parametrize("format", FORMATS)
def test_equal_adapters_give_equal_bytes(tmp_path: Path, format: str) -> None:
    adapter = random_adapter()
    paths = [target(tmp_path, format, name) for name in ("x", "y")]
    for path in paths:
        save_adapter(adapter, path, format=format, metadata={"modelspec.title": "same"})
    files = [sorted(p for p in path.rglob("*") if p.is_file()) or [path] for path in paths]
    assert len(files[0]) == len(files[1])
    for a, b in zip(*files, strict=True):
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_terms_of_a_layer_are_concatenated(tmp_path: Path, format: str) -> None:
    one, two = random_adapter(seed=1), random_adapter(seed=2, alpha=3.0)
    both = replace(one, deltas={k: one.deltas[k] + two.deltas[k] for k in one.deltas})
    save_adapter(both, target(tmp_path, format), format=format, dtype=torch.float32)
    want = {k: dense(one)[k] + dense(two)[k] for k in one.deltas}
    assert worst(dense(load_adapter(target(tmp_path, format))), want) < 1e-6


@pytest.mark.parametrize("format", FORMATS)
def test_no_strength_is_no_strength(tmp_path: Path, format: str) -> None:
    """alpha = 0 means full strength to some programs, so it is never written."""
    save_adapter(random_adapter(alpha=0.0), target(tmp_path, format), format=format)
    loaded = load_adapter(target(tmp_path, format))
    assert all(not d.any() for d in dense(loaded).values())
    assert all(term.alpha > 0 for terms in loaded.deltas.values() for term in terms)


@pytest.mark.parametrize("format", FORMATS)
def test_paths_of_text_encoders_get_their_text_model(tmp_path: Path, format: str) -> None:
    adapter = random_adapter()
    flat = replace(adapter, deltas={k.replace("text_model.", ""): v for k, v in adapter.deltas.items()})
    save_adapter(flat, target(tmp_path, format), format=format, dtype=torch.float32)
    assert set(load_adapter(target(tmp_path, format)).deltas) == set(adapter.deltas)


# --- what cannot be saved --------------------------------------------------------------------------------


def low_rank(value: float = 1.0) -> LowRank:
    return LowRank.from_factors(torch.full((8, 2), value), torch.ones(2, 4), alpha=2.0)


def adapter_of(deltas: dict, metadata: dict | None = None) -> Adapter:
    return Adapter(deltas=deltas, metadata=metadata or {}, family="sd1", base={})


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("adapter", "said"), [
    (adapter_of({}), "changes nothing"),
    (adapter_of({LAYER: (low_rank(float("nan")),)}), "attn2.to_k.*NaN"),
    (adapter_of({LAYER: (low_rank(1e6),)}), "attn2.to_k.*too large for F16"),
    (adapter_of({"unet.no.such": (low_rank(),)}), "no.such"),
    (adapter_of({"head.conv_in": (low_rank(),)}), "head.conv_in"),
    (adapter_of({LAYER: (low_rank(),)}, {"steps": 3}), "steps"),
])
def test_what_cannot_be_saved_leaves_nothing(tmp_path: Path, format: str, adapter: Adapter, said: str
                                             ) -> None:
    with pytest.raises(UserError, match=said):
        save_adapter(adapter, target(tmp_path, format), format=format)
    assert not list(tmp_path.iterdir())


def test_unknown_format_and_type(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="kohya"):
        save_adapter(random_adapter(), tmp_path / "a", format="kohia")
    with pytest.raises(UserError, match="int8"):
        save_adapter(random_adapter(), tmp_path / "a", dtype=torch.int8)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(random_adapter(), path)
    before = path.read_bytes()
    with pytest.raises(UserError):
        save_adapter(adapter_of({LAYER: (low_rank(1e6),)}), path)
    assert path.read_bytes() == before


def test_a_disk_that_lies_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from impasto.formats import adapters

    real = adapters.write_tensors

    def faulty(file, tensors, metadata) -> None:
        real(file, {**tensors, **{k: torch.zeros_like(t) for k, t in list(tensors.items())[:1]}}, metadata)

    monkeypatch.setattr(adapters, "write_tensors", faulty)
    with pytest.raises(UserError, match="reads back otherwise"):
        save_adapter(random_adapter(), tmp_path / "a.safetensors")


# --- what cannot be loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize(("tensors", "said"), [
    ({**pair(), "lora_unet_conv_nn.alpha": torch.tensor(1.0)}, "lora_unet_conv_nn.alpha"),
    ({**pair(), "alpha": torch.tensor(1.0)}, "'alpha'"),
    ({**pair(), f"{KEY}.lora_sideways.weight": torch.ones(2)}, "lora_sideways"),
    ({**pair(), f"{KEY}.oft_blocks": torch.ones(2, 2, 2)}, "oft_blocks.*OFT.*not supported"),
    ({**pair(), f"{KEY}.lokr_t1": torch.ones(2, 2, 3, 3)}, "lokr_t1.*not supported"),
    ({**pair(), f"{KEY}.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "conv_in.*do not fit.*mid"),
    ({**pair(), f"{KEY}.lora_mid.weight": torch.ones(2, 3, 3, 3)}, "conv_in.*do not fit.*mid"),
    ({**pair(), f"{KEY}.hada_w1_b": torch.ones(2, 2)}, "conv_in has parts of a LoHa and of a LoRA"),
    ({**pair(), f"{KEY}.diff": torch.ones(8, 4, 3, 3)}, "conv_in has parts of a LoRA and of a full difference"),
    ({**pair(), f"{KEY}.dora_scale": torch.ones(3, 1)}, r"conv_in has a DoRA magnitude of shape \(3, 1\)"),
    ({f"{KEY}.dora_scale": torch.ones(8, 1)}, "conv_in has a magnitude and no factors"),
    ({f"{KEY}.alpha": torch.tensor(1.0)}, "conv_in has an alpha and no factors"),
    ({f"{KEY}.lora_up.weight": torch.ones(8, 0), f"{KEY}.lora_down.weight": torch.ones(0, 4)},
     "conv_in has an empty (up|down)"),
    (loha() | {f"{KEY}.hada_t1": torch.ones(2, 2, 3, 3)}, "conv_in lacks its t2"),
    ({k: v for k, v in loha().items() if "w2_a" not in k}, "conv_in lacks its w2_a"),
    (loha() | {f"{KEY}.hada_w2_b": torch.ones(2, 35)}, r"conv_in.*do not fit together.*w2_b \(2, 35\)"),
    (loha() | {f"{KEY}.hada_w1_a": torch.ones(8, 2, 1)}, "conv_in.*do not fit together.*w1_a"),
    ({f"{KEY}.lokr_w1": torch.ones(2, 2)}, "conv_in lacks its w2"),
    ({f"{KEY}.lokr_w1": torch.ones(200, 200), f"{KEY}.lokr_w2": torch.ones(200, 200)},
     r"conv_in.*\(40000, 40000\), which no network has"),
    ({f"{KEY}.hada_w{half}_{side}": torch.ones((20000, 1) if side == "a" else (1, 20000))
      for half in "12" for side in "ab"}, "conv_in.*which no network has"),
    ({f"{KEY}.lokr_w1": torch.ones(2, 2), f"{KEY}.lokr_w2_a": torch.ones(4, 2)}, "conv_in lacks its w2_b"),
    ({f"{KEY}.lokr_w1": torch.ones(2), f"{KEY}.lokr_w2": torch.ones(4, 2, 3, 3)}, "conv_in.*do not fit together.*w1"),
    ({f"{KEY}.lokr_w1": torch.ones(2, 2), f"{KEY}.lokr_w1_a": torch.ones(2, 2), f"{KEY}.lokr_w2": torch.ones(4, 2)},
     "conv_in (has w1_a beside|lacks its w1_b)"),
    ({f"{KEY}.lokr_w1": torch.ones(2, 2), f"{KEY}.lokr_w2_a": torch.ones(4, 2), f"{KEY}.lokr_w2_b": torch.ones(3, 18)},
     "conv_in.*do not fit together"),
    ({f"{KEY}.diff": torch.ones(8, 4, 3, 3), f"{KEY}.diff_b": torch.ones(7)}, "conv_in.*bias"),
    ({f"{KEY}.diff": torch.ones(8, 4, 3, 3), f"{KEY}.w_norm": torch.ones(8)}, "conv_in has two tensors for its weight"),
    ({**pair(), f"{KEY}.alpha": torch.ones(3)}, r"conv_in.*alpha of shape \(3,\)"),
    ({f"{KEY}.lora_up.weight": torch.ones(8, 2)}, "conv_in lacks its down"),
    ({f"{KEY}.lora_down.weight": torch.ones(2, 8)}, "conv_in lacks its up"),
    ({**pair(), f"{KEY}.lora_up.weight": torch.ones(8, 3, 1, 1)}, "conv_in.*do not fit"),
    ({**pair(), f"{KEY}.lora_up.weight": torch.full((8, 2, 1, 1), float("nan"))}, "conv_in.lora_up.*NaN"),
    ({**pair(key="lora_unet_input_blocks_44_1_proj_in")}, "input_blocks_44_1.*names no layer"),
    ({"model.diffusion_model.out.2.weight": torch.ones(2)}, "is a checkpoint"),
    ({"weight": torch.ones(2)}, "'weight'"),
    ({"unet.conv_in.lora_A.weight": torch.ones(2, 4), "unet.conv_in.surplus": torch.ones(1)}, "surplus"),
    ({"unet.conv_inn.lora_A.weight": torch.ones(2, 4)}, "conv_inn"),
    ({"unet.conv_in.lora_A.a.weight": torch.ones(2, 4), "unet.conv_in.lora_B.b.weight": torch.ones(4, 2)},
     "several adapters"),
    ({}, "no tensors"),
])
def test_bad_files_are_refused_in_one_line(tmp_path: Path, tensors: dict, said: str) -> None:
    path = kohya_file(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError, match=said) as caught:
        load_adapter(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.ckpt", "a"])
def test_a_pickle_of_a_lora_says_what_to_do(tmp_path: Path, name: str) -> None:
    torch.save(pair(), tmp_path / name)
    with pytest.raises(UserError, match="is a pickle, and adapters of its kind are read from safetensors alone; "
                                        "save it as safetensors") as caught:
        load_adapter(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_truncated_text_missing_and_folders(tmp_path: Path) -> None:
    whole = kohya_file(tmp_path / "whole.safetensors", pair()).read_bytes()
    for length in (0, 7, 8, 20, len(whole) // 2, len(whole) - 1):
        path = tmp_path / f"{length}.safetensors"
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="truncated|not a safetensors"):
            load_adapter(path)
    for text, said in ((b"hello, this is no tensor at all", "not a safetensors"),
                       (b"<!DOCTYPE html><html>", "web page"), (b"PK\x03\x04" * 9, "pickle"),
                       (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS")):
        path = tmp_path / "text.safetensors"
        path.write_bytes(text)
        with pytest.raises(UserError, match=said):
            load_adapter(path)
    with pytest.raises(UserError, match="no such file"):
        load_adapter(tmp_path / "missing.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder without an adapter"):
        load_adapter(tmp_path / "folder")


def with_header(path: Path, header: str, data: bytes = b"\0" * 8) -> Path:
    raw = header.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


F32 = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(("header", "said"), [
    (f'{{"a":{F32},"a":{F32}}}', "'a' occurs twice"),
    (f'{{"a":{F32},"b":{F32}}}', "'b' overlaps"),
    ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}',
     "gap"),
    ('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', "truncated: 8 bytes"),
    ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "4 bytes at its end"),
    ('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', "another number of bytes"),
    ('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', "shape"),
    ('{"a":{"dtype":"F32","shape":[true,2],"data_offsets":[0,8]}}', "shape"),
    ('{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}', "another number of bytes"),
    ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}', "another number of bytes"),
    ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8.0]}}', "data_offsets"),
    ('{"a":{"dtype":"X9","shape":[2],"data_offsets":[0,8]}}', "X9"),
    ('{"a":{"dtype":"F32","shape":[2]}}', "lacks"),
    ('{"__metadata__":{"steps":3},"a":' + F32 + "}", "metadata"),
    ("[1,2]", "JSON"), ("{]", "JSON"), ('{"a":' * 3000 + "1" + "}" * 3000, "JSON|lacks"),
])
def test_malformed_headers(tmp_path: Path, header: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        load_adapter(with_header(tmp_path / "a.safetensors", header))
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 10_000))
def test_a_damaged_file_is_a_user_error_or_loads(tmp_path_factory, at: int, value: int, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    raw = bytearray(safetensors.torch.save(pair() | {f"{KEY}.alpha": torch.tensor(2.0)}, {"ss_x": "y"}))
    header = int.from_bytes(raw[:8], "little") + 8
    raw[at % header] = value
    path.write_bytes(raw[:len(raw) - cut % len(raw)] if cut % 3 == 0 else raw)
    try:
        load_adapter(path)
    except UserError as error:
        assert "\n" not in str(error)


# --- the family ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "metadata", "family"), [
    (768, {}, "sd1"), (1024, {}, "sd2"), (2048, {}, "sdxl"), (1280, {}, "sdxl-refiner"), (32, {}, ""),
    (32, {"ss_base_model_version": "sd_v1"}, "sd1"),
    (32, {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
    (32, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
    (32, {"impasto.family": "sd1", "ss_base_model_version": "sd_v2"}, "sd1"),
])
def test_family(tmp_path: Path, width: int, metadata: dict[str, str], family: str) -> None:
    key = "lora_unet_" + LAYER.removeprefix("unet.").replace(".", "_")
    path = kohya_file(tmp_path / "a.safetensors", {
        f"{key}.lora_up.weight": torch.ones(8, 2), f"{key}.lora_down.weight": torch.ones(2, width)}, metadata)
    assert load_adapter(path).family == family
    if family not in ("sd1", ""):
        with pytest.raises(UserError, match=f"for {family}, and the base is sd1"):
            load_adapter(path, family="sd1")


def test_a_damaged_fingerprint_is_forgotten(tmp_path: Path) -> None:
    for value in ("{", "[]", json.dumps({"unet": 3})):
        path = kohya_file(tmp_path / "a.safetensors", pair(), {"impasto.base": value})
        assert load_adapter(path).base == {}
