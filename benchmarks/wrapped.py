"""The same adapter on the same layers of a diffusers UNet by Impasto, by peft and by LyCORIS, for `benchmarks.step`.

Sizes are those of common practice: LoRA of rank 16, LoHa of rank 8 (LyCORIS' example), LoKr of rank 8 and factor -1
(LyCORIS' defaults, the smallest file), and LoKr of whole factors with factor 6 (LyCORIS' advice for a style).
alpha is the rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from impasto.deltas.attach import attach
from impasto.deltas.delta import Delta
from impasto.deltas.hadamard import Hadamard
from impasto.deltas.kronecker import Kronecker
from impasto.deltas.layers import shape_of, weight_of
from impasto.deltas.lowrank import LowRank
from impasto.families.lean import lean

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FEED_FORWARD = [*ATTENTION, "ff.net.0.proj", "ff.net.2"]
LINEAR = [*FEED_FORWARD, "proj_in", "proj_out"]
#: ends of layers' paths
LAYERS: dict[str, list[str]] = {
    "attention": ATTENTION,
    "feed-forward": FEED_FORWARD,
    "linear": LINEAR,
    "convolutions": [*LINEAR, "conv1", "conv2", "downsamplers.0.conv", "upsamplers.0.conv"],
}
LORA_RANK, RANK, WHOLE_FACTOR = 16, 8, 6
#: more than half of any layer's side: LoKr's factors are whole then
WHOLE = 100_000

KINDS: dict[str, Callable[[tuple[int, ...]], Delta]] = {
    "lora": lambda shape: LowRank(shape, LORA_RANK),
    "loha": lambda shape: Hadamard(shape, RANK),
    "lokr": lambda shape: Kronecker(shape, RANK),
    "lokr whole": lambda shape: Kronecker(shape, WHOLE, factor=WHOLE_FACTOR, full=True),
}


def targets(unet: nn.Module, layers: str) -> dict[str, nn.Module]:
    """The layers of a set, by path."""
    return {path: layer for path, layer in unet.named_modules()
            if any(path.endswith(f".{end}") for end in LAYERS[layers])}


def ours(unet: nn.Module, kind: str, layers: str) -> list[nn.Parameter]:
    """Attached as in training: the UNet is made lean, as a base is when it is loaded."""
    lean(unet)
    deltas: dict[str, Delta] = {}
    for path, layer in targets(unet, layers).items():
        deltas[path] = KINDS[kind](shape_of(layer)).to(weight_of(layer).device)
        deltas[path].initialise(torch.Generator().manual_seed(0))  # pyright: ignore[reportCallIssue]
    attach(unet, deltas)
    return [parameter for delta in deltas.values() for parameter in delta.parameters()]


def with_peft(unet: nn.Module, kind: str, layers: str) -> list[nn.Parameter]:
    from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model

    ends = LAYERS[layers]
    config = {
        "lora": lambda: LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=ends),
        "loha": lambda: LoHaConfig(r=RANK, alpha=RANK, target_modules=ends),
        "lokr": lambda: LoKrConfig(r=RANK, alpha=RANK, target_modules=ends, init_weights="lycoris"),
        "lokr whole": lambda: LoKrConfig(r=WHOLE, alpha=WHOLE, target_modules=ends, init_weights="lycoris",
                                         decompose_factor=WHOLE_FACTOR),
    }[kind]()
    inject_adapter_in_model(config, unet)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def with_lycoris(unet: nn.Module, kind: str, layers: str) -> list[nn.Parameter]:
    from lycoris import LycorisNetwork

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    ends = "|".join(end.replace(".", r"\.") for end in LAYERS[layers])
    LycorisNetwork.apply_preset({"enable_conv": True, "target_module": [], "module_algo_map": {}, "name_algo_map": {},
                                 "target_name": [rf".*\.({ends})$"]})
    rank = LORA_RANK if kind == "lora" else RANK
    # what `create_lycoris` makes, which knows presets by name only
    network = LycorisNetwork(
        unet, 1.0, lora_dim=rank, conv_lora_dim=rank, alpha=rank, conv_alpha=rank, warn_on_unmatched=False,
        network_module="locon" if kind == "lora" else kind.split()[0], decompose_both=False,
        full_matrix=kind == "lokr whole", factor=WHOLE_FACTOR if kind == "lokr whole" else -1)
    network.apply_to()
    assert len(network.loras) == len(targets(unet, layers))
    unet.lycoris = network  # pyright: ignore[reportAttributeAccessIssue]
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


WHO: dict[str, Callable[[nn.Module, str, str], list[nn.Parameter]]] = {
    "ours": ours, "peft": with_peft, "lycoris": with_lycoris,
}


def wrap(unet: nn.Module, who: str, kind: str, layers: str) -> list[nn.Parameter]:
    """What trains of an adapter on a UNet: of as many numbers whoever makes it, which is checked."""
    with torch.device("meta"):
        expected = [KINDS[kind](shape_of(layer)) for layer in targets(unet, layers).values()]
    parameters = WHO[who](unet, kind, layers)
    for what, got, want in (("factors", len(parameters), sum(len(list(delta.parameters())) for delta in expected)),
                            ("numbers", sum(p.numel() for p in parameters),
                             sum(p.numel() for delta in expected for p in delta.parameters()))):
        assert got == want, f"{who} {kind}, {layers}: {got} {what}, not {want}"
    return parameters
