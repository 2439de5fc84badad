"""What each mean that saves memory saves, and what it costs.

    python -m benchmarks.means                  all of it
    python -m benchmarks.means --only lora full kept bits sleep
    python -m benchmarks.means --quick          a small UNet: does the benchmark run?

lora    a LoRA (rank 16, attention) on SD 1.5's UNet, 860 million weights drawn at random, one picture of 256², fp32
full    all weights of a UNet of half the width (215 million), one picture of 128², AdamW
kept    what a LoRA's forward keeps for its backward, on fake tensors of real sizes, under autocast to bf16
bits    errors of weights, and of what the embedded base, whose weights are trained, predicts with them
sleep   resident memory of an SD 1.x file of real size before and after text encoder and VAE are let go

Each variant of the first two has a process of its own. *Peak*: the sum of the tensors at the peak of the second step.
*Time*: the processor's, the least of some steps, as a ratio to the first variant's.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.common import MIB, print_table
from benchmarks.step import SD15, SMALL, inputs
from impasto.core.rng import generator
from impasto.deltas.attach import attach
from impasto.deltas.layers import shape_of
from impasto.deltas.lowrank import LowRank
from impasto.families import networks
from impasto.families.blocks import blocks_of, compute_again
from impasto.families.codes import CODES
from impasto.families.load import load_base
from impasto.families.quantised import quantise, quantised_layers
from impasto.formats.configs import CONFIGS
from impasto.training.counted import peak_allocated
from impasto.training.fused import FusedBackward
from impasto.training.offload import Activations, Blocks
from impasto.training.rounding import Steps

CPU = torch.device("cpu")
LORA: dict[str, dict[str, Any]] = {
    "plain": {}, "checkpointing = 0.25": {"again": 0.25}, "checkpointing = 0.5": {"again": 0.5},
    "checkpointing = true": {"again": 1.0},
    "quantize = int8": {"bits": "int8"}, "quantize = fp8": {"bits": "fp8"}, "quantize = nf4": {"bits": "nf4"},
    "nf4, checkpointing": {"bits": "nf4", "again": 1.0},
    "activations away": {"activations": True}, "blocks away, checkpointing": {"blocks": True, "again": 1.0},
}
FULL: dict[str, dict[str, Any]] = {
    "fp32": {}, "fp32, fused_backward": {"fused": True}, "bf16 weights": {"dtype": torch.bfloat16},
    "bf16 weights, fused_backward": {"dtype": torch.bfloat16, "fused": True}}


def unet(config: dict[str, Any], bits: str = "") -> nn.Module:
    """With random weights of the right magnitudes; in few bits, never whole."""
    network = networks.build("UNet2DConditionModel", config)
    plain = {name: tuple(p.shape) for name, p in network.named_parameters()}
    if bits:
        quantise(network, bits)

    def weights() -> Any:
        for i, (name, shape) in enumerate(plain.items()):
            norm, bias = "norm" in name, name.endswith("bias")
            drawn = torch.rand(shape, generator=generator(i, "weights")).mul_(2).sub_(1)
            yield name, torch.full(shape, float(norm and not bias)) if norm or bias else drawn.mul_(
                drawn[0].numel() ** -0.5)

    networks.fill(network, weights())
    return network


def loss(network: nn.Module, data: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(network(data["latents"], data["time"], data["text"]).sample, data["noise"])


def lora_step(config: dict[str, Any], size: int, *, again: float = 0, bits: str = "", activations: bool = False,
              blocks: bool = False) -> tuple[Callable[[], None], dict[str, int]]:
    network, away = unet(config, bits), {"bytes": 0}
    deltas = {}
    for path, layer in network.named_modules():
        if path.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            deltas[path] = LowRank(shape_of(layer), 16)
            deltas[path].initialise(generator(0, path))
    attach(network, deltas)
    parameters = [parameter for delta in deltas.values() for parameter in delta.parameters()]
    if again:
        compute_again(network, again)

    def counted(tensor: Tensor, into: Tensor | None = None) -> Tensor:
        away["bytes"] += tensor.nbytes
        return tensor

    kept = Activations(lambda: [*network.parameters(), *parameters], send=counted)
    if blocks:
        Blocks(blocks_of(network).values(), CPU, send=counted)
    optimizer, data = torch.optim.AdamW(parameters, lr=1e-5, fused=True), inputs(size, network, CPU)

    def step() -> None:
        if activations:
            away["bytes"] = 0
            with kept.away():
                value = loss(network, data)
        else:
            value = loss(network, data)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, away


def full_step(config: dict[str, Any], size: int, *, dtype: torch.dtype = torch.float32, fused: bool = False
              ) -> tuple[Callable[[], None], dict[str, int]]:
    network = unet(config).to(dtype).requires_grad_()
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    steps, off = Steps(optimizer, {"unet": network}, 0, apart=fused), torch.amp.GradScaler("cpu", enabled=False)
    inside = FusedBackward(steps, parameters) if fused else None
    data = inputs(size, network, CPU)
    data = {name: value if name == "time" else value.to(dtype) for name, value in data.items()}
    at = [0]

    def step() -> None:
        if inside is not None:
            inside.begin(at[0])
        loss(network, data).backward()
        if inside is None:
            steps.take(at[0], off)
            optimizer.zero_grad(set_to_none=True)
        at[0] += 1

    return step, {"bytes": 0}


def child(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    config = SMALL if options.quick else SD15
    if options.kind == "full":
        config = config | {"block_out_channels": tuple(c // 2 for c in SD15["block_out_channels"])} \
            if not options.quick else config
        step, away = full_step(config, 128, **FULL[options.variant])
    else:
        step, away = lora_step(config, 64 if options.quick else 256, **LORA[options.variant])
    gc.collect()
    peak, times = peak_allocated(step, CPU), []
    for _ in range(options.repeats):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    print(json.dumps({"peak": peak, "seconds": min(times), "away": away["bytes"]}))


def beside(kind: str, options: argparse.Namespace) -> None:
    rows, first = [], None
    for variant in LORA if kind == "lora" else FULL:
        command = [sys.executable, "-m", "benchmarks.means", "--kind", kind, "--variant", variant, "--repeats",
                   str(options.repeats), *(["--quick"] if options.quick else [])]
        made = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(made.stdout.splitlines()[-1])
        first = first or found
        rows.append([variant, f"{found['peak'] / MIB:,.0f}", f"{found['seconds'] / first['seconds']:.2f}",
                     f"{found['away'] / MIB:,.0f}" if found["away"] else ""])
        print(rows[-1], file=sys.stderr)
    print()
    print_table([kind, "peak, MiB", "time", "away, MiB"], rows)


# --- what is kept ----------------------------------------------------------------------------------------
def kept_bytes(family: str, cells: int, share: float) -> int:
    """Bytes that one picture's forward keeps beside weights, where a share of the blocks is computed again."""
    name = "transformer" if family == "sd3" else "unet"
    part = CONFIGS.get(family).parts[name]
    half = {"dtype": torch.bfloat16}
    with FakeTensorMode():
        network = networks.build(part.classes[0], part.config)
        networks.fill(network, ((key, torch.empty(held[leaf].shape))
                                for key, (held, leaf) in networks.places(network).items()), **half)
        deltas = {path: LowRank(shape_of(layer), 16) for path, layer in network.named_modules()
                  if path.endswith(("to_q", "to_k", "to_v", "to_out.0"))}
        attach(network, deltas)
        if share:
            compute_again(network, share)
        weights = (*network.parameters(), *network.buffers(), *(p for delta in deltas.values()
                                                                for p in delta.parameters()))
        def note(tensor: Tensor) -> Tensor:
            seen.setdefault(id_of(tensor), tensor)
            return tensor

        stay, seen = {id_of(tensor) for tensor in weights}, dict[int, Tensor]()
        x = torch.empty(1, part.config["in_channels"], cells, cells, **half)
        text = torch.empty(1, 333 if family == "sd3" else 77, {"sd1": 768, "sdxl": 2048, "sd3": 4096}[family], **half)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), \
                torch.autocast("cpu", dtype=torch.bfloat16):
            if family == "sd3":
                network(x, text, torch.empty(1, 2048, **half), torch.empty(1))
            else:
                network(x, torch.empty(1), text, added_cond_kwargs={
                    "text_embeds": torch.empty(1, 1280, **half), "time_ids": torch.empty(1, 6, **half)})
        return sum(tensor.untyped_storage().nbytes() for place, tensor in seen.items() if place not in stay)


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def kept() -> None:
    shares = (0, 0.1, 0.25, 0.5, 0.75, 1)
    print()
    print_table(["MiB", *(str(share) for share in shares)], [
        [f"{family}, {8 * cells}²", *(f"{kept_bytes(family, cells, share) / MIB:,.0f}" for share in shares)]
        for family, cells in (("sd1", 64), ("sdxl", 128), ("sd3", 128))])


