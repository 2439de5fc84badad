"""How near the time of a step comes that is told from counted operations and bytes and a calibrated speed.

    python -m benchmarks.pace [--each 2] [--rounds 5]

Forward and backward of parts of Stable Diffusion 1.5's UNet with gradients of all weights, and of the miniature's, each
beside its forecast: the sum of both times of the roofline, as `impasto plan` has it, and the larger of the two.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import print_table
from impasto.families.load import load_base
from impasto.families.networks import random_init
from impasto.formats.configs import CONFIGS
from impasto.planning.forecast import Forecast
from impasto.planning.time import Speed, calibrate, seconds_per_step


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            flat = torch.utils._pytree.tree_leaves((args, kwargs, out))
            self.bytes += sum(each.numel() * each.element_size() for each in flat if isinstance(each, Tensor))
        return out


def counted(run: Callable[[], None]) -> Forecast:
    """What one run computes and moves."""
    with FlopCounterMode(display=False) as operations, Traffic() as traffic:
        run()
    return Forecast({}, "", 0, {"all": float(operations.get_total_flops())}, float(traffic.bytes))


def seconds(run: Callable[[], None], rounds: int) -> float:
    """The least time, after a run that warms up: others were disturbed."""
    found = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return min(found[1:])


def step(network: nn.Module, *inputs: Any, **more: Any) -> Callable[[], None]:
    """Forward and backward, with gradients of inputs and all weights."""
    network.requires_grad_(True)
    inputs = tuple(x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)

    def run() -> None:
        out = network(*inputs, **more)
        first = out[0] if isinstance(out, tuple) else out
        first.square().mean().backward()
        network.zero_grad(set_to_none=True)

    return run


def cases(large: bool = True) -> dict[str, Callable[[], None]]:
    """Parts of the UNets by name."""
    part = CONFIGS.get("sd1").parts["unet"]
    unet: Any = random_init("unet", part.classes[0], part.config)
    states, embedding = torch.randn(1, 77, 768), torch.randn(1, 1280)
    mini: Any = load_base("mini").denoiser
    context = torch.randn(2, 77, mini.config.cross_attention_dim)
    side = mini.config.sample_size
    found = {
        "down block 0, 64 x 64": step(unet.down_blocks[0], torch.randn(1, 320, 64, 64), embedding,
                                      encoder_hidden_states=states),
        "down block 1, 32 x 32": step(unet.down_blocks[1], torch.randn(1, 320, 32, 32), embedding,
                                      encoder_hidden_states=states),
        "mid block, 8 x 8": step(unet.mid_block, torch.randn(1, 1280, 8, 8), embedding, encoder_hidden_states=states),
        f"miniature, batch 2, {side} x {side}": step(
            mini, torch.randn(2, mini.config.in_channels, side, side), torch.tensor([10, 500]),
            encoder_hidden_states=context, return_dict=False),
    }
    if large:
        found["UNet, 32 x 32"] = step(unet, torch.randn(1, 4, 32, 32), torch.tensor([10]), encoder_hidden_states=states,
                                      return_dict=False)
    return found


def told(run: Callable[[], None], speed: Speed) -> tuple[float, float]:
    """The forecast of a run, and the larger of its two times."""
    forecast = counted(run)
    total = seconds_per_step(forecast, speed)
    assert total is not None
    return total, max(sum(forecast.flops.values()) / speed.flops, forecast.traffic / speed.bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=float, default=2.0, help="seconds for each operation of the calibration")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    speed = calibrate(torch.device("cpu"), "fp32", each=options.each)
    print(f"{speed.name}: {speed.flops / 1e9:.1f} GFLOPS, {speed.bandwidth / 1e9:.2f} GB/s\n")
    rows = []
    for name, run in cases().items():
        measured, (total, larger) = seconds(run, options.rounds), told(run, speed)
        rows.append([name, f"{measured:.3f}", f"{total:.3f}", f"{total / measured:.2f}", f"{larger / measured:.2f}"])
    print_table(["forward and backward of", "measured, s", "told, s", "ratio", "ratio of the larger"], rows)


if __name__ == "__main__":
    main()
