"""LoHa: a Hadamard product of two low-rank matrices on each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from impasto.methods.weights import Choice, LayerMethod, LayerOptions

if TYPE_CHECKING:
    import torch

    from impasto.deltas.hadamard import Hadamard


class LoHa(LayerMethod):
    """FedPara's low-rank Hadamard product (Hyeon-Woo et al. 2022, arXiv:2108.06098), as LyCORIS trains it."""

    class Options(LayerOptions):
        kind: Literal["loha"] = "loha"
        rank: int = Field(8, ge=1, description="Size of each factor; the delta's rank is up to its square (LyCORIS' "
                          "examples 8 with alpha 4; they warn of ranks above 32).")
        tucker: bool = Field(False, description="Write the factors of a convolution's kernel as Tucker cores: smaller, "
                             "with kernels larger than 1 only (LyCORIS' use_tucker).")

    options: Options

    def make(self, choice: Choice, generator: torch.Generator) -> Hadamard:
        from impasto.deltas.hadamard import Hadamard
        from impasto.deltas.layers import shape_of

        shape = shape_of(choice.layer)
        tucker = self.options.tucker and any(side != 1 for side in shape[2:])
        delta = Hadamard(shape, choice.rank, choice.alpha, tucker=tucker)
        delta.initialise(generator)
        return delta
