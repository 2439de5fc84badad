"""Embeddings in pictures, as A1111 writes them: beside the pickle of the same numbers; others, and hostile ones."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin

from impasto.cli.findings import lines
from impasto.cli.inspect import look
from impasto.core.errors import UserError
from impasto.core.progress import SILENT
from impasto.formats import pictured
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.formats.detect import detect
from impasto.formats.pictured import KEYWORD, LARGEST

VECTORS = torch.linspace(-1, 1, 2 * 768).reshape(2, 768)
NESTED = VECTORS.tolist()


def a1111s(vectors: Any = NESTED, **more: Any) -> dict[str, Any]:
    """What its `EmbeddingEncoder` makes of its own `.pt`."""
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": {"TORCHTENSOR": vectors}}, "name": "cat-500",
            "step": 499, "sd_checkpoint": "81761151", "sd_checkpoint_name": "v1-5-pruned"} | more


def written(path: Path, told: Any, **texts: str) -> Path:
    """A PNG with that in its text, `told` as it is or as JSON, and other texts."""
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    info.add_text("sd-ti-embedding", told if isinstance(told, bytes) else base64.b64encode(json.dumps(told).encode()))
    Image.new("RGB", (24, 16)).save(path, pnginfo=info)
    return path


def test_it_is_the_embedding_of_the_pickle(tmp_path: Path) -> None:
    path = written(tmp_path / "shared.png", a1111s())
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "cat-500"}, tmp_path / "a.pt")
    found, pickled = load_adapter(path), load_adapter(tmp_path / "a.pt")
    assert detect(path).kind == "embedding" and found.family == pickled.family == "sd1"
    assert list(found.embeddings) == ["cat-500"]  # A1111 calls it by the name inside
    ((values,),) = (own.values() for own in found.embeddings.values())
    ((same,),) = (own.values() for own in pickled.embeddings.values())
    assert torch.equal(values, same) and torch.equal(values, VECTORS)
    save_adapter(found, tmp_path / "cat.safetensors", format="webui-embedding", dtype=torch.float32)
    assert torch.equal(load_adapter(tmp_path / "cat.safetensors").embeddings["cat-500"]["text_encoder"], VECTORS)


def test_packed_text_and_no_name(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    told = {key: value for key, value in a1111s().items() if key != "name"}
    info.add_text("sd-ti-embedding", base64.b64encode(json.dumps(told).encode()), zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "dog.png", pnginfo=info)
    assert torch.equal(load_adapter(tmp_path / "dog.png").embeddings["dog"]["text_encoder"], VECTORS)


def test_inspect_tells_of_the_picture_too(tmp_path: Path) -> None:
    path = written(tmp_path / "a.png", a1111s(), parameters="a cat\nSteps: 20", note="mine")
    found = look(path, SILENT)
    assert (found["kind"], found["family"], found["format"]) == ("embedding", "sd1", "webui-embedding")
    assert found["tokens"]["cat-500"]["text_encoder"]["vectors"] == 2
    assert found["picture"]["size"] == [24, 16]
    assert found["picture"]["texts"] == {"parameters": "a cat\nSteps: 20", "note": "mine"}
    shown = "\n".join(lines(found))
    assert "embedding for sd1" in shown and "in a picture of 24x16 pixels" in shown and "Steps: 20" in shown
    assert "sd-ti-embedding" not in shown


def test_a_picture_without_one(tmp_path: Path) -> None:
    for ending in ("png", "jpg", "webp"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"a.{ending}")
        assert detect(tmp_path / f"a.{ending}").kind == "picture"
        assert look(tmp_path / f"a.{ending}", SILENT)["kind"] == "picture"
        with pytest.raises(UserError, match="is a picture without an embedding in its texts; if one was drawn"):
            load_adapter(tmp_path / f"a.{ending}")


@pytest.mark.parametrize("told", [
    b"", b"no base64 at all!", base64.b64encode(b"{"), base64.b64encode(b"[" * 100_000), [], {}, "x",
    {"string_to_param": []}, {"string_to_param": {}}, a1111s(string_to_param={"*": [[1.0]]}),
    a1111s(string_to_param={"a": {"TORCHTENSOR": [[1.0]]}, "b": {"TORCHTENSOR": [[1.0]]}}),
    a1111s([[1.0, 2.0], [3.0]]), a1111s([["a", "b"]]), a1111s({"a": 1}), a1111s([[10**400]]), a1111s(None),
])
def test_what_is_none_is_one_line(tmp_path: Path, told: Any) -> None:
    with pytest.raises(UserError, match="no embedding of A1111's; take the picture") as raised:
        load_adapter(written(tmp_path / "a.png", told))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("vectors", "line"), [
    ([[float("nan")] * 4], "NaN or infinity"), ([], "no vectors"), ([[[1.0]]], "no vectors")])
def test_vectors_that_are_none(tmp_path: Path, vectors: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        load_adapter(written(tmp_path / "a.png", a1111s(vectors)))


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def test_made_to_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for packed in (True, False):
        text = b"A" * (LARGEST + 9)
        text = chunk(b"zTXt", KEYWORD + b"\0" + zlib.compress(text)) if packed else chunk(b"tEXt", KEYWORD + text)
        path.write_bytes(pictured.PNG + text)
        with pytest.raises(UserError, match="more than 16 MiB"):
            load_adapter(path)


def test_a_damaged_picture_ends(tmp_path: Path) -> None:
    """A length beyond the end, no end, a chunk cut short: read as far as it goes."""
    whole = written(tmp_path / "whole.png", a1111s()).read_bytes()
    for cut in (8, 12, 33, 60, 200, len(whole) - 5):
        (tmp_path / "cut.png").write_bytes(whole[:cut])
        try:
            load_adapter(tmp_path / "cut.png")
        except UserError as error:
            assert "\n" not in str(error)
    (tmp_path / "long.png").write_bytes(pictured.PNG + b"\xff\xff\xff\xfftEXt" + b"x" * 30)
    assert detect(tmp_path / "long.png").kind == "picture"
