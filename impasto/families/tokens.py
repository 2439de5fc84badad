"""New tokens of a base: names in captions that stand for learned vectors, beside the text encoders' tables.

No table is touched or copied. A name is found in a caption by the sequence of ids that the tokenizer makes of it, the
longest name first, so that letters' case and spaces count as little as they do to CLIP (A1111's practice). Its place is
taken by as many ids as it has vectors, from the end of the vocabulary on; an encoder looks these up in rows of their
own. Shapes: n vectors of a token, m rows of all tokens, d channels, V words of the vocabulary.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from impasto.core.errors import UserError, nearest


@dataclass(frozen=True)
class Vocabulary:
    """What a text encoder knows before any token is added."""

    #: ids of a text, without marks
    ids: Callable[[str], list[int]]
    #: (V, d)
    table: nn.Embedding
    #: ids that one chunk holds, its marks left out: no token may have more vectors
    room: int

    @property
    def width(self) -> int:
        """d"""
        return self.table.embedding_dim


@dataclass(frozen=True)
class Words:
    """The new tokens in force for one text encoder, at one moment."""

    vocabulary: Vocabulary
    #: (m, d), the vectors of all tokens one after the other; differentiable
    rows: Tensor
    #: each token's name, the ids that the tokenizer makes of it, and the ids that take their place; longest first
    known: tuple[tuple[str, list[int], list[int]], ...]

    def runs(self, text: str) -> list[list[int]]:
        """The ids of a text: those of a new token together, any other by itself."""
        ids = self.vocabulary.ids(self._apart(text))
        found: list[list[int]] = []
        place = 0
        while place < len(ids):
            _, old, new = next((known for known in self.known if ids[place:place + len(known[1])] == known[1]),
                               ("", ids[place:place + 1], ids[place:place + 1]))
            found.append(new)
            place += len(old)
        return found

    def within(self, text: str) -> set[str]:
        """The names of the tokens that occur in a text."""
        first = {new[0]: name for name, _, new in self.known}
        return {first[run[0]] for run in self.runs(text) if run[0] in first}

    def _apart(self, text: str) -> str:
        """The text with spaces around the names that begin or end with a sign.

        The tokenizer takes signs that touch for one word, and would not see `<cat>` in `<cat>, sleeping`.
        """
        names = [name for name, _, _ in self.known if not (name[0].isalnum() and name[-1].isalnum())]
        if not names:
            return text
        spaced = (r"\s+".join(map(re.escape, name.split())) for name in names)
        return re.sub("|".join(spaced), lambda found: f" {found[0]} ", text, flags=re.IGNORECASE)


class Tokens:
    """The new tokens of a base. Those added last come first where two have the same name."""

    def __init__(self, encoders: Sequence[str], vocabulary: Callable[[str], Vocabulary]) -> None:
        self._encoders, self._vocabulary, self._added = tuple(encoders), vocabulary, list[AddedTokens]()

    def add(self, embeddings: Mapping[str, Mapping[str, Tensor]]) -> AddedTokens:
        """Let captions contain these tokens: for each one its vectors (n, d) in each text encoder, by component.

        An encoder that is left out reads a token's name as any other text. The tensors are not copied: parameters
        are trained in place. Raises `UserError`, before anything is changed, for an encoder that the base does not
        have, vectors of another width or too many of them, and a name without letters or signs.
        """
        for token, vectors in embeddings.items():
            for encoder, values in vectors.items():
                self._check(token, encoder, values)
        added = AddedTokens(self, {token: dict(vectors) for token, vectors in embeddings.items()})
        self._added.append(added)
        return added

    def of(self, encoder: str) -> Words | None:
        """What is in force for a text encoder; None where nothing is."""
        vectors: dict[str, Tensor] = {}
        for added in self._added:
            if added.enabled:
                vectors |= {token: values[encoder] for token, values in added.embeddings.items() if encoder in values}
        if not vectors:
            return None
        vocabulary = self._vocabulary(encoder)
        known, end = [], vocabulary.table.num_embeddings
        for token, values in vectors.items():
            known.append((token, vocabulary.ids(token), list(range(end, end + len(values)))))
            end += len(values)
        device = vocabulary.table.weight.device
        rows = torch.cat([values.to(device, torch.float32) for values in vectors.values()])
        # of names that read alike the one added last comes first
        return Words(vocabulary, rows, tuple(sorted(reversed(known), key=lambda one: -len(one[1]))))

    def facts(self) -> list[tuple[str, str, str]]:
        """What is in force, for cache keys: encoder, token, and a digest of its vectors."""
        found = []
        for encoder in self._encoders:
            if (words := self.of(encoder)) is not None:
                for name, _, new in words.known:
                    start = new[0] - words.vocabulary.table.num_embeddings
                    raw = words.rows[start:start + len(new)].detach().cpu().contiguous().view(torch.uint8).numpy()
                    found.append((encoder, name, hashlib.blake2b(raw.data, digest_size=16).hexdigest()))
        return sorted(found)

    def remove(self, added: AddedTokens) -> None:
        """Take tokens out again. Doing it twice does no harm."""
        self._added = [other for other in self._added if other is not added]

    def _check(self, token: str, encoder: str, vectors: Tensor) -> None:
        if encoder not in self._encoders:
            raise UserError(f"has vectors for {encoder}, which this base does not have", where=token,
                            fix=nearest(encoder, self._encoders))
        vocabulary = self._vocabulary(encoder)
        if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] != vocabulary.width:
            shape = "×".join(map(str, vectors.shape))
            raise UserError(f"has vectors of shape {shape}, and those of {encoder} are {vocabulary.width} wide",
                            where=token, fix="it was made for another base")
        if len(vectors) > vocabulary.room:
            raise UserError(f"has {len(vectors)} vectors, and {encoder} reads {vocabulary.room} at a time",
                            where=token, fix="give it fewer")
        if not vocabulary.ids(token):
            raise UserError("is no name for a token: the tokenizer makes nothing of it", where=repr(token),
                            fix="give it letters")


class TokenVectors(nn.Module):
    """The vectors of one token in one text encoder, in training."""

    #: a batch may well do without it: it need not have a gradient in the first steps
    sporadic = True

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)


class AddedTokens:
    """Tokens on their base, until `detach`."""

    def __init__(self, home: Tokens, embeddings: dict[str, dict[str, Tensor]]) -> None:
        self._home, self.embeddings, self.enabled = home, embeddings, True

    def detach(self) -> None:
        """Take them out again. Doing it twice does no harm."""
        self._home.remove(self)


def looked_up(table: nn.Embedding, ids: Tensor, rows: Tensor) -> Tensor:
    """Vectors (…, d) of ids (…): from the table (V, d), from V on from `rows` (m, d); in the table's dtype."""
    size = table.num_embeddings
    new = ids >= size
    plain = table(ids.masked_fill(new, 0))
    own = nn.functional.embedding((ids - size).clamp(min=0), rows.to(plain.dtype))
    return torch.where(new[..., None], own, plain)