@torch.no_grad()
def bits() -> None:
    plain, rows = load_base("mini"), []
    x = torch.randn(8, plain.latent_channels, 8, 8, generator=generator(0, "x"))
    times = torch.linspace(0, 999, 8).round().long()

    def said(base: Any) -> Tensor:
        text = base.stack_text([base.encode_text(["a red star"])] * 8)
        return base.predict(x, times, base.condition(text))

    exact, normal = said(plain), torch.randn(1280, 1280, generator=generator(0, "w")).mul_(0.03)
    for kind, code in CODES.items():
        parts = code.pack(normal, torch.bfloat16)
        held = sum(part.nbytes for part in parts) / normal.numel()
        off = (code.unpack(parts, (1280, 1280), torch.bfloat16).float() - normal).norm() / normal.norm()
        base = load_base("mini", quantize=kind)
        layers = {name: (layer.weight - plain.parameter(f"unet.{name}")).square().sum()  # pyright: ignore
                  for name, layer in quantised_layers(base.denoiser).items()}
        total = sum(plain.parameter(f"unet.{name}").square().sum() for name in layers)
        trained = (sum(layers.values()) / total).sqrt()
        near = (said(base) - exact).norm() / exact.norm()
        rows.append([kind, f"{held:.3f}", f"{100 * off:.2f}", f"{100 * trained:.2f}", f"{100 * near:.2f}"])
    print()
    print_table(["bits", "bytes a weight", "1280² normal weights, %", "the miniature's weights, %",
                 "its predictions, %"], rows)


