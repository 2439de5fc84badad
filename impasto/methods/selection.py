"""Some of a network's parameters as a module of their own: what a checkpoint of a run that trains only these holds."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


class Selection(nn.Module):
    """The very parameters that it is given, under the names that they have in their network.

    A tree of empty modules like the network's own, as far as there is something chosen in it: its state dict has the
    same names, loading one sets the network's weights, and each inner module holds what one layer trains.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for path, parameter in parameters.items():
            *inner, leaf = path.split(".")
            node: nn.Module = self
            for name in inner:
                if name not in node._modules:
                    node._modules[name] = nn.Module()  # `add_module` refuses names that modules have as attributes
                child = node._modules[name]
                assert child is not None
                node = child
            node._parameters[leaf] = parameter
