"""The tokenizer against transformers' own, read from the folder that we write, and against known ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from impasto.core.errors import UserError
from impasto.families.tokenizer import clip_table, clip_tokenizer, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def ours() -> CLIPTokenizer:
    return clip_tokenizer()


@pytest.fixture(scope="module")
def theirs(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(str(folder))


def test_known_ids(ours: CLIPTokenizer) -> None:
    assert ours("a photo of sks dog").input_ids == [49406, 320, 1125, 539, 48136, 1929, 49407]
    assert ours("a diagram", padding="max_length", max_length=5).input_ids == [49406, 320, 22697, 49407, 49407]
    assert len(ours) == 49408 and (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (49406, 49407, 49407)


def test_table() -> None:
    vocabulary, merges = clip_table()
    assert sorted(vocabulary.values()) == list(range(49408)) and len(merges) == 48894
    assert (vocabulary["!"], vocabulary["a"], vocabulary["a</w>"], vocabulary["in"]) == (0, 64, 320, 512)


@pytest.mark.parametrize("text", [
    "", " ", "naïve café", "cafe\u0301", "🐱🚀 cat", "👩‍👩‍👧‍👦", "猫と犬", 
    "it's they're I'll don't", "UPPER lower", "a\n\tb  c",
    "1234 5.67", "<lora:x:1>", "<|endoftext|> inside", "ﬁ ligature", "İstanbul",
    "\u200bzero width", "e = mc²!!!", "ß ſ Ω"])
def test_odd_texts_as_transformers_reads_them(ours: CLIPTokenizer, theirs: CLIPTokenizer, text: str) -> None:
    assert ours(text).input_ids == theirs(text).input_ids


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.text())
def test_any_text_as_transformers_reads_it(ours: CLIPTokenizer, theirs: CLIPTokenizer, text: str) -> None:
    assert ours(text).input_ids == theirs(text).input_ids


def test_folder_is_complete(folder: Path, theirs: CLIPTokenizer) -> None:
    assert {p.name for p in folder.iterdir()} == {
        "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
    assert theirs.model_max_length == 77
    assert theirs.pad_token_id == 49407


def test_a_folders_own_vocabulary_is_used(tmp_path: Path) -> None:
    letters = [chr(c) for c in range(ord("a"), ord("e"))]
    tokens = [*letters, *(c + "</w>" for c in letters), "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 32, "pad_token": "<|endoftext|>"}))
    small = clip_tokenizer(tmp_path)
    assert small("ab cd").input_ids == [9, 8, 2, 7, 10]


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no CLIP tokenizer"):
        clip_tokenizer(tmp_path)
    with pytest.raises(UserError, match="holds no CLIP tokenizer"):
        clip_tokenizer(tmp_path / "absent")
    (tmp_path / "vocab.json").write_text("{broken")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="cannot be read"):
        clip_tokenizer(tmp_path)
