"""Full and partial fine-tuning: a base's own weights are trained, in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pydantic
from pydantic import Field

from impasto.core.errors import UserError
from impasto.methods.base import Method, MethodOptions, group_of

if TYPE_CHECKING:
    from torch import nn

    from impasto.families.base import Base


class Full(Method):
    """Trains the weights that are named, all of a network or some. What it leaves behind is a whole base, or what has
    changed in it."""

    class Options(MethodOptions):
        kind: Literal["full"] = "full"
        parts: list[str] = Field(
            ["unet"], min_length=1, description="What is trained: unet, text-encoder (all of them, if there are "
            "several), vae, or vae-decoder alone, which keeps latents as other programs know them (as in Stability's "
            "ft-MSE decoder); or less of it: attention, cross-attention, keys-values (Custom Diffusion), feed-forward, "
            "convolutions, all (of the blocks' layers), mid-block, norms, biases, a path such as down_blocks.1, or a "
            "regular expression on paths of parameters.")
        exclude: list[str] = Field([], description="What to leave out of it, in the same words.")
        weights: Literal["fp32", "bf16"] = Field(
            "fp32", description="Of what is trained. fp32: the computation rounds a copy (autocast), and no update is "
            "too small. bf16: 2 bytes a weight and 2 a gradient in place of 4 and 4, the update computed in fp32 and "
            "rounded stochastically, so that in the mean none is lost (Zamirai et al. 2020); needs train.precision = "
            "bf16.")
        text_encoder_learning_rate: float | None = Field(
            None, gt=0, description="Rate of the text encoders; default: learning_rate.")

        @pydantic.field_validator("weights", mode="before")
        @classmethod
        def _trainable(cls, value: Any) -> Any:
            if value in ("fp16", "float16", "half"):
                raise ValueError("fp16 weights cannot be trained: an update below a two-thousandth of a weight is "
                                 "lost, and their gradients, which fp16 scales, cannot be scaled back (torch: "
                                 "\"Attempting to unscale FP16 gradients\"): take fp32, or bf16")
            return value

    options: Options
    in_place = True

    def chosen(self, base: Base) -> dict[str, dict[str, nn.Parameter]]:
        """The parameters to train, by component and by their name in it; those named twice once.

        Raises `UserError` for a word without effect, or if nothing is left.
        """
        named = dict.fromkeys(path for word in self.options.parts for path in base.parts(word))
        left_out: set[str] = set()
        for word in self.options.exclude:
            if not (found := named.keys() & base.parts(word)):
                raise UserError(f"exclude: {word!r} names no weight that is trained", where="method full",
                                fix="add it to parts, or leave it out")
            left_out |= found
        chosen: dict[str, dict[str, nn.Parameter]] = {}
        for path in named:
            chosen.setdefault(path.partition(".")[0], {})
        for name, parameters in chosen.items():  # in the network's own order, whatever that of the words is
            parameters |= {inside: parameter for inside, parameter in base.components[name].named_parameters()
                           if (path := f"{name}.{inside}") in named and path not in left_out}
        chosen = {name: parameters for name, parameters in chosen.items() if parameters}
        if not chosen:
            raise UserError("no weight is left to train", where="method full", fix="look at exclude")
        return chosen

    def check(self, base: Base) -> None:
        import torch

        if held := next(iter(base.quantised.values()), ""):
            raise UserError(f"the base is held as {held}, of which no weight can train", where="method full",
                            fix="leave base.quantize out, or train a LoRA")
        chosen = self.chosen(base)
        if self.options.text_encoder_learning_rate is not None and not chosen.keys() & set(base.text_encoder_names):
            raise UserError("no text encoder is trained", where="method full: text_encoder_learning_rate",
                            fix='add "text-encoder" to parts, or leave the rate out')
        if self.options.weights == "bf16":
            if "vae" in chosen:
                raise UserError("the VAE computes in fp32 always: its weights cannot be bf16", where="method full: "
                                "weights", fix="use fp32")
            if any(p.dtype != torch.bfloat16 for parameters in chosen.values() for p in parameters.values()):
                raise UserError("bf16 weights need a computation in bf16", where="method full: weights",
                                fix="say train.precision=bf16, or keep weights in fp32")

    def prepare(self, base: Base, seed: int) -> list[dict[str, Any]]:
        """Let what is chosen train; one parameter group for each component."""
        from impasto.methods.selection import Selection

        self.check(base)
        rate, chosen = self.options.text_encoder_learning_rate, self.chosen(base)
        self._hold(base, chosen)
        self._modules: dict[str, nn.Module] = {}
        groups = []
        for name, parameters in chosen.items():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            network = base.components[name]
            whole = len(parameters) == len(list(network.parameters()))
            self._modules[name] = network.train() if whole else Selection(parameters)
            own = rate if name in base.text_encoder_names and rate is not None else self.options.learning_rate
            groups.append(group_of(self._modules[name], name, f"full {name}", own))
        return groups

    def _hold(self, base: Base, chosen: dict[str, dict[str, nn.Parameter]]) -> None:
        """The chosen weights in the precision that the recipe says."""
        import torch

        from impasto.deltas.layers import NORMS

        if self.options.weights == "bf16":
            return  # as `check` has seen
        # norms take their input in fp32 only if both their weights are: on a CPU autocast leaves them alone
        paths = [f"{name}.{inside}" for name, parameters in chosen.items() for inside in (
            *parameters, *(f"{path}.{leaf}" for path, module in base.components[name].named_modules()
                           if isinstance(module, NORMS) for leaf, _ in module.named_parameters()))]
        base.hold(paths, torch.float32)

    def modules(self) -> dict[str, nn.Module]:
        """What is trained of each component: the network itself where that is all of it."""
        return dict(self._modules)

    def trains(self, base: Base) -> frozenset[str]:
        return frozenset(self.chosen(base))

    def adapter(self) -> None:
        return None