def sleep() -> None:
    from tests.checkpoints import write_large

    process = psutil.Process()

    def resident() -> int:
        gc.collect()
        return process.memory_full_info().uss

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base.safetensors"
        write_large(path, "sd1")
        before = resident()
        base = load_base(path)
        base.fingerprint()
        rows = [["all awake", f"{(resident() - before) / MIB:,.0f}", ""]]
        states = base.encode_text(["a cat"])["states"]
        base.sleep(["text_encoder", "vae"])
        rows.append(["text encoder and VAE let go", f"{(resident() - before) / MIB:,.0f}", ""])
        start = time.perf_counter()
        assert torch.equal(base.encode_text(["a cat"])["states"], states)
        rows.append(["the text encoder read again", f"{(resident() - before) / MIB:,.0f}",
                     f"{time.perf_counter() - start:.1f}"])
    print()
    print_table(["SD 1.x in fp32", "own memory, MiB", "s"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["lora", "full", "kept", "bits", "sleep"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--kind")
    parser.add_argument("--variant")
    options = parser.parse_args()
    if options.variant:
        child(options)
        return
    for kind in options.only:
        {"kept": kept, "bits": bits, "sleep": sleep}.get(kind, lambda kind=kind: beside(kind, options))()


if __name__ == "__main__":
    main()
