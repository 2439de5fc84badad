"""One training step of an adapter beside diffusers + peft, beside LyCORIS, and beside the floor.

    python -m benchmarks.step                                     LoRA on SD 1.5 at 256² and 512², fp32
    python -m benchmarks.step --sizes 256 --threads 1 --repeats 7
    python -m benchmarks.step --kinds loha lokr --layers linear convolutions --by ours peft lycoris --sizes 256
    python -m benchmarks.step --quick                             a small UNet: does the benchmark run?

The UNet is SD 1.5's own (860 million weights, drawn at random: speed does not depend on their values) as
diffusers builds it. A step is: predict, mean squared error, backward, AdamW. What it trains, each in turn:
  kinds       lora (rank 16), loha (rank 8), lokr (rank 8, factor -1), lokr whole (factor 6): see `wrapped`
  layers      attention      to_q, to_k, to_v, to_out.0 of self- and cross-attention: 128 layers
              feed-forward   those and the two of each feed-forward: 160
              linear         those, proj_in and proj_out: 192 (kohya's default set)
              convolutions   those and the 3x3 convolutions of ResNet blocks and samplers: 242
The *floor* is the plain frozen UNet forward and backward to its latents: no adapter, no optimizer. *Ours* is
as a base is loaded: `families.lean` and `deltas.attach`; `floor, lean` tells the two apart.

Time: all variants live in one process on the same weight tensors and are timed in turn, A B C A B C; a ratio
is the median over the rounds of the ratios within a round. With one thread, processor time is the better
clock on a machine with neighbours; both are printed. Memory: each variant in a fresh process; *allocated*
is the sum of the tensors at the peak of the second step, *RSS* the most resident memory there ever was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import MIB, Timing, interleave, paired, print_table
from benchmarks.wrapped import KINDS, LAYERS, WHO, wrap
from impasto.families.lean import lean
from impasto.training.counted import peak_allocated
from impasto.training.environment import peak_resident

SD15 = dict(sample_size=64, layers_per_block=2, block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=768, attention_head_dim=8)
SMALL = dict(sample_size=64, layers_per_block=1, block_out_channels=(32, 64, 128, 128),
             cross_attention_dim=64, attention_head_dim=4)


# --- the UNet ------------------------------------------------------------------------------------------
def build_unet(quick: bool, device: torch.device) -> nn.Module:
    """A frozen UNet with random weights of the right magnitudes."""
    unet = bare_unet(quick).to_empty(device=device)
    torch.manual_seed(0)
    for module in unet.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            bound = module.weight[0].numel() ** -0.5
            module.weight.data.uniform_(-bound, bound)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.reset_parameters()
    return unet


def bare_unet(quick: bool) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**(SMALL if quick else SD15)).eval().requires_grad_(False)


def twin(unet: nn.Module, quick: bool) -> nn.Module:
    """Another module tree on the same weight tensors."""
    other = bare_unet(quick)
    other.load_state_dict(unet.state_dict(), assign=True)
    return other.requires_grad_(False)


def inputs(size: int, unet: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Latents (1, 4, size/8, size/8), a time, text states (1, 77, C), and the noise to predict."""
    draw = torch.Generator().manual_seed(1)
    cells = size // 8
    width = unet.config.cross_attention_dim  # pyright: ignore[reportAttributeAccessIssue]
    return {"latents": torch.randn(1, 4, cells, cells, generator=draw).to(device),
            "time": torch.tensor([500], device=device),
            "text": torch.randn(1, 77, width, generator=draw).to(device),
            "noise": torch.randn(1, 4, cells, cells, generator=draw).to(device)}


def loss(unet: nn.Module, data: dict[str, Tensor], latents: Tensor) -> Tensor:
    return F.mse_loss(unet(latents, data["time"], data["text"]).sample, data["noise"])


# --- the variants: each takes a UNet and gives a step over inputs --------------------------------------
Step = Callable[[dict[str, Tensor]], None]


def floor(unet: nn.Module) -> Step:
    def step(data: dict[str, Tensor]) -> None:
        latents = data["latents"].clone().requires_grad_()
        torch.autograd.grad(loss(unet, data, latents), latents)

    return step


