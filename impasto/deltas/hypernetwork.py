"""Hypernetworks: small residual networks on what keys and values are made of.

As modules/hypernetworks/hypernetwork.py of github.com/AUTOMATIC1111/stable-diffusion-webui has them: for each width of
a context a pair of networks f, x becomes x + strength · f(x), and f is, for each step of `structure`, a linear layer,
an activation, a normalisation and dropout. `initialise` knows one way of beginning more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import init

from impasto.core.errors import UserError, nearest
from impasto.deltas.hook import InputHook

#: A1111's names. Those of torch that it lists too and that do not work on a context are left out: glu, threshold and
#: multiheadattention want arguments, softmax and its kin mix the pictures of a batch there.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "linear": nn.Identity, "relu": nn.ReLU, "leakyrelu": nn.LeakyReLU, "elu": nn.ELU, "swish": nn.Hardswish,
    "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "celu": nn.CELU, "gelu": nn.GELU, "hardshrink": nn.Hardshrink,
    "hardsigmoid": nn.Hardsigmoid, "hardswish": nn.Hardswish, "hardtanh": nn.Hardtanh, "logsigmoid": nn.LogSigmoid,
    "mish": nn.Mish, "prelu": nn.PReLU, "relu6": nn.ReLU6, "rrelu": nn.RReLU, "selu": nn.SELU, "silu": nn.SiLU,
    "softplus": nn.Softplus, "softshrink": nn.Softshrink, "softsign": nn.Softsign, "tanhshrink": nn.Tanhshrink,
}


class Hypernetwork(InputHook):
    """A pair of networks for each of some widths.

    `structure` are multiples of the width: [1, 2, 1] is one hidden layer of twice the width. The activation comes
    after each linear layer but the last (with `activate_output` after that too), the normalisation after each, dropout
    of probability `dropout[i]` after linear layer i, counted from 1 (see `dropout_of`; none by default).
    """

    kind: ClassVar[str] = "hypernetwork"

    def __init__(self, widths: Sequence[int], structure: Sequence[float] = (1, 2, 1), *, activation: str = "linear",
                 layer_norm: bool = False, activate_output: bool = False, dropout: Sequence[float] | None = None,
                 strength: float = 1.0) -> None:
        """With torch's own initial values, in fp32; see `initialise`. Raises `UserError` for what cannot be."""
        check_structure(structure)
        if activation not in ACTIVATIONS:
            raise UserError(f"a hypernetwork has no activation {activation!r}", where="activation",
                            fix=nearest(activation, ACTIVATIONS))
        super().__init__()
        self.structure, self.activation = tuple(structure), activation
        self.layer_norm, self.activate_output, self.strength = layer_norm, activate_output, float(strength)
        self.dropout = tuple(dropout) if dropout is not None else (0.0,) * len(structure)
        assert len(self.dropout) == len(structure) and not self.dropout[-1]
        self.pairs = nn.ModuleDict({str(width): nn.ModuleDict({"k": self._network(width), "v": self._network(width)})
                                    for width in sorted(widths)})

    def _network(self, width: int) -> nn.Sequential:
        """f, with A1111's order and count of modules."""
        sizes = [int(width * multiple) for multiple in self.structure]
        if min(sizes) < 1:
            raise UserError(f"{list(self.structure)} leaves a layer of a context of {width} features without any",
                            where="structure", fix="take larger multiples")
        modules: list[nn.Module] = []
        for i, (before, after) in enumerate(zip(sizes[:-1], sizes[1:], strict=True), 1):
            modules.append(nn.Linear(before, after))
            if self.activation != "linear" and (i < len(sizes) - 1 or self.activate_output):
                modules.append(ACTIVATIONS[self.activation]())
            if self.layer_norm:
                modules.append(nn.LayerNorm(after))
            if self.dropout[i]:
                modules.append(nn.Dropout(self.dropout[i]))
        return nn.Sequential(*modules)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(int(width) for width in self.pairs)

    def networks(self) -> Iterator[tuple[int, str, nn.Sequential]]:
        """Width, "k" or "v", and f of each."""
        for width, pair in self.pairs.items():
            assert isinstance(pair, nn.ModuleDict)
            for name, network in pair.items():
                assert isinstance(network, nn.Sequential)
                yield int(width), name, network

    def keys(self, context: Tensor) -> Tensor:
        return self._changed("k", context)

    def values(self, context: Tensor) -> Tensor:
        return self._changed("v", context)

    def _changed(self, name: str, context: Tensor) -> Tensor:
        """x + strength · f(x), in the context's type; f in that of its weights, or as autocast has it."""
        if self.strength == 0:
            return context
        pair = self.pairs[str(context.shape[-1])]
        assert isinstance(pair, nn.ModuleDict)
        change = pair[name](context.to(next(pair.parameters()).dtype))
        return torch.add(context, change.to(context.dtype), alpha=self.strength)

    def scaled(self, strength: float) -> Self:
        other = copy.copy(self)  # the modules are the same ones
        other.strength = self.strength * strength
        return other

    def extra_repr(self) -> str:
        return f"{self.widths}, structure={self.structure}, {self.activation}, strength={self.strength:g}"


