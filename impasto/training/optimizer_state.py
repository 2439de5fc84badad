"""An optimizer's state without pickles: tensors and values that a checkpoint keeps, put back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from impasto.core.errors import UserError

#: what a parameter group holds that follows from the recipe and from the step
GIVEN = {"params", "paths", "name", "lr", "base_lr"}


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors, and the values that are no tensors.

    Names are "optimizer.{parameter}/{key}", with more parts where an entry is a dictionary (bitsandbytes), and
    "optimizer.group{i}/{key}" for what an optimizer counts in its parameter groups (Prodigy, schedule-free ones).
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}/{key}", inner)
        elif isinstance(value, Tensor):
            tensors[f"optimizer.{name}"] = value.clone()  # 8-bit states share their tables
        else:
            values[name] = value

    for index, entry in optimizer.state_dict()["state"].items():
        walk(str(index), entry)
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key not in GIVEN and not _same(value, optimizer.defaults.get(key, optimizer)):
                walk(f"group{index}/{key}", value)
    return tensors, values


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Put back what `pack_optimizer` took; the rest of the parameter groups stays as it was built."""
    state: dict[int, dict[str, Any]] = {}
    groups = optimizer.state_dict()["param_groups"]
    packed = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
    for name, value in {**packed, **values}.items():
        owner, *path, key = name.split("/")
        entry = groups[int(owner[5:])] if owner.startswith("group") else state.setdefault(int(owner), {})
        for part in path:
            entry = entry.setdefault(part, {})
        entry[key] = tuple(value) if isinstance(entry.get(key), tuple) else value  # JSON knows no tuples
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    _widen(optimizer, packed)
    if getattr(optimizer, "is_paged", False):
        _page(optimizer)


def _widen(optimizer: torch.optim.Optimizer, packed: dict[str, Tensor]) -> None:
    """Put back what torch has cast to the weights' type: the state of weights in bf16 is fp32."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, tensor in packed.items():
        owner, *path, key = name.split("/")
        if not owner.startswith("group"):
            entry: Any = optimizer.state[parameters[int(owner)]]
            for part in path:
                entry = entry.get(part, {})  # bitsandbytes packs its own under another name, and casts none of it
            if key in entry and entry[key].dtype != tensor.dtype:
                entry[key] = tensor.to(entry[key].device)


def _page(optimizer: Any) -> None:
    """Put bitsandbytes' paged states back into memory that GPU and computer share: loading moves them to the GPU."""
    for parameter, entry in optimizer.state.items():
        for key in entry.keys() & {"state1", "state2"}:
            if parameter.device.type == "cuda":
                buffer = optimizer.get_state_buffer(parameter, dtype=entry[key].dtype)
                torch.cuda.synchronize()
                entry[key] = buffer.copy_(entry[key])


def _same(value: Any, default: Any) -> bool:
    return value is default or not isinstance(value, Tensor) and type(value) is type(default) and value == default


def check_resume(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer], name: str, device: torch.device) -> None:
    """Raise `UserError` unless an optimizer that is not known here steps, packs and comes back bit for bit."""
    straight, broken = _trial(device), _trial(device)
    try:
        optimizer = build(straight)
        for step in range(4):
            _step(optimizer, straight, step)
        optimizer = build(broken)
        for step in range(2):
            _step(optimizer, broken, step)
        tensors, values = pack_optimizer(optimizer)
        optimizer = build(broken)
        unpack_optimizer(optimizer, tensors, json.loads(json.dumps(values)))
        for step in range(2, 4):
            _step(optimizer, broken, step)
    except UserError:
        raise
    except Exception as error:  # of a class that anybody may have written
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} does not go through a trial of four steps and a checkpoint ({reason})",
                        where="train.optimizer", fix="take another optimizer") from None
    if not all(torch.equal(a, b) for a, b in zip(straight, broken, strict=True)):
        raise UserError(f"{name} does not come back from a checkpoint bit for bit, and a run that was stopped would "
                        "not go on as if it had not been", where="train.optimizer", fix="take another optimizer")


def _trial(device: torch.device) -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(-1, 1, 96 * 64, device=device).view(96, 64)),  # 8-bit states begin at 4096
            nn.Parameter(torch.zeros(3, 2, 3, 3, device=device)), nn.Parameter(torch.zeros(7, device=device))]


def _step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], step: int) -> None:
    torch.manual_seed(step)  # as in a run, where draws are functions of the step
    for parameter in parameters:
        places = torch.arange(parameter.numel(), device=parameter.device, dtype=torch.float32)
        parameter.grad = torch.sin(places + 3 * step).view_as(parameter)
    optimizer.step()
