"""Hypernetworks: what keys and values are made of goes through small residual networks, which are trained."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from impasto.core.errors import UserError
from impasto.methods.base import Method, MethodOptions, group_of, switched_off

if TYPE_CHECKING:
    from torch import nn

    from impasto.deltas.adapter import Adapter
    from impasto.deltas.hypernetwork import Hypernetwork as Hook
    from impasto.families.base import Base

#: names of `impasto.deltas.hypernetwork.ACTIVATIONS`, told without torch
Activation = Literal[
    "linear", "relu", "leakyrelu", "elu", "swish", "tanh", "sigmoid", "celu", "gelu", "hardshrink", "hardsigmoid",
    "hardswish", "hardtanh", "logsigmoid", "mish", "prelu", "relu6", "rrelu", "selu", "silu", "softplus", "softshrink",
    "softsign", "tanhshrink"]

Beginning = Literal["zero_last", "normal", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"]


class Hypernetwork(Method):
    """A1111's hypernetwork: x + f(x) in place of x before to_k and to_v, an f each for every width of a context."""

    class Options(MethodOptions):
        recommended: ClassVar[float | None] = 1e-5  # A1111's default

        kind: Literal["hypernetwork"] = "hypernetwork"
        widths: list[int] | None = Field(
            None, min_length=1, description="Widths of the contexts that are changed; default: all that the base has "
            "(SD 1.x: 768, the text's, and 320, 640 and 1280, self-attention's: A1111's default too).")
        structure: list[float] = Field(
            [1, 2, 1], description="Sizes of the layers as multiples of the width, the first and the last 1; each step "
            "is a linear layer (A1111's default).")
        activation: Activation = Field(
            "linear", description="Between linear layers, in A1111's names: swish is Hardswish there. linear is none "
            "(A1111's default). ComfyUI knows linear, relu, leakyrelu, elu, swish, tanh, sigmoid, softsign and mish.")
        activate_output: bool = Field(False, description="Whether it comes after the last layer too (A1111: no).")
        layer_norm: bool = Field(False, description="LayerNorm after each linear layer, the last included (A1111's "
                                 "default: no).")
        initialisation: Beginning = Field(
            "zero_last", description="How the networks begin. zero_last: the last layer at zero, so that training "
            "begins at the base itself. The others are A1111's, whose default is normal, of "
            "standard deviation 0.01: all of the base is disturbed from the first step on.")
        dropout: float = Field(0.0, ge=0, lt=1, description="Probability of leaving out each feature between linear "
                               "layers, in training (A1111: none, or 0.3).")
        last_layer_dropout: bool = Field(True, description="With dropout: also before the last layer, which in [1, 2, "
                                         "1] is the only place.")

    options: Options
    suffix = ".pt"
    formats = ("hypernetwork",)

    def choose(self, base: Base) -> list[int]:
        """The widths to train, rising. Raises `UserError` for one that the base does not have."""
        known = sorted({width for _, _, width in base.key_value_layers()})
        if not known:
            raise UserError(f"a base of the family {base.family} has no keys and values that a hypernetwork could "
                            "change", where="method hypernetwork", fix="train a LoRA")
        chosen = sorted(set(known if self.options.widths is None else self.options.widths))
        if strange := [width for width in chosen if width not in known]:
            raise UserError(f"no attention of this base reads a context of width {', '.join(map(str, strange))}",
                            where="method hypernetwork: widths", fix=f"it has {', '.join(map(str, known))}")
        return chosen

    def make(self, base: Base, widths: list[int], seed: int) -> Hook:
        """New networks of these widths. Raises `UserError` for options that do not go together."""
        import torch

        from impasto.core.rng import generator
        from impasto.deltas.hypernetwork import Hypernetwork as Hook
        from impasto.deltas.hypernetwork import dropout_of, initialise

        options = self.options
        with torch.device(base.device):
            hook = Hook(widths, options.structure, activation=options.activation, layer_norm=options.layer_norm,
                        activate_output=options.activate_output,
                        dropout=dropout_of(options.structure, options.dropout, last=options.last_layer_dropout))
        for width, name, network in hook.networks():
            initialise(network, options.initialisation, generator(seed, "init", f"hypernetwork.{width}.{name}"))
        return hook

    def prepare(self, base: Base, seed: int) -> list[dict[str, Any]]:
        """Let the layers of the chosen widths see what new networks make of their inputs; one parameter group."""
        from impasto.deltas.attach import attach_hooks

        self.family = base.family
        self.hook = self.make(base, self.choose(base), seed)
        self.attached = attach_hooks(base.components, [self.hook], base.key_value_layers())
        return [group_of(self.hook.pairs, "hypernetwork", "hypernetwork", self.options.learning_rate)]

    def modules(self) -> dict[str, nn.Module]:
        """The networks, as one module."""
        return {"hypernetwork": self.hook.pairs}

    def check(self, base: Base) -> None:
        self.make(base, self.choose(base)[:1], 0)

    def trains(self, base: Base) -> frozenset[str]:
        return frozenset({base.denoiser_name})

    def off(self) -> AbstractContextManager[None]:
        return switched_off(self.attached)

    def adapter(self) -> Adapter:
        from impasto.deltas.adapter import Adapter

        # A1111's word for it: XavierNormal
        beginning = "".join(word.capitalize() for word in self.options.initialisation.split("_"))
        return Adapter({}, {"ss_weight_initialization": beginning}, self.family, hooks=(self.hook.snapshot(),))
