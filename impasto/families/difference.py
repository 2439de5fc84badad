"""What training in place has changed in a base, as an adapter: its trained weights less those of its file."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.dense import Dense
from impasto.deltas.layers import CONVOLUTIONS, NORMS
from impasto.families.base import Base

#: layers whose change a file can hold, as LyCORIS has it
LAYERS = (nn.Linear, *CONVOLUTIONS, *NORMS)


@torch.no_grad()
def difference(base: Base) -> Adapter:
    """The change of every weight and bias that trains, dense, in fp32, on the CPU.

    The file is read tensor by tensor: there is never a second copy of the base. Raises `UserError` as `layers_of`
    does, and if the file is no longer there.
    """
    layers, changes = layers_of(base), dict[str, dict[str, Tensor]]()
    for component in dict.fromkeys(path.partition(".")[0] for path in layers):
        for name, stored in base.stored(component):
            path, _, leaf = f"{component}.{name}".rpartition(".")
            if (now := layers.get(path, {}).get(leaf)) is not None:
                changes.setdefault(path, {})[leaf] = now.detach().cpu().float() - stored.float()
    return Adapter({path: (Dense.from_weight(changes[path].get("weight"), changes[path].get("bias")),)
                    for path in layers}, family=base.family)


def layers_of(base: Base) -> dict[str, dict[str, nn.Parameter]]:
    """The trained weights and biases by the path of their layer.

    Raises `UserError` for those that no file of differences can hold: of a VAE, of an embedding, of random origin.
    """
    trained = base.trained()
    if lost := {name for path in trained if (name := path.partition(".")[0]) not in base.checkpoints}:
        raise UserError("its weights come from no file that a change could be told from", where=", ".join(sorted(lost)),
                        fix="say output.format=diffusers")
    layers: dict[str, dict[str, nn.Parameter]] = {}
    for path, parameter in trained.items():
        layer, _, leaf = path.rpartition(".")
        layers.setdefault(layer, {})[leaf] = parameter
    able = (base.denoiser_name, *base.text_encoder_names)
    if other := [path for path in layers if path.partition(".")[0] not in able]:
        raise UserError(f"is trained, and files of differences hold {' and '.join(able)} alone", where=_told(other),
                        fix="say output.format=diffusers, which leaves a folder with the whole base")
    if other := [path for path in layers if not isinstance(base.layer(path), LAYERS)]:
        raise UserError("is trained, and files of differences hold linear layers, convolutions and norms alone",
                        where=_told(other), fix="exclude it (method.exclude), or say output.format=diffusers")
    return layers


def _told(paths: Iterable[str]) -> str:
    """The first few of them."""
    shown = list(paths)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
