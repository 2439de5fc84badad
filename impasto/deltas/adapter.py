"""What a fine-tune leaves behind, and its algebra: strengths and sums, exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from impasto.core.errors import UserError
from impasto.deltas.delta import Delta
from impasto.deltas.hook import InputHook


@dataclass
class Adapter:
    """For each layer of a base, by path, a sum of deltas; beside them new tokens, and hooks on what layers see.

    A path is "component.path.inside" in diffusers' names ("unet.down_blocks.0…to_q"). Operations return a new
    adapter, which may share factors with the old one.
    """

    deltas: dict[str, tuple[Delta, ...]]
    metadata: dict[str, str] = field(default_factory=dict)
    #: the family of the base, "" if unknown
    family: str = ""
    #: fingerprint of each component of the base that it was made on, as far as known
    base: dict[str, str] = field(default_factory=dict)
    #: for each new token its vectors (n, d) in each text encoder, by component; no strength changes them
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    #: what keys and values see instead of the layer's input, one after the other
    hooks: tuple[InputHook, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether it changes nothing at all."""
        return not (self.deltas or self.embeddings or self.hooks)

    @property
    def layers(self) -> list[str]:
        """Paths of the layers that it changes."""
        return list(self.deltas)

    def dense(self, layer: str, W: Tensor | None = None) -> Tensor:
        """dW of a layer, (out, in / groups, *kernel), in fp32 or wider. Kinds that are not linear need W."""
        terms = self.deltas[layer]
        if W is None and not all(term.linear for term in terms):
            raise UserError("holds a delta that depends on the base's weight", where=layer, fix="give the base")
        return sum((term.weight(W) for term in terms[1:]), start=terms[0].weight(W))

    def __mul__(self, strength: float) -> Adapter:
        """strength · dW in each layer, and of each hook; tokens are carried along as they are."""
        if not isinstance(strength, (int, float)):
            return NotImplemented
        return replace(self, deltas={layer: tuple(term.scaled(strength) for term in terms)
                                     for layer, terms in self.deltas.items()},
                       hooks=tuple(hook.scaled(strength) for hook in self.hooks))

    __rmul__ = __mul__

    def resize(self, rank: int | None = None, *, energy: float | None = None, size: int | None = None) -> Adapter:
        """A LoRA of lower rank in each layer's place, the best one: of `rank`, of the share `energy` of each layer's
        Frobenius norm, or of `size` bytes in half precision altogether.

        `deltas.resize` tells what that cost, too. Raises `UserError` for a delta that depends on the base, and for a
        rank that no layer has.
        """
        from impasto.deltas.ranks import Wanted
        from impasto.deltas.resize import resized

        return resized(self, Wanted(rank, energy, size))[0]

    def __add__(self, other: Adapter) -> Adapter:
        """The sum of dW in each layer; of metadata and fingerprints, what both agree on or only one tells.

        Low-rank terms are concatenated along the rank; kinds that cannot be joined stand side by side; hooks follow
        each other. Raises `UserError` if the two are of different families, change a layer of different shapes, or
        mean different things by a token.
        """
        if not isinstance(other, Adapter):
            return NotImplemented
        if self.family and other.family and self.family != other.family:
            raise UserError(f"adapters of different families cannot be added: {self.family} and {other.family}")
        deltas = dict(self.deltas)
        for layer, terms in other.deltas.items():
            deltas[layer] = _sum(layer, deltas[layer], terms) if layer in deltas else terms
        for token in self.embeddings.keys() & other.embeddings.keys():
            if not _equal(self.embeddings[token], other.embeddings[token]):
                raise UserError("is another thing in each of the two adapters", where=token,
                                fix="save one of them under another token, or leave it out")
        return Adapter(deltas, agreed(self.metadata, other.metadata), self.family or other.family,
                       agreed(self.base, other.base), {**self.embeddings, **other.embeddings},
                       (*self.hooks, *other.hooks))


def _sum(layer: str, terms: tuple[Delta, ...], others: tuple[Delta, ...]) -> tuple[Delta, ...]:
    """All terms of one layer, those joined that can be."""
    total = list(terms)
    for other in others:
        if not (other.linear and all(term.linear for term in total)):
            raise UserError("holds a delta that depends on the base's weight, which has no sum without the base",
                            where=layer, fix="merge them into the base one after the other")
        for term in total:
            _check_alike(layer, term, other)
        for i, term in enumerate(total):
            if (joined := term.joined(other)) is not None:
                total[i] = joined
                break
        else:
            total.append(other)
    return tuple(total)


def _check_alike(layer: str, one: Delta, other: Delta) -> None:
    """Raise a `UserError` if two deltas cannot be of one layer; of a bias alone, which is of shape (), outputs tell."""
    mine, theirs = one.shape, other.shape
    if not (mine and theirs):
        mine, theirs = (_outputs(term) for term in (one, other))
    if mine != theirs:
        raise UserError(f"has the shape {mine} in one adapter and {theirs} in the other", where=layer,
                        fix="they were made for different bases")


def _outputs(term: Delta) -> tuple[int, ...]:
    bias = term.bias()
    return term.shape[:1] if bias is None else tuple(bias.shape)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def agreed(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, str]:
    """What both say, or only one says: what they contradict each other in is left out."""
    both = {**one, **other}
    return {key: value for key, value in both.items() if one.get(key, value) == value == other.get(key, value)}
