"""LoRA, and the ways to begin it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import pydantic
from pydantic import Field

from impasto.methods.weights import Choice, LayerMethod, LayerOptions

if TYPE_CHECKING:
    import torch

    from impasto.deltas.delta import Delta
    from impasto.deltas.lowrank import LowRank


class LoRA(LayerMethod):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""

    class Options(LayerOptions):
        kind: Literal["lora"] = "lora"
        rslora: bool = Field(False, description="Multiply by alpha / √rank instead of alpha / rank, so that the step "
                             "does not shrink with the rank; give alpha too, as left out it is the rank, and the "
                             "factor √rank (Kalajdzievski 2023; peft's use_rslora).")
        dropout: float = Field(0.0, ge=0, lt=1, description="Probability of leaving out each input of a delta, in "
                               "training (the paper's code, peft's lora_dropout).")
        tucker: bool = Field(False, description="Write the kernel of a convolution as a Tucker core between the "
                             "factors: smaller, with kernels larger than 1 only (LyCORIS' use_tucker).")
        init: Literal["kaiming", "gaussian", "pissa"] = Field(
            "kaiming", description="How the factor that is not zero begins: kaiming (the paper's code, kohya, peft), "
            "or gaussian, of deviation 1 / rank (diffusers' scripts). pissa: both factors begin as the principal "
            "part of the weight, of which the start is taken away again (Meng et al. 2024); the artifact has twice "
            "the rank.")

        @pydantic.model_validator(mode="after")
        def _pissa_alone(self) -> LoRA.Options:
            if self.init == "pissa":
                for key in ("dora", "warm_start", "max_norm", "tucker"):
                    if getattr(self, key):
                        raise ValueError(f'{key} does not go with init = "pissa", whose factors are not the change')
            return self

    options: Options
    plus: ClassVar[frozenset[str]] = frozenset({"up"})

    def make(self, choice: Choice, generator: torch.Generator) -> Delta:
        from impasto.deltas.departure import Departure
        from impasto.deltas.layers import shape_of
        from impasto.deltas.lowrank import LowRank

        shape = shape_of(choice.layer)
        tucker = self.options.tucker and any(side != 1 for side in shape[2:])
        delta = LowRank(shape, choice.rank, choice.alpha, rslora=self.options.rslora, dropout=self.options.dropout,
                        tucker=tucker)
        if self.options.init == "pissa":
            _to_principal(delta, choice, generator)
            return Departure(delta)
        delta.initialise(generator)
        if self.options.init == "gaussian":
            _to_gaussian(delta, generator)
        return delta


def _to_gaussian(delta: LowRank, generator: torch.Generator) -> None:
    """down normal of deviation 1 / rank (peft's init_lora_weights = "gaussian")."""
    import torch

    with torch.no_grad():
        drawn = torch.randn(delta.down.shape, generator=generator, device=generator.device)
        delta.down.copy_(drawn / delta.rank)


def _to_principal(delta: LowRank, choice: Choice, generator: torch.Generator) -> None:
    """up = U √(S / scale), down = √(S / scale) V^T of W's first r singular values (PiSSA, equations 2 and 3; peft)."""
    import torch

    from impasto.deltas.departure import principal
    from impasto.deltas.layers import weight_of

    with torch.no_grad():
        U, S, Vh = principal(weight_of(choice.layer).flatten(1), delta.rank, generator)
        root = (S / delta.scale).sqrt()
        delta.up.copy_((U * root).view(delta.up.shape))
        delta.down.copy_((root[:, None] * Vh).view(delta.down.shape))
