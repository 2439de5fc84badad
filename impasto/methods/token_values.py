"""What a new token's vectors begin as, and how the vocabulary's own lie. Shapes: n vectors of d channels, V words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from impasto.core.errors import UserError, nearest
from impasto.core.rng import generator
from impasto.families.tokens import Vocabulary, Words
from impasto.formats.adapters import load_adapter

if TYPE_CHECKING:
    from impasto.methods.textual_inversion import TokenOptions


def mean_norm(table: Tensor) -> Tensor:
    """The mean norm of a table's vectors (V, d), fp32."""
    return table.detach().float().norm(dim=1).mean()


def check_name(token: str, encoder: str, vocabulary: Vocabulary, words: Words | None, others: Iterable[str]) -> None:
    """Raises `UserError` for a name that a text encoder knows already, or that another token has."""
    ids = vocabulary.ids(token)
    if len(ids) == 1:
        raise UserError(f"is a word that {encoder} knows already, and captions that mean it would change",
                        where=f"token {token!r}", fix=f"choose another name, such as <{token.strip('<>')}-1>")
    known = {name: old for name, old, _ in words.known} if words is not None else {}
    for name, old in {**known, **{other: vocabulary.ids(other) for other in others}}.items():
        if ids == old:
            raise UserError(f"is there twice: it reads as {name!r} does", where=f"token {token!r}",
                            fix="give each token a name of its own, letters' case apart")


def beginning(token: str, options: TokenOptions, encoder: str, vocabulary: Vocabulary, seed: int
              ) -> tuple[Tensor, list[str]]:
    """A token's first vectors (n, d), fp32, on the CPU, and lines for the user. Raises `UserError`."""
    if options.initial_file is not None:
        return from_file(token, options.initial_file, encoder, vocabulary.width, options.vectors), []
    n, table = options.vectors or 1, vocabulary.table.weight.detach().float().cpu()
    if options.initial is None:
        return at_random(table, n, generator(seed, "init", f"{encoder}.{token}")), []
    ids = vocabulary.ids(options.initial)
    if not ids:
        raise UserError("the tokenizer makes nothing of it", where=f"token {token!r}: initial {options.initial!r}",
                        fix="give words")
    notes = []
    if len(ids) > n:
        notes = [f"{token}: {options.initial!r} is {len(ids)} tokens, and its {n} vector{'s' if n > 1 else ''} "
                 f"begin{'' if n > 1 else 's'} as the mean of neighbours"]
    return spread(table[ids], n), notes


def spread(words: Tensor, n: int) -> Tensor:
    """n vectors (n, d) of words' vectors (k, d), in their order.

    Vector i is that of word ⌊i·k/n⌋ (A1111's create_embedding). Where there are more words than vectors, none is lost:
    it is the mean of the words from there up to the next one's, at their own mean norm, as a mean of vectors that
    point apart is shorter than any of them.
    """
    k, made = len(words), []
    for i in range(n):
        start = i * k // n
        part = words[start:max((i + 1) * k // n, start + 1)]
        mean = part.mean(0)
        made.append(part[0] if len(part) == 1 else mean * part.norm(dim=1).mean() / mean.norm().clamp(min=1e-12))
    return torch.stack(made)


def at_random(table: Tensor, n: int, draws: torch.Generator) -> Tensor:
    """n vectors (n, d) of the normal distribution that has the table's mean and deviation in each channel."""
    deviation, mean = torch.std_mean(table, dim=0)
    return mean + deviation * torch.randn(n, table.shape[1], generator=draws)


def from_file(token: str, path: str, encoder: str, width: int, n: int | None) -> Tensor:
    """The vectors in an embedding file: those of its only token, or of the one of this name."""
    found = load_adapter(path).embeddings
    if not found:
        raise UserError("holds no embedding", where=path, fix="choose an embedding file")
    if token not in found and len(found) > 1:
        raise UserError(f"holds several tokens, and none is called {token!r}", where=path, fix=nearest(token, found))
    vectors = found[token] if token in found else next(iter(found.values()))
    if encoder not in vectors or vectors[encoder].shape[1] != width:
        raise UserError(f"holds no vectors of {width} channels for {encoder}", where=path,
                        fix="it was made for another base")
    if n not in (None, len(vectors[encoder])):
        raise UserError(f"holds {len(vectors[encoder])} vectors, not {n}", where=path, fix="leave vectors out")
    return vectors[encoder].clone()
