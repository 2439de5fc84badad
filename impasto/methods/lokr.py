"""LoKr: a Kronecker product of a small matrix and a larger one, whole or low-rank, on each layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from impasto.methods.weights import Choice, LayerMethod, LayerOptions

if TYPE_CHECKING:
    import torch

    from impasto.deltas.kronecker import Kronecker


class LoKr(LayerMethod):
    """A low-rank Kronecker product (Yeh et al. 2024, arXiv:2309.14859, section 4.2), as LyCORIS trains it."""

    class Options(LayerOptions):
        kind: Literal["lokr"] = "lokr"
        factor: int = Field(-1, description="Size of the smaller matrix: each side of a layer is split into factor · "
                            "rest; where it does not divide, the next smaller number that does. -1: as near to the "
                            "square root as can be, for the smallest file (LyCORIS' default; its examples 6 with full, "
                            "SimpleTuner 10 in attention and 4 in feed-forward).")
        full: bool = Field(False, description="Train both matrices whole; rank and alpha have no meaning then "
                           "(LyCORIS' full_matrix, its examples' way).")
        decompose_both: bool = Field(False, description="Low-rank factors in the smaller matrix too (LyCORIS).")
        tucker: bool = Field(False, description="Write the low-rank factors of a convolution's kernel with a Tucker "
                             "core: smaller, with kernels larger than 1 only (LyCORIS' use_tucker).")

        @field_validator("factor")
        @classmethod
        def _factor(cls, value: int) -> int:
            if value < 1 and value != -1:
                raise ValueError("a factor is 1 or more, or -1")
            return value

    options: Options

    def uses_rank(self) -> bool:
        return not self.options.full

    def make(self, choice: Choice, generator: torch.Generator) -> Kronecker:
        from impasto.deltas.kronecker import Kronecker
        from impasto.deltas.layers import shape_of

        options = self.options
        delta = Kronecker(shape_of(choice.layer), choice.rank, choice.alpha, factor=options.factor, full=options.full,
                          decompose_both=options.decompose_both, tucker=options.tucker)
        delta.initialise(generator)
        return delta

    def remarks(self) -> Iterable[str]:
        """Which sides the factor does not divide, and what was taken; which layers are whole at this rank."""
        from impasto.deltas.kronecker import factorization

        factor, sides = self.options.factor, sorted({side for d in self.deltas.values() for side in d.shape[:2]})
        if other := [f"{side} = {m} · {n}" for side in sides for m, n in [factorization(side, factor)]
                     if factor > 0 and factor not in (m, n)]:
            yield f"method lokr: factor {factor} does not divide every side of a layer: {', '.join(other)}"
        whole = [path for path, delta in self.deltas.items() if not any(
            name.endswith("_b") for name, _ in delta.named_parameters())]
        if whole and not self.options.full:
            yield (f"method lokr: the rank is half of the larger matrix's side or more in {len(whole)} of "
                   f"{len(self.deltas)} layers, which train it whole, without alpha (LyCORIS' rule)")
