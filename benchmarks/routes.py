"""Which route to dW · x takes the least time, layer by layer, beside what the model of its cost chooses.

    python -m benchmarks.routes                                   LoHa of ranks 4, 8, 16 on SD 1.5's layers at 256²
    python -m benchmarks.routes --kinds lokr --size 512 --repeats 9

A row is one shape of layer in SD 1.5's UNet. Times are those of a training step of this one layer, forward and backward
to its input and to the factors, over that of the frozen layer, lean, as a base is loaded. The routes:
  factors   dW · x by thin factors, beside the layer
  beside    dW as a matrix, and its product beside the layer (of a LoHa)
  instead   W + dW as a matrix, in the place of the layer's own product
Processor time of one thread, the least of the repeats: a busy neighbour adds to time, and takes none away.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.common import print_table
from impasto.deltas import hadamard, kronecker
from impasto.deltas.attach import attach
from impasto.deltas.delta import Delta
from impasto.deltas.hadamard import Hadamard
from impasto.deltas.kronecker import Kronecker
from impasto.deltas.layers import shape_of
from impasto.families.lean import lean

#: (out, in) and how many times smaller than the picture its map is; 0: the 77 tokens of a text
LINEAR = [(320, 320, 8), (640, 640, 16), (1280, 1280, 32), (1280, 1280, 64), (2560, 320, 8), (5120, 640, 16),
          (10240, 1280, 32), (320, 1280, 8), (640, 2560, 16), (1280, 5120, 32), (320, 768, 0), (1280, 768, 0)]
KERNELS = [(320, 320, 8), (320, 960, 8), (640, 640, 16), (640, 1920, 16), (1280, 1280, 32), (1280, 2560, 32),
           (1280, 1280, 64), (1280, 2560, 64)]
#: what `by_factors` would have to say for a route to be taken
ROUTES: dict[str, Callable[..., bool]] = {
    "factors": lambda *_, **__: True,
    "beside": lambda *_, products=3, **__: products == 1,
    "instead": lambda *_, **__: False,
}


def layers(size: int) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, frozen layer and input of each shape."""
    for out, into, down in LINEAR:
        tokens = (size // down) ** 2 if down else 77
        yield f"linear {into} to {out}, {tokens}", nn.Linear(into, out), torch.randn(1, tokens, into)
    for out, into, down in KERNELS:
        side = size // down
        yield (f"3x3 {into} to {out}, {side * side}", nn.Conv2d(into, out, 3, padding=1),
               torch.randn(1, into, side, side))


def deltas(kind: str, ranks: list[int], shape: tuple[int, ...]) -> Iterator[tuple[str, Delta]]:
    if kind == "loha":
        yield from ((f"loha {rank}", Hadamard(shape, rank)) for rank in ranks)
    else:
        yield "lokr 8, factor -1", Kronecker(shape, 8)
        yield "lokr whole, factor 6", Kronecker(shape, 8, factor=6, full=True)


@contextmanager
def forced(route: str | None) -> Iterator[None]:
    """Every layer goes this way, meanwhile."""
    own = hadamard.by_factors, kronecker.by_factors
    if route is not None:
        hadamard.by_factors = kronecker.by_factors = ROUTES[route]
    try:
        yield
    finally:
        hadamard.by_factors, kronecker.by_factors = own


def least(net: nn.Module, x: Tensor, g: Tensor, repeats: int) -> float:
    """Seconds of processor time of forward and backward: the least of the repeats, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        net(x).backward(g)
        times.append(time.process_time() - start)
        net.zero_grad(set_to_none=True)
    return min(times[1:])


def row(name: str, kind: str, net: nn.Module, x: Tensor, delta: Delta, frozen: float, repeats: int) -> list[str]:
    g = torch.randn_like(net(x))
    took, chosen = {}, ""
    with attach(net, {"0": delta}):
        parameters = list(delta.parameters())
        for route in ROUTES:
            if route == "beside" and not isinstance(delta, Hadamard):
                continue
            with forced(route):
                took[route] = least(net, x, g, repeats)
            for parameter in parameters:
                parameter.grad = None
        chosen = choice(net[0], x, delta)  # pyright: ignore[reportIndexIssue]
    best = min(took, key=took.__getitem__)
    times = [f"{took[route] / frozen:.2f}" if route in took else "" for route in ROUTES]
    return [name, kind, f"{frozen * 1e3:.1f}", *times, best, chosen if chosen != best else "",
            f"{took[chosen] / took[best]:.2f}"]


def choice(layer: nn.Module, x: Tensor, delta: Delta) -> str:
    """The route that the delta takes by itself."""
    with torch.no_grad():
        if delta.instead(x, layer) is not None:
            return "instead"
    return "factors"  # beside is for what may not be summed: half precision, layers with something else on them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=["loha", "lokr"], default=["loha"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16], help="of LoHa")
    parser.add_argument("--size", type=int, default=256, help="side in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, layer, x in layers(options.size):
        net = nn.Sequential(layer).requires_grad_(False)
        lean(net)
        x.requires_grad_(not name.endswith(", 77"))  # nothing trains before the text
        g = torch.randn_like(net(x))
        frozen = frozen_time(net, x, g, options.repeats)
        for kind in options.kinds:
            for label, delta in deltas(kind, options.ranks, shape_of(layer)):
                delta.initialise(torch.Generator().manual_seed(0))  # pyright: ignore[reportCallIssue]
                rows.append(row(name, label, net, x, delta, frozen, options.repeats))
    print_table(["layer, tokens", "delta", "frozen, ms", *ROUTES, "best", "chosen instead", "chosen / best"], rows)


def frozen_time(net: nn.Module, x: Tensor, g: Tensor, repeats: int) -> float:
    """As `least`; of a layer on the text there is no backward."""
    if x.requires_grad:
        return least(net, x, g, repeats)
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        net(x)
        times.append(time.process_time() - start)
    return min(times[1:])


if __name__ == "__main__":
    main()
