"""Captions of any length through a CLIP text encoder: chunks, weights, and batches of unequal length.

A caption is cut into chunks of 75 tokens, each put between its own beginning and end marks, padded and encoded by
itself; the chunks' states stand one behind the other (A1111's practice; kohya's and compel's too). Shapes: B
captions, L tokens in a chunk with its marks (77), C channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, cast

import torch
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from impasto.core.errors import UserError
from impasto.families.base import Caption
from impasto.families.networks import ClipText
from impasto.families.tokenizer import clip_tokenizer
from impasto.families.tokens import Vocabulary, Words
from impasto.formats.configs import CONFIGS

if TYPE_CHECKING:
    from impasto.formats.checkpoint import Checkpoint

#: a token and its weight
Token = tuple[int, float]
AnyTokenizer = CLIPTokenizer | T5Tokenizer


def tokenizer_of(checkpoint: Checkpoint, family: str, name: str = "tokenizer") -> CLIPTokenizer:
    """The checkpoint's own tokenizer of that folder name, or CLIP's as the family has it. Raises `UserError`."""
    return clip_tokenizer(checkpoint.tokenizers.get(name), CONFIGS.get(family).tokenizers[name].pad)


def vocabulary(tokenizer: CLIPTokenizer, encoder: ClipText) -> Vocabulary:
    """What the encoder knows before any token is added."""
    return Vocabulary(functools.partial(ids_of, tokenizer), encoder.text_model.embeddings.token_embedding,
                      encoder.length - 2)


def ids_of(tokenizer: AnyTokenizer, text: str) -> list[int]:
    """Ids of a text, without marks."""
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def runs_of(caption: Caption, tokenizer: AnyTokenizer, words: Words | None = None) -> list[list[Token]]:
    """Token ids with weights, no marks: those of a new token together, any other by itself.

    Weighted pieces are tokenized each by itself, as in A1111.
    """
    pieces = [(caption, 1.0)] if isinstance(caption, str) else caption
    return [[(token, weight) for token in run] for text, weight in pieces
            for run in (words.runs(text) if words else [[token] for token in ids_of(tokenizer, text)])]


def chunks_of(caption: Caption, tokenizer: CLIPTokenizer, length: int, words: Words | None = None
              ) -> list[list[Token]]:
    """A caption's chunks of L tokens each, one at least, with marks and padding, which weigh 1.

    A new token whose vectors do not all fit into a chunk begins the next one (A1111's practice).
    """
    begin, end, pad = ((mark, 1.0) for mark in marks(tokenizer))
    room = length - 2
    chunks = [list[Token]()]
    for run in runs_of(caption, tokenizer, words):
        if len(chunks[-1]) + len(run) > room:
            chunks.append([])
        chunks[-1] += run
    return [[begin, *chunk, end, *[pad] * (room - len(chunk))] for chunk in chunks]


def marks(tokenizer: CLIPTokenizer) -> tuple[int, int, int]:
    """Ids of beginning, end and padding."""
    ids = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    if not all(isinstance(number, int) for number in ids):
        raise UserError("lacks a mark of beginning, end or padding", where="tokenizer",
                        fix="its special_tokens_map.json is damaged")
    return cast(tuple[int, int, int], ids)


@dataclass(frozen=True)
class Chunks:
    """Captions as a text encoder takes them: all chunks of all of them, N, one after the other."""

    #: (N, L)
    ids: Tensor
    #: (N, L), or None where all weigh 1
    weights: Tensor | None
    #: chunks of each caption
    counts: list[int]
    #: (N,) the place of each chunk's end mark
    ends: Tensor

    @classmethod
    def of(cls, captions: Sequence[Caption], tokenizer: CLIPTokenizer, encoder: ClipText, words: Words | None,
           most: int | None = None) -> Self:
        """On the encoder's device; of each caption the first `most`."""
        device = next(encoder.parameters()).device
        each = [chunks_of(caption, tokenizer, encoder.length, words)[:most] for caption in captions]
        chunks = [chunk for own in each for chunk in own]
        end = marks(tokenizer)[1]
        weighted = any(weight != 1.0 for chunk in chunks for _, weight in chunk)
        return cls(
            torch.tensor([[token for token, _ in chunk] for chunk in chunks], device=device),
            torch.tensor([[weight for _, weight in chunk] for chunk in chunks], device=device) if weighted else None,
            [len(own) for own in each],
            torch.tensor([[token for token, _ in chunk].index(end) for chunk in chunks], device=device))

    def together(self, states: Tensor, length: int) -> Tensor:
        """States (B, n·L, C) of captions out of the chunks' (N, L, C), weighed."""
        if self.weights is not None:
            states = weigh(states, self.weights)
        return stack([part.flatten(0, 1)[None] for part in states.split(self.counts)], length)

    def first(self, pooled: Tensor) -> Tensor:
        """Of the chunks' (N, C) the one of each caption's first chunk, (B, C): everybody's practice (A1111, kohya)."""
        return torch.stack([part[0] for part in pooled.split(self.counts)])


def encode(captions: Sequence[Caption], tokenizer: CLIPTokenizer, encoder: ClipText, skip: int = 0,
           words: Words | None = None) -> Tensor:
    """States (B, n·L, C) of captions, n the least common multiple of their numbers of chunks.

    New tokens' rows take part whether a caption has one or not, so that every batch has a gradient to them.
    """
    chunks = Chunks.of(captions, tokenizer, encoder, words)
    return chunks.together(encoder(chunks.ids, skip, None if words is None else words.rows), encoder.length)


def encode_unnormed(captions: Sequence[Caption], tokenizer: CLIPTokenizer, encoder: ClipText, skip: int = 1,
                    words: Words | None = None, most: int | None = None) -> tuple[Tensor, Tensor | None]:
    """States (B, n·L, C) of captions as SDXL takes them, of the last layer but `skip` and before the final norm; and
    the pooled embeddings (B, P), if the encoder has a projection. Of a caption's chunks the first `most` are read."""
    chunks = Chunks.of(captions, tokenizer, encoder, words, most)
    rows = None if words is None else words.rows
    if not hasattr(encoder, "text_projection"):
        return chunks.together(encoder(chunks.ids, skip, rows, normed=False), encoder.length), None
    states, pooled = encoder.with_pooled(chunks.ids, chunks.ends, skip, rows)
    return chunks.together(states, encoder.length), chunks.first(pooled)


def weigh(states: Tensor, weights: Tensor) -> Tensor:
    """States (N, L, C) times their tokens' weights (N, L), each chunk then scaled to the mean it had.

    A1111's practice, which takes the mean over the whole batch; here it is each chunk's own, so that a picture
    does not depend on its neighbours. A chunk whose weights are all 1 stays as it is, to the bit. Where the mean
    is next to nothing beside the states (CLIP's is a tenth of them; an untrained encoder's is zero) it is left
    alone: the quotient of two roundings would be any number.
    """
    wide = states.float()
    weighed = wide * weights[..., None]
    before, after = (x.mean(dim=(1, 2), keepdim=True) for x in (wide, weighed))
    steady = torch.minimum(before.abs(), after.abs()) > 1e-3 * wide.abs().mean(dim=(1, 2), keepdim=True)
    scale = torch.where(steady, before / after, 1.0)
    touched = (weights != 1).any(dim=1)[:, None, None]
    return torch.where(touched, (weighed * scale).to(states.dtype), states)


def stack(states: Sequence[Tensor], length: int) -> Tensor:
    """One batch (B, n·L, C) out of states (b, n_i·L, C), by repeating each to the least common multiple of the n_i.

    In cross-attention the repetition changes nothing: softmax over k copies of the same keys gives each copy
    1/k of the weight, exp(s) / (k Σ exp(s)), and the k equal values add up to the same output. Padding with
    empty chunks instead, as is common, changes the picture. It holds for attention *to* the text only: where
    the text attends too, as in SD 3, a repeated text would outweigh the picture.
    """
    counts = [len(state[0]) // length for state in states]
    most = math.lcm(*counts)
    return torch.cat([state if count == most else state.repeat(1, most // count, 1)
                      for state, count in zip(states, counts, strict=True)])
