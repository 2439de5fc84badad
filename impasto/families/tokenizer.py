"""The tokenizers. CLIP's: from the checkpoint's own folder where it has one, else from the table in this package.

The table is OpenAI's byte-pair merges (Radford et al. 2021), as open_clip ships them under the MIT licence
(`data/bpe_simple_vocab_16e6.LICENSE`). The tokens: 256 bytes, the same 256 ending a word, one for each merge,
and the two marks of beginning and end: 49,408. T5's comes with its checkpoint.
"""

from __future__ import annotations

import gzip
import json
from importlib import resources
from pathlib import Path
from typing import TypeVar, cast

from transformers import CLIPTokenizer, T5Tokenizer

from impasto.core.errors import UserError
from impasto.core.files import atomic_write, key_of, write_json

T = TypeVar("T", CLIPTokenizer, T5Tokenizer)

BEGIN, END = "<|startoftext|>", "<|endoftext|>"

#: the table holds more merges than CLIP uses
MERGES = 49_408 - 2 * 256 - 2


def clip_tokenizer(folder: Path | None = None, pad: str = END) -> CLIPTokenizer:
    """The tokenizer of `folder` (a checkpoint's own, whatever its vocabulary), or CLIP's own without one.

    `pad`: what fills CLIP's own up after the end: its mark (OpenAI), or "!", the token 0 (OpenCLIP).

    Raises `UserError` if the folder holds no readable CLIP tokenizer.
    """
    if folder is None:
        vocabulary, merges = clip_table()
        return CLIPTokenizer(vocab=vocabulary, merges=cast(list[str], merges), model_max_length=77,  # pairs do
                             pad_token=pad)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not ({"vocab.json", "merges.txt"} <= names or "tokenizer.json" in names):
        raise UserError("holds no CLIP tokenizer (vocab.json and merges.txt, or tokenizer.json)", where=folder,
                        fix="copy these files from the checkpoint's source")
    return _read(CLIPTokenizer, folder)


def t5_tokenizer(folder: Path) -> T5Tokenizer:
    """The T5 tokenizer of `folder`. Raises `UserError` if it holds none that can be read."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise UserError("holds no T5 tokenizer (tokenizer.json or spiece.model)", where=folder,
                        fix="copy these files from the checkpoint's source")
    return _read(T5Tokenizer, folder)


def _read(kind: type[T], folder: Path) -> T:
    try:
        return kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(f"the tokenizer cannot be read ({str(error).splitlines()[0]})", where=folder,
                        fix="copy its files from the checkpoint's source") from error


def clip_table() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary, token to id, and its merges in order of rank."""
    packed = resources.files("impasto.families").joinpath("data", "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1:MERGES + 1]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), BEGIN, END]
    return {token: number for number, token in enumerate(tokens)}, merges


def byte_letters() -> list[str]:
    """A visible letter for each byte, in the order of their ids (Radford et al. 2019, GPT-2).

    Bytes that print in Latin-1 stand for themselves and come first; the rest get letters from U+0100 on.
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printing] + [chr(256 + i) for i in range(256 - len(printing))]


def table_of(tokenizer: CLIPTokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A tokenizer's vocabulary, token to id, and its merges in order of rank."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    return model["vocab"], [(left, right) for left, right in pairs]


def digest_of(tokenizer: CLIPTokenizer | T5Tokenizer) -> str:
    """What changes with anything that may change a text's ids: vocabulary, merges, marks."""
    marks = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return key_of(tokenizer.backend_tokenizer.to_str(), marks)


def write_tokenizer(folder: Path, tokenizer: CLIPTokenizer | None = None, pad: str = END) -> None:
    """Write a tokenizer, by default CLIP's own with `pad`, as the folder that diffusers and transformers, old and new,
    open."""
    vocabulary, merges = clip_table() if tokenizer is None else table_of(tokenizer)
    length = 77 if tokenizer is None else tokenizer.model_max_length
    with atomic_write(folder / "vocab.json") as file:
        file.write(json.dumps(vocabulary, ensure_ascii=False).encode())
    with atomic_write(folder / "merges.txt") as file:
        file.write("".join(["#version: 0.2\n", *(f"{a} {b}\n" for a, b in merges)]).encode())
    pad = pad if tokenizer is None else str(tokenizer.pad_token)
    marks = {"bos_token": BEGIN, "eos_token": END, "pad_token": pad, "unk_token": END}
    write_json(folder / "special_tokens_map.json", marks)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": length, "add_prefix_space": False,
        "do_lower_case": True, "errors": "replace", **marks})
