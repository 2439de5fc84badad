"""Bad input to all verbs that read adapters: one line that says what, where and what to do; no output, nothing run."""

from __future__ import annotations

import errno
import json
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from impasto.core.errors import UserError
from impasto.core.weighted import Weighted
from impasto.deltas.adapter import Adapter
from impasto.deltas.hypernetwork import Hypernetwork
from impasto.deltas.ranks import Wanted
from impasto.formats import header
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.toolbox.convert import convert
from impasto.toolbox.merge import merge_adapters
from impasto.toolbox.mix import mix, resize
from tests.formats.adapter_cases import random_adapter

Written = Callable[..., Path]

CROSS = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
ONE = Wanted(rank=1)
#: verb -> what it does with a file; `base` is a small SD 1 checkpoint
VERBS: dict[str, Callable[[Path, Path, Path], object]] = {
    "merge": lambda file, out, base: merge_adapters(base, [Weighted(str(file))], out),
    "mix": lambda file, out, base: mix([Weighted(str(good(file.parent))), Weighted(str(file))], out),
    "resize": lambda file, out, base: resize(file, ONE, out),
    "convert": lambda file, out, base: convert(file, out, to="diffusers"),
    "convert-kind": lambda file, out, base: convert(file, out, kind="lora", wanted=ONE),
}


def good(folder: Path) -> Path:
    path = folder / "good.safetensors"
    if not path.exists():
        save_adapter(random_adapter(), path)
    return path


def lora(path: Path, width: int = 32, **parts: torch.Tensor) -> Path:
    """A LoRA on one layer that reads the text, whose states have `width` numbers; `parts` in place of its own."""
    own = {"lora_up": torch.ones(32, 2), "lora_down": torch.ones(2, width)} | parts
    save_file({f"{CROSS}.{name}.weight".replace("alpha.weight", "alpha"): t for name, t in own.items()}, path)
    return path


def refused(verb: str, file: Path, base: Path, line: str) -> None:
    out = file.parent / "made" / "out.safetensors"
    with pytest.raises(UserError, match=line) as raised:
        VERBS[verb](file, out, base)
    told = str(raised.value)
    assert "\n" not in told and file.name in told and len(told) < 400 and not out.parent.exists()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("parts", "line"), [
    ({"lora_up": torch.full((32, 2), float("nan"))}, "lora_up.weight' holds NaN.*there is nothing to mend"),
    ({"alpha": torch.tensor(float("inf"))}, "alpha' holds NaN or infinity"),
    ({"lora_up": torch.ones(32, 2, dtype=torch.int64)}, "is of I64, .*floating-point.*save it as F16"),
    ({"lora_down": torch.ones(2, 32, dtype=torch.bool)}, "is of BOOL"),
    ({"lora_up": torch.ones(32, 3)}, "do not fit together"),
])
def test_numbers_that_are_none(verb: str, parts: dict[str, torch.Tensor], line: str, written: Written, tmp_path: Path
                               ) -> None:
    refused(verb, lora(tmp_path / "a.safetensors", **parts), written(), line)


@pytest.mark.parametrize(("width", "line"), [
    (2048, "for sdxl, and the base is sd1; choose a base of the sdxl family"), (64, r"attn2.to_k by \(32, 64\).*another"
                                                                                   " base")])
