"""Random adapters of every kind of change, on the small networks of `adapter_cases`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from impasto.deltas.adapter import Adapter
from impasto.deltas.attach import attach
from impasto.deltas.delta import Delta
from impasto.deltas.dense import Dense
from impasto.deltas.dora import Dora
from impasto.deltas.hadamard import Hadamard
from impasto.deltas.kronecker import Kronecker
from impasto.deltas.layers import shape_of
from impasto.deltas.lowrank import LowRank
from tests.formats.adapter_cases import TEXT_LAYERS, UNET_LAYERS, mini_text_encoder, mini_unet, submodule

NORMS = ("down_blocks.0.resnets.0.norm1", "down_blocks.0.attentions.0.norm", "conv_norm_out",
         "mid_block.attentions.0.transformer_blocks.0.norm2")

Maker = Callable[[nn.Module], Delta]


def filled(delta: Delta, draw: torch.Generator) -> Delta:
    """The delta with all of its factors drawn, frozen: products of size about 0.1."""
    with torch.no_grad():
        for parameter in delta.parameters():
            fan = max(parameter[0].numel() if parameter.ndim > 1 else 1, 1)
            parameter.copy_(torch.randn(parameter.shape, generator=draw) / math.sqrt(fan))
    return delta.requires_grad_(False)


def dora(axis: str) -> Maker:
    """A magnitude that is not the norm of anything."""
    def make(layer: nn.Module) -> Delta:
        shape = shape_of(layer)
        ones = (1,) * (len(shape) - 2)
        size = (shape[0], 1, *ones) if axis == "out" else (1, shape[1], *ones)
        return Dora(LowRank(shape, 2, 3.0), torch.ones(size))
    return make


#: alpha is no power of two; ranks are small enough that LoKr has factors to split
MAKERS: dict[str, Maker] = {
    "lora": lambda layer: LowRank(shape_of(layer), 3, 2.0),
    "lora-tucker": lambda layer: LowRank(shape_of(layer), 3, 2.0, tucker=_wide(layer)),
    "loha": lambda layer: Hadamard(shape_of(layer), 2, 3.0),
    "loha-tucker": lambda layer: Hadamard(shape_of(layer), 2, 3.0, tucker=_wide(layer)),
    "lokr": lambda layer: Kronecker(shape_of(layer), 1, 3.0),
    "lokr-both": lambda layer: Kronecker(shape_of(layer), 1, 3.0, decompose_both=True),
    "lokr-full": lambda layer: Kronecker(shape_of(layer), 9, 3.0, full=True),
    "lokr-tucker": lambda layer: Kronecker(shape_of(layer), 1, 3.0, tucker=True),
    "dense": lambda layer: Dense(shape_of(layer), bias=layer.bias is not None),
    "dora": dora("out"),
    "dora-in": dora("in"),
    "dora-loha": lambda layer: Dora(Hadamard(shape_of(layer), 2, 3.0),
                                    torch.ones(shape_of(layer)[0], *(1,) * (len(shape_of(layer)) - 1))),
    "dora-lokr": lambda layer: Dora(Kronecker(shape_of(layer), 1, 3.0),
                                    torch.ones(shape_of(layer)[0], *(1,) * (len(shape_of(layer)) - 1))),
}


def _in_turn(number: int, layer: nn.Module) -> str:
    """Tucker cores where there are kernels, another kind elsewhere."""
    kinds = [kind for kind in MAKERS if kind.endswith("-tucker") == (isinstance(layer, nn.Conv2d) and _wide(layer))]
    return kinds[number % len(kinds)]


def _wide(layer: nn.Module) -> bool:
    shape = shape_of(layer)
    return math.prod(shape[2:]) > 1


def networks() -> dict[str, nn.Module]:
    return {"unet": mini_unet(), "text_encoder": mini_text_encoder()}


def adapter_of_kind(kind: str, *, text: bool = True, norms: bool = False) -> Adapter:
    """One kind everywhere, or with "mixed" each in turn; `norms`: changes of norms beside them."""
    draw = torch.Generator().manual_seed(1)
    modules = networks()
    paths = [("unet", path) for path in UNET_LAYERS]
    paths += [("text_encoder", path) for path in TEXT_LAYERS] if text else []
    paths += [("unet", path) for path in NORMS] if norms else []
    deltas: dict[str, tuple[Delta, ...]] = {}
    for number, (component, path) in enumerate(paths):
        layer = submodule(modules[component], path)
        name = kind if kind != "mixed" else _in_turn(number, layer)
        name = "dense" if path in NORMS else name
        delta = filled(MAKERS[name](layer), draw)
        deltas[f"{component}.{path}"] = (delta,)
    return Adapter(deltas=deltas, metadata={"ss_seed": "7"}, family="sd1", base={"unet": "ab12"})


@torch.no_grad()
def weights(adapter: Adapter) -> dict[str, Tensor]:
    """What the adapter changes each layer of the small networks by, weights and biases, in fp64."""
    modules = networks()
    found = {}
    for path, terms in adapter.deltas.items():
        component, _, inside = path.partition(".")
        layer = submodule(modules[component], inside)
        W = layer.weight.double()
        found[path] = sum((term.weight(W).double().reshape(W.shape) for term in terms if term.shape),
                          start=torch.zeros_like(W))
        for term in terms:
            if (bias := term.bias()) is not None and bias.any():
                found[path + " bias"] = bias.double()
    return found


@torch.no_grad()
def output_with(adapter: Adapter, component: str, output: Callable[[nn.Module], Tensor]) -> Tensor:
    """What a network puts out with the adapter on it."""
    module = networks()[component]
    own = {(layer if component == "unet" or hasattr(module, "text_model") else layer.replace("text_model.", "")): terms
           for layer, terms in adapter.deltas.items() if layer.startswith(component + ".")}
    with attach({component: module}, own):
        return output(module)
