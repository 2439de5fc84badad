"""A denoiser's blocks: what is computed again in the backward, or waits elsewhere, one at a time.

Those of diffusers' networks that it can compute again by themselves: a UNet's ResNet blocks and transformer blocks, and
the blocks of a transformer.
"""

from __future__ import annotations

import math
import re
from typing import Any, cast

from torch import nn
from torch.utils.checkpoint import checkpoint

#: the lists of modules that they stand in
_LISTS = re.compile(r"(^|\.)(resnets|transformer_blocks)\.\d+$")


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """A denoiser's blocks by path, in the network's order."""
    return {path: module for path, module in network.named_modules() if _LISTS.search(path)}


def largest_first(network: nn.Module) -> list[nn.Module]:
    """A denoiser's blocks, those at the highest resolution first, which keep the most for the backward; those alike in
    the network's order."""
    levels = len(getattr(network, "down_blocks", ()))

    def level(path: str) -> int:
        side, _, rest = path.partition(".")
        if side == "down_blocks":
            return int(rest.partition(".")[0])
        if side == "up_blocks":
            return levels - 1 - int(rest.partition(".")[0])
        return levels  # the UNet's middle; or blocks that are all alike

    return [module for _, module in sorted(blocks_of(network).items(), key=lambda item: level(item[0]))]


def compute_again(network: nn.Module, share: float) -> list[nn.Module]:
    """Let a share of the blocks be computed again in the backward, those that keep the most first; which they are."""
    found = largest_first(network)
    chosen = found[:math.ceil(share * len(found))]
    known = set(chosen)

    def run(module: nn.Module, *args: Any) -> Any:
        return checkpoint(module, *args, use_reentrant=False) if module in known else module(*args)

    cast(Any, network).enable_gradient_checkpointing(run)
    return chosen
