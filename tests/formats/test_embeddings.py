"""Embedding files: round trips, files as other programs write them, other programs on ours, and hostile ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.families.apply import apply
from impasto.families.load import load_base
from impasto.families.tokenizer import clip_tokenizer
from impasto.formats.adapters import DTYPES, load_adapter, save_adapter
from impasto.formats.arrangement import arranged, save_arranged
from impasto.formats.detect import Detected, detect
from impasto.formats.header import read_header
from tests.checkpoints import write_checkpoint
from tests.formats.adapter_cases import dense, random_adapter, worst

ONE = ("text_encoder",)
TWO = ("text_encoder", "text_encoder_2")


def vectors(n: int = 2, d: int = 768, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 0.02


def embedding(*tokens: str, encoders: tuple[str, ...] = ONE, n: int = 2, d: int = 768) -> Adapter:
    return Adapter({}, {"ss_seed": "7"}, "sd1" if encoders == ONE else "sdxl", {"text_encoder": "ab12"}, {
        token: {encoder: vectors(n, d if encoder == "text_encoder" else 1280, seed=10 * i + len(encoder))
                for encoder in encoders} for i, token in enumerate(tokens)})


def assert_same(got: Adapter, want: Adapter, tolerance: float = 0.0) -> None:
    assert got.embeddings.keys() == want.embeddings.keys()
    for token, own in want.embeddings.items():
        assert got.embeddings[token].keys() == own.keys()
        for encoder, values in own.items():
            torch.testing.assert_close(got.embeddings[token][encoder], values, rtol=tolerance, atol=tolerance * 1e-3)


# --- our own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "tokens", "encoders"), [
    ("webui-embedding", ["<cat>"], ONE), ("webui-embedding", ["sks cat"], TWO),
    ("diffusers-embedding", ["<cat>"], ONE), ("diffusers-embedding", ["sks cat v2"], ONE),
    ("kohya", ["<cat>"], ONE), ("kohya", ["<cat>", "sks dog"], TWO)])
def test_round_trips(tmp_path: Path, format: str, tokens: list[str], encoders: tuple[str, ...], dtype: torch.dtype
                     ) -> None:
    adapter, path = embedding(*tokens, encoders=encoders), tmp_path / "another name.safetensors"
    save_adapter(adapter, path, format=format, dtype=dtype)
    loaded = load_adapter(path)
    assert_same(loaded, adapter, 0 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert (loaded.family, loaded.base) == (adapter.family, adapter.base)
    assert loaded.metadata["ss_seed"] == "7" and not loaded.deltas
    again = tmp_path / "again.safetensors"
    save_adapter(loaded, again, format=format, dtype=dtype)
    assert_same(load_adapter(again), loaded)
    assert detect(path).kind == "embedding"


def test_beside_a_lora(tmp_path: Path) -> None:
    both = random_adapter() + embedding("<cat>", "<dog>")
    path = tmp_path / "both.safetensors"
    assert save_arranged(both, path, dtype=torch.float32) == [path]
    loaded = load_adapter(path)
    assert worst(dense(loaded), dense(both)) < 1e-6
    assert_same(loaded, both)
    assert detect(path) == Detected("adapter", "sd1", "kohya")
    digest = read_header(path).metadata["sshs_model_hash"]
    other = tmp_path / "other.safetensors"
    save_adapter(random_adapter() + embedding("<cat>", n=3), other, dtype=torch.float32)
    assert read_header(other).metadata["sshs_model_hash"] != digest


def test_which_files_there_will_be(tmp_path: Path) -> None:
    path = tmp_path / "pets.safetensors"
    assert [(part.path.name, part.format) for part in arranged(embedding("<cat>"), path)] == [
        ("pets.safetensors", "webui-embedding")]
    several = embedding("<cat>", "sks/dog v2", "???", "SKS dog_V2")
    files = save_arranged(several, path, dtype=torch.float32)
    assert [file.name for file in files] == ["pets.safetensors", "pets-cat.safetensors", "pets-sks_dog_v2.safetensors",
                                             "pets-token.safetensors", "pets-SKS_dog_V2-2.safetensors"]
    assert_same(load_adapter(path), several)
    for file, token in zip(files[1:], several.embeddings, strict=True):
        assert list(load_adapter(file).embeddings) == [token]
    assert [(part.path, part.format) for part in arranged(several, path, "kohya")] == [(path, "kohya")]
    assert [part.format for part in arranged(several, path, "diffusers-embedding")] == [
        "kohya", *["diffusers-embedding"] * 4]
    assert [part.format for part in arranged(embedding("a"), path, "diffusers-embedding")] == ["diffusers-embedding"]


@pytest.mark.parametrize("tokens", [["<a>"], ["<a>", "<b>"]])
@pytest.mark.parametrize("format", ["diffusers-embedding", "webui-embedding"])
def test_a_format_of_tokens_is_not_exchanged_for_one_that_holds_more(tmp_path: Path, format: str, tokens: list[str]
                                                                     ) -> None:
    with pytest.raises(UserError, match=f"changes of layers, for which the format {format} has no place"):
        save_arranged(random_adapter() + embedding(*tokens), tmp_path / "a.safetensors", format=format)
    assert not list(tmp_path.iterdir())


def test_keys_are_those_that_others_read(tmp_path: Path) -> None:
    def keys(adapter: Adapter, format: str) -> set[str]:
        save_adapter(adapter, tmp_path / "a.safetensors", format=format)
        return set(safetensors.torch.load_file(tmp_path / "a.safetensors"))

    assert keys(embedding("<cat>"), "webui-embedding") == {"emb_params"}
    assert keys(embedding("<cat>", encoders=TWO), "webui-embedding") == {"clip_l", "clip_g"}
    assert keys(embedding("<cat>"), "diffusers-embedding") == {"<cat>"}
    assert keys(embedding("<cat>"), "kohya") == {"bundle_emb.<cat>.string_to_param.*"}
    assert keys(embedding("<cat>", encoders=TWO), "kohya") == {"bundle_emb.<cat>.clip_l", "bundle_emb.<cat>.clip_g"}


@pytest.mark.parametrize(("adapter", "format", "said"), [
    (embedding("<a>", "<b>"), "webui-embedding", "holds one token, not 2; .*kohya"),
    (embedding("<a>", "<b>"), "diffusers-embedding", "holds one token"),
    (embedding("<a>", encoders=TWO), "diffusers-embedding", "those of one text encoder; save it as webui-embedding"),
    (embedding("a.b"), "kohya", "a.b: .*dot in its name"),
    (embedding("<a>"), "peft", "new tokens, for which the format peft has no place"),
    (random_adapter(), "webui-embedding", "changes of layers, for which"),
    (random_adapter() + embedding("<a>"), "webui-embedding", "changes of layers, for which"),
    (Adapter({}, embeddings={"<a>": {"text_encoder": torch.full((1, 4), torch.nan)}}), "webui-embedding", "NaN"),
    (Adapter({}, embeddings={"<a>": {"text_encoder": torch.full((1, 4), 1e6)}}), "kohya", "too large for F16"),
    (Adapter({}, embeddings={"<a>": {"tower": torch.ones(1, 4)}}), "webui-embedding", "tower have no place"),
])
def test_what_cannot_be_saved_leaves_nothing(tmp_path: Path, adapter: Adapter, format: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        save_adapter(adapter, tmp_path / "a.safetensors", format=format)
    assert not list(tmp_path.iterdir())


# --- others' files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [
    {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors()}, "name": "other", "step": 5,
     "sd_checkpoint": None, "sd_checkpoint_name": None},
    {"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors())}), "name": "x"},
    {"emb_params": vectors()},
])
def test_a1111_s_pickles_are_called_after_their_file(tmp_path: Path, content: dict[str, Any]) -> None:
    path = tmp_path / "my face.pt"
    torch.save(content, path)
    loaded = load_adapter(path, family="sd1")
    assert_same(loaded, Adapter({}, embeddings={"my face": {"text_encoder": vectors()}}))
    assert loaded.family == "sd1" and not loaded.embeddings["my face"]["text_encoder"].requires_grad


@pytest.mark.parametrize("shape", [(768,), (1, 768), (3, 768)])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_diffusers_files_as_its_script_writes_them(tmp_path: Path, shape: tuple[int, ...], suffix: str) -> None:
    path, values = tmp_path / f"learned_embeds{suffix}", torch.randn(shape)
    save = torch.save if suffix == ".bin" else safetensors.torch.save_file
    save({"<cat-toy>": values}, path)
    assert_same(load_adapter(path), Adapter({}, embeddings={"<cat-toy>": {"text_encoder": values.view(-1, 768)}}))


def test_safetensors_of_others(tmp_path: Path) -> None:
    path = tmp_path / "face.v2.safetensors"
    safetensors.torch.save_file({"emb_params": vectors(3, 1024).half()}, path)
    loaded = load_adapter(path)
    assert loaded.family == "sd2" and loaded.embeddings["face.v2"]["text_encoder"].dtype == torch.float32
    safetensors.torch.save_file({"clip_l": vectors(), "clip_g": vectors(2, 1280)}, path)
    loaded = load_adapter(path)
    assert loaded.family == "sdxl" and set(loaded.embeddings["face.v2"]) == set(TWO)
    with pytest.raises(UserError, match="for sdxl, and the base is sd1"):
        load_adapter(path, family="sd1")
    both = {"bundle_emb.cat.string_to_param.*": vectors(), "bundle_emb.dog.emb_params": vectors(1)}
    safetensors.torch.save_file(both, path)
    assert {token: len(own["text_encoder"]) for token, own in load_adapter(path).embeddings.items()} == {
        "cat": 2, "dog": 1}


@pytest.mark.parametrize(("tensors", "said"), [
    ({"emb_params": torch.ones(1, 2, 3)}, "are no vectors"), ({"emb_params": torch.ones(0, 768)}, "are no vectors"),
    ({"emb_params": torch.tensor([[1.0, torch.inf]])}, "NaN or infinity"),
    ({"emb_params": torch.ones(1, 4), "clip_l": torch.ones(1, 4)}, "beside others"),
    ({"clip_l": torch.ones(1, 4), "tower": torch.ones(1, 4)}, "'tower' is of no text encoder"),
    ({"bundle_emb.cat.tower": torch.ones(1, 4)}, "not of a bundled embedding's kind"),
    ({"bundle_emb.cat": torch.ones(1, 4)}, "not of a bundled embedding's kind"),
    ({"bundle_emb.cat.emb_params": torch.ones(1, 4), "bundle_emb.cat.clip_l": torch.ones(1, 4)}, "bundled"),
])
def test_malformed_files(tmp_path: Path, tensors: dict[str, Tensor], said: str) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(UserError, match=said) as raised:
        load_adapter(path)
    assert "\n" not in str(raised.value)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("ran",)


@pytest.mark.parametrize("content", [
    {"string_to_param": {"*": Hostile()}}, {"string_to_param": Hostile(), "name": "x"},
    {"<cat>": vectors(1), "extra": Hostile()}])
def test_hostile_pickles_are_refused_and_not_run(tmp_path: Path, content: Any, capsys: pytest.CaptureFixture[str]
                                                 ) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match="wants to run code .*was refused"):
        load_adapter(tmp_path / "a.pt")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [
    {"string_to_param": {}}, {"string_to_param": {"*": vectors(), "+": vectors()}}, {"string_to_param": {"*": 3}}])
def test_pickles_that_are_no_embedding(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match="where A1111's file has one; .* safetensors"):
        load_adapter(tmp_path / "a.pt")


# --- others on ours -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@torch.no_grad()
def test_diffusers_loads_ours_and_says_the_same(tmp_path: Path, n: int) -> None:
    """`load_textual_inversion` on a tiny pipeline: equal states of a prompt with the token."""
    folder = write_checkpoint(tmp_path / "base", layout="diffusers")
    pipe: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipe.tokenizer = clip_tokenizer(folder / "tokenizer")
    adapter, path = embedding("<cat>", n=n, d=32), tmp_path / "cat.safetensors"
    save_adapter(adapter, path, format="diffusers-embedding", dtype=torch.float32)
    pipe.load_textual_inversion(str(path))
    prompt = pipe.maybe_convert_prompt("a photo of <cat>, asleep", pipe.tokenizer)
    ids = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    assert (ids >= 49408).sum() == n
    theirs = pipe.text_encoder(ids).last_hidden_state
    base = load_base(folder)
    with apply(base, load_adapter(path)):
        ours = base.encode_text(["a photo of <cat>, asleep"])["states"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