def training(unet: nn.Module, parameters: list[nn.Parameter]) -> Step:
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def step(data: dict[str, Tensor]) -> None:
        loss(unet, data, data["latents"]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def lean_floor(unet: nn.Module) -> Step:
    lean(unet)
    return floor(unet)


VARIANTS: dict[str, Callable[[nn.Module], Step]] = {"floor": floor, "floor, lean": lean_floor} | {
    f"{who} {kind}, {layers}": lambda unet, who=who, kind=kind, layers=layers: training(
        unet, wrap(unet, who, kind, layers))
    for layers in LAYERS for kind in KINDS for who in WHO
}


# --- measuring -----------------------------------------------------------------------------------------
def measure_time(size: int, options: argparse.Namespace, unet: nn.Module) -> dict[str, Timing]:
    device = torch.device(options.device)
    data = inputs(size, unet, device)
    steps = {}
    for name in options.variants:
        step = VARIANTS[name](twin(unet, options.quick))
        steps[name] = lambda step=step: step(data)
    return interleave(steps, options.repeats, device)


def measure_memory(name: str, size: int, options: argparse.Namespace) -> dict[str, int]:
    """Peak bytes of one variant, from a fresh process."""
    command = [sys.executable, "-m", "benchmarks.step", "--child", name, "--sizes", str(size),
               "--threads", str(options.threads), "--device", options.device]
    command += ["--quick"] if options.quick else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(options: argparse.Namespace) -> None:
    """The process of `measure_memory`: prints the peaks as one line of JSON."""
    device = torch.device(options.device)
    unet = build_unet(options.quick, device)
    data = inputs(options.sizes[0], unet, device)
    step = VARIANTS[options.child](unet)
    step(data), step(data)
    resident = peak_resident()  # before the profiler, whose own records of many small operations take hundreds of MiB
    print(json.dumps({"allocated": peak_allocated(lambda: step(data), device), "resident": resident}))


def report(size: int, times: dict[str, Timing], memory: dict[str, dict[str, int]],
           options: argparse.Namespace) -> None:
    rows, header = {name: [name] for name in options.variants}, ["variant"]
    if times:
        header += ["seconds", "ratio", "ratio, processor"]
        floor = times["floor"]
        for name, timing in times.items():
            rows[name] += [f"{statistics.median(timing.wall):.3f}", f"{paired(timing.wall, floor.wall):.3f}",
                           f"{paired(timing.processor, floor.processor):.3f}"]
    if memory:
        header += ["allocated MiB", "ratio, memory", "RSS MiB"]
        least = memory["floor"]["allocated"]
        for name, peaks in memory.items():
            rows[name] += [f"{peaks['allocated'] / MIB:.0f}", f"{peaks['allocated'] / least:.3f}",
                           f"{peaks['resident'] / MIB:.0f}"]
    print(f"\n{size}², {options.device}, fp32, {options.threads} thread(s), {options.repeats} rounds\n")
    print_table(header, list(rows.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="sides in pixels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="rounds counted, after one to warm up")
    parser.add_argument("--by", nargs="+", choices=WHO, default=["ours", "peft"], help="who makes the adapter")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["lora"])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=["attention", "linear"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME",
                        help="these instead of all combinations, as \"ours lora, linear\"; the floor always runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a small UNet")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--no-time", action="store_true", help="memory only, which a busy machine does not change")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        return child(options)
    chosen = options.variants or ["floor, lean", *(f"{who} {kind}, {layers}" for layers in options.layers
                                                   for kind in options.kinds for who in options.by)]
    options.variants = ["floor", *(name for name in chosen if name != "floor")]
    # Memory first, while this process holds no weights of its own.
    measured = [] if options.no_memory else options.variants
    memory = {size: {name: measure_memory(name, size, options) for name in measured} for size in options.sizes}
    unet = None if options.no_time else build_unet(options.quick, torch.device(options.device))
    for size in options.sizes:
        report(size, measure_time(size, options, unet) if unet else {}, memory[size], options)


if __name__ == "__main__":
    main()
