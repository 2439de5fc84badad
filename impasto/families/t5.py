"""Captions through a T5 encoder, as SD 3 reads them: one sequence of a fixed length, filled up after its end.

The filling is read along with the text, and the picture attends to what comes of it, as in diffusers and in Stability's
own code. `masked`, T5 does not read it, and the states are zero there (kohya's apply_t5_attn_mask). Shapes: B captions,
L tokens, the end included, C channels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import T5Tokenizer

from impasto.core.errors import UserError
from impasto.families import clip
from impasto.families.base import Caption
from impasto.families.networks import T5Text
from impasto.families.tokens import Vocabulary, Words


def vocabulary(tokenizer: T5Tokenizer, encoder: T5Text, length: int) -> Vocabulary:
    """What the encoder knows before any token is added."""
    return Vocabulary(functools.partial(clip.ids_of, tokenizer), encoder.shared, length - 1)


def encode(captions: Sequence[Caption], tokenizer: T5Tokenizer, encoder: T5Text, length: int,
           words: Words | None = None, *, masked: bool = False) -> Tensor:
    """States (B, L, C) of captions, what does not fit left out; weighted as `clip.weigh` says.

    `masked`, L is what the longest of them has, and zeros may follow up to the full length.
    """
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if not (isinstance(end, int) and isinstance(pad, int)):
        raise UserError("lacks a mark of end or padding", where="T5's tokenizer",
                        fix="its tokenizer_config.json is damaged")
    texts = [_fitting(clip.runs_of(caption, tokenizer, words), length - 1) + [(end, 1.0)] for caption in captions]
    rows = [[*text, *[(pad, 1.0)] * (length - len(text))] for text in texts]
    device = encoder.shared.weight.device
    mask = torch.arange(length, device=device) < torch.tensor([[len(text)] for text in texts], device=device)
    ids = torch.tensor([[token for token, _ in row] for row in rows], device=device)
    states = encoder(ids, None if words is None else words.rows, mask if masked else None)
    if any(weight != 1.0 for row in rows for _, weight in row):
        states = clip.weigh(states, torch.tensor([[weight for _, weight in row] for row in rows], device=device))
    return (states * mask[..., None])[:, :max(map(len, texts))] if masked else states


def _fitting(runs: Sequence[list[clip.Token]], room: int) -> list[clip.Token]:
    """The first runs of tokens, as many as there is room for; none is cut."""
    found: list[clip.Token] = []
    for run in runs:
        if len(found) + len(run) > room:
            break
        found += run
    return found