def check_structure(structure: Sequence[float]) -> None:
    """Raise a `UserError` for multiples of which no network can be made that gives back what it takes."""
    sound = all(0 < multiple <= 1024 for multiple in structure)
    if len(structure) < 2 or not sound or structure[0] != 1 or structure[-1] != 1:
        raise UserError(f"a hypernetwork cannot have the structure {list(structure)}", where="structure",
                        fix="multiples of the width, the first and the last of them 1, such as [1, 2, 1]")


def dropout_of(structure: Sequence[float], probability: float, *, last: bool = True) -> tuple[float, ...]:
    """A1111's `dropout_structure`: dropout before each linear layer but the first; before the last one if `last`.

    The entry after the last layer is 0 always.
    """
    inner = [probability] * max(len(structure) - 2, 0)
    if inner and not last:
        inner[-1] = 0.0
    return (0.0, *inner, 0.0)


# --- how they begin ----------------------------------------------------------------------------------------


@torch.no_grad()
def initialise(network: nn.Sequential, how: str, generator: torch.Generator) -> None:
    """Set the initial values of one network f, drawn from `generator` (on the CPU).

    normal, xavier_uniform, xavier_normal, kaiming_uniform, kaiming_normal: A1111's, which draws the gains of
    normalisations as well, from N(0, 0.01²). zero_last: hidden layers as xavier_normal, normalisations as torch has
    them, and the last layer zero, or the last normalisation where there is one: f is 0, and training begins at the
    base itself (as LoRA's does, and ControlNet's zero convolutions, Zhang et al. 2023, section 3.1). Raises
    `UserError` where the last activation makes that impossible.
    """
    weighted = [module for module in network if isinstance(module, (nn.Linear, nn.LayerNorm))]
    slope = "leaky_relu" if any(isinstance(module, nn.LeakyReLU) for module in network) else "relu"
    for module in weighted:
        draw = torch.empty(module.weight.shape)
        if isinstance(module, nn.LayerNorm):
            init.ones_(draw) if how == "zero_last" else init.normal_(draw, std=0.01, generator=generator)
        else:
            match how:
                case "normal":
                    init.normal_(draw, std=0.01, generator=generator)
                case "xavier_uniform":
                    init.xavier_uniform_(draw, generator=generator)
                case "xavier_normal" | "zero_last":
                    init.xavier_normal_(draw, generator=generator)
                case "kaiming_uniform":
                    init.kaiming_uniform_(draw, nonlinearity=slope, generator=generator)
                case "kaiming_normal":
                    init.kaiming_normal_(draw, nonlinearity=slope, generator=generator)
                case _:
                    raise AssertionError(how)
        module.weight.copy_(draw)
        init.zeros_(module.bias)
    if how == "zero_last":
        modules = list(network)
        _check_zero(modules[modules.index(weighted[-1]) + 1:])
        init.zeros_(weighted[-1].weight)


def _check_zero(rest: Sequence[nn.Module]) -> None:
    """That what follows the last layer takes zero to zero, and lets a gradient through there: tried on new ones of its
    kind, on the CPU, whatever device it is on."""
    with torch.enable_grad(), torch.device("cpu"):
        zero = torch.zeros(1, requires_grad=True)
        out = nn.Sequential(*(type(module)() for module in rest)).eval()(zero)
        gradient, = torch.autograd.grad(out.sum(), zero)
    if not ((out == 0) & (gradient != 0)).all():  # one question, which a fake tensor's yes answers
        name = type(rest[0]).__name__.lower()
        raise UserError(f"zero_last cannot begin under a last activation {name}: it does not take zero to zero, or "
                        "passes no gradient there", where="initialisation",
                        fix="leave activate_output out, set layer_norm, or take another initialisation")
