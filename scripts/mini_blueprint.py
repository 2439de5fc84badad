"""Write the embedded base's shape: configurations and tokenizer, no weights.

    python -m scripts.mini_blueprint [FOLDER]

The vocabulary is byte-level BPE as CLIP's (Sennrich et al. 2016; Radford et al. 2021), learned from the drawn world's
captions and a few words that people add to them: each of those words becomes one token, any other text is spelled.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from impasto.core.files import write_json
from impasto.families.tokenizer import BEGIN, END, byte_letters, write_tokenizer
from impasto.formats.configs import CONFIGS
from impasto.mini import BASE, world

#: words of prompts that the world's captions do not have
MORE_WORDS = ("sks mascot style in the of photo picture drawing painting toy with and one two three cat dog robot "
              "creature big bright dark")
LENGTH = 32  # tokens of a caption, marks included

CHANGES: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 16, "block_out_channels": [48, 96, 144], "layers_per_block": 1, "norm_num_groups": 16,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 128, "attention_head_dim": 4},
    "vae": {
        "sample_size": 128, "block_out_channels": [16, 32, 64, 64], "layers_per_block": 1, "norm_num_groups": 8},
    "text_encoder": {
        "hidden_size": 128, "projection_dim": 128, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": LENGTH},
}


def write_blueprint(folder: Path) -> None:
    """Configurations and tokenizer of the embedded base, as a diffusers folder without weights."""
    tokenizer = learn_vocabulary()
    write_tokenizer(folder / "tokenizer", tokenizer)
    CHANGES["text_encoder"] |= {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
                                "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    table = CONFIGS.get("sd1")
    index: dict[str, Any] = {"_class_name": table.pipelines[""], "_diffusers_version": "0.39.0",
                             "requires_safety_checker": False, "tokenizer": ["transformers", "CLIPTokenizer"],
                             "scheduler": ["diffusers", table.scheduler["_class_name"]]}
    for name, part in table.parts.items():
        write_json(folder / name / "config.json", {**part.config, **CHANGES[name]})
        index[name] = ["transformers" if name == "text_encoder" else "diffusers", part.classes[0]]
    write_json(folder / "scheduler" / "scheduler_config.json", table.scheduler)
    write_json(folder / "model_index.json", index)


def learn_vocabulary(captions: int = 5000) -> CLIPTokenizer:
    """Merges of the most frequent pairs, until every word of the captions is one token."""
    words: Counter[str] = Counter(MORE_WORDS.split())
    for seed in range(captions):
        words.update(re.findall(r"[a-z]+|,", world.caption(world.scene(seed), seed)))
    letters = byte_letters()
    spelled = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges: list[tuple[str, str]] = []
    while pairs := _pairs(words, spelled):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelled = {word: _merged(letters_of, best) for word, letters_of in spelled.items()}
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), BEGIN, END]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges,  # pyright: ignore
                         model_max_length=LENGTH)


def _pairs(words: Counter[str], spelled: dict[str, tuple[str, ...]]) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for word, count in words.items():
        for pair in zip(spelled[word], spelled[word][1:], strict=False):
            found[pair] += count
    return found


def _merged(letters: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for letter in letters:
        if out and (out[-1], letter) == pair:
            out[-1] += letter
        else:
            out.append(letter)
    return tuple(out)


if __name__ == "__main__":
    write_blueprint(Path(sys.argv[1]) if len(sys.argv) > 1 else BASE)