def test_for_another_family_or_width(width: int, line: str, written: Written, tmp_path: Path) -> None:
    file = lora(tmp_path / "a.safetensors", width)
    refused("merge", file, written(), line)
    own = lora(tmp_path / "own.safetensors")
    with pytest.raises(UserError, match=rf"a.safetensors: changes .*attn2.to_k by \(32, {width}\), and own.safetensors "
                                        r"by \(32, 32\); they were made for bases of different sizes"):
        mix([Weighted(str(own)), Weighted(str(file))], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_an_alpha_that_is_missing_is_the_rank(written: Written, tmp_path: Path) -> None:
    """The field's habit: factor 1. It stands in what is written, so that no other reader takes it otherwise."""
    file = lora(tmp_path / "a.safetensors")
    (term,) = load_adapter(file).deltas["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"]
    assert torch.equal(term.weight(), torch.full((32, 32), 2.0))
    mix([Weighted(str(file))], tmp_path / "out.safetensors")
    assert float(load_file(tmp_path / "out.safetensors")[f"{CROSS}.alpha"]) == 2
    lora(tmp_path / "whole.safetensors", alpha=torch.tensor(2))  # a whole number is one
    assert float(load_adapter(tmp_path / "whole.safetensors").deltas[
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"][0].tensors()["alpha"]) == 2


@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk(verb: str, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, base = good(tmp_path), written()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full .*free some space and run the same command again") as raised:
        VERBS[verb](file, tmp_path / "made" / "out.safetensors", base)
    assert "\n" not in str(raised.value) and not list((tmp_path / "made").iterdir())


@pytest.mark.parametrize("verb", VERBS)
def test_the_output_is_the_input(verb: str, written: Written, tmp_path: Path) -> None:
    file = good(tmp_path)
    before = file.read_bytes()
    with pytest.raises(UserError, match="good.safetensors: is one of the inputs, which are never changed; choose"):
        VERBS[verb](file, tmp_path / "made" / ".." / file.name, written())
    assert file.read_bytes() == before


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft", "comfyui", "lycoris"])
def test_a_hypernetwork_has_one_format(to: str, tmp_path: Path) -> None:
    hook = Hypernetwork([32]).requires_grad_(False)
    save_adapter(Adapter({}, family="sd1", hooks=(hook,)), tmp_path / "h.pt", format="hypernetwork")
    with pytest.raises(UserError, match="hypernetwork") as raised:
        convert(tmp_path / "h.pt", tmp_path / "out.safetensors", to=to)
    assert "\n" not in str(raised.value) and not (tmp_path / "out.safetensors").exists()


# --- made to do harm -----------------------------------------------------------------------------------------


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("whole", [True, False])
def test_code_in_a_pickle_is_not_run(verb: str, whole: bool, written: Written, tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    if whole:
        file.write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol=2))
    else:
        torch.save({f"{CROSS}.alpha": torch.ones(1), "x": Evil(tmp_path / "ran")}, file)
    refused(verb, file, written(), "(wants to run code .*was refused; nothing of it was run|kind that is not read|is a "
                                   "pickle).*(use|save it as)")
    assert not (tmp_path / "ran").exists()


def raw(path: Path, text: bytes, length: int | None = None) -> Path:
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text)
    return path


N = 10**9
HEADERS: dict[str, tuple[bytes, str]] = {
    "exabytes": (json.dumps({"x": {"dtype": "F32", "shape": [N, N], "data_offsets": [0, 4 * N * N]}}).encode(),
                 "truncated: 4000000000000000000 bytes are missing"),
    "empty but huge": (json.dumps({"x": {"dtype": "F32", "shape": [N, 0, N, N], "data_offsets": [0, 0]}}).encode(),
                       "no adapter format knows the key 'x'"),
    "many tensors": (b"{" + b",".join(b'"k%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i
                                      for i in range(400_000)) + b"}", "lists more than any model has"),
    "many numbers": (b'{"x":[' + b"1," * 11_000_000 + b"1]}", "lists more than any model has"),
    "many lists": (b'{"x":[' + b"[]," * 2_000_000 + b"1]}", "lists more than any model has"),
    "deep": (b'{"a":' * 500_000, "is not JSON"),
    "a long number": (b'{"x":' + b"9" * 10_000_000 + b"}", "is not JSON"),
}


@pytest.mark.parametrize("verb", ["merge", "resize", "convert"])
@pytest.mark.parametrize("kind", HEADERS)
def test_headers_made_to_fill_the_memory(verb: str, kind: str, written: Written, tmp_path: Path) -> None:
    text, line = HEADERS[kind]
    refused(verb, raw(tmp_path / "a.safetensors", text), written(), line)


@pytest.mark.parametrize("kind", [kind for kind in HEADERS if kind != "deep"])
def test_they_take_no_more_than_a_few_copies_of_the_file(kind: str, tmp_path: Path) -> None:
    file = raw(tmp_path / "a.safetensors", HEADERS[kind][0])
    tracemalloc.start()
    try:
        with pytest.raises(UserError):
            load_adapter(file)
        assert tracemalloc.get_traced_memory()[1] < 4 * file.stat().st_size + 2**20
    finally:
        tracemalloc.stop()


def test_a_header_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:  # with a hole in it, so that it takes no place
        file.write((header.MAX_HEADER + 1).to_bytes(8, "little") + b'{"__metadata__":{"a":"')
        file.truncate(header.MAX_HEADER + 100)
    with pytest.raises(UserError, match="has a header of 100000001 bytes, and 100000000 are the most"):
        load_adapter(path)


def test_thirty_thousand_tensors_are_no_crime(tmp_path: Path) -> None:
    text = b"{" + b",".join(b'"k%d":{"dtype":"F32","shape":[0,1,1,1],"data_offsets":[0,0]}' % i
                            for i in range(30_000)) + b"}"
    assert len(header.read_header(raw(tmp_path / "a.safetensors", text)).tensors) == 30_000
