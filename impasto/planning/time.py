"""How long a step takes: its operations over the speed of a device, and the bytes that it moves over its memory's.

A step is thousands of operations one after the other, of which each waits for the arithmetic or for the memory
(Williams et al. 2009, the roofline): products of matrices nearly always for the one, all others for the other. So the
two times are added up. What is not in it: starting each operation, which on a fast card with small batches can be most
of the time; making room for what it leaves; reading pictures, previews and saving. So a step takes rather longer: on
one CPU core beside busy neighbours, parts of SD 1.5's UNet took 0.8 to 2.3 times what was told (benchmarks/pace.py),
networks as small as the miniature up to 5 times. On a GPU nothing was measured.

How much of what a card can do on paper is reached is measured on this machine by `impasto doctor --calibrate`, at the
shapes of Stable Diffusion 1.5's UNet, and kept; of other cards it is assumed, and said so.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.files import cache_dir, write_json
from impasto.core.progress import SILENT, Reporter
from impasto.planning.cards import Card, card_of
from impasto.planning.forecast import Forecast
from impasto.training.environment import Precision

#: what of a card's tensor TFLOPS, and of its bandwidth, a training is taken to reach where nobody has measured it.
#: An assumption, not a measurement
ASSUMED = {"products": 0.4, "memory": 0.7}

#: seconds that each operation is measured for, at least three times
EACH = 2.0


@dataclass(frozen=True)
class Speed:
    """What a device reaches in a training."""

    name: str
    precision: str
    #: floating-point operations a second, in products
    flops: float
    #: bytes a second that operations other than products read and write
    bandwidth: float
    measured: bool

    @property
    def origin(self) -> str:
        """Where it is from, in words."""
        return "measured here" if self.measured else \
            f"assumed: {ASSUMED['products']:.0%} of the card's arithmetic and {ASSUMED['memory']:.0%} of its bandwidth"


def seconds_per_step(forecast: Forecast, where: Speed) -> float | None:
    """Seconds of one optimizer step; None where the forecast does not count operations."""
    if not forecast.flops:
        return None
    return sum(forecast.flops.values()) / where.flops + forecast.traffic / where.bandwidth


def speed_of(card: Card, precision: str) -> Speed | None:
    """What a card reaches where it was measured here, else what it is taken to; None for a size alone, and for a
    precision that it does not have."""
    for speed in kept():
        with contextlib.suppress(UserError):  # a CPU, or a card that is not in the table
            if speed.precision == precision and card_of(speed.name) == card:
                return speed
    if precision not in card.tflops or not card.bandwidth:
        return None
    return Speed(card.name, precision, ASSUMED["products"] * card.tflops[precision] * 1e12,
                 ASSUMED["memory"] * card.bandwidth * 1e9, measured=False)


def about(seconds: float) -> str:
    """A time as one says it: 0.8 s, 40 s, 12 min, 2 h 10 min, 3 d 4 h."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    for unit, smaller, least, ratio in (("d", "h", 86400, 3600), ("h", "min", 3600, 60)):
        if seconds >= least:
            large, small = divmod(round(seconds / ratio), least // ratio)
            return f"{large} {unit} {small} {smaller}" if small else f"{large} {unit}"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3570 else "1 h"


# --- measuring -----------------------------------------------------------------------------------------------


def name_of(device: torch.device) -> str:
    """What a device's speed is kept under: on a CPU, threads count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads" \
        if device.type == "cpu" else device.type


def calibrate(device: torch.device, precision: str = "auto", report: Reporter = SILENT, each: float = EACH) -> Speed:
    """Measure a device, in some forty seconds, with forward and backward of what a UNet is made of; keep it.

    Products count by their shares of SD 1.5's operations at 512 pixels, others by their bytes.
    """
    chosen = Precision.choose(precision, device)
    products, others = list(_products(device, chosen.dtype)), list(_others(device, chosen.dtype))
    with report.phase("measuring", len(products) + len(others), "operations") as advance:
        def timed(run: Callable[[], None]) -> float:
            seconds = _seconds(run, device, each)
            advance(1)
            return seconds

        # seconds for an operation of the mix: the sum over kinds of its share by that kind's own seconds
        pace = sum(share * timed(run) / flops for share, flops, run in products)
        rates = [size / timed(run) for size, run in others]
    speed = Speed(name_of(device), chosen.name, 1 / pace, statistics.harmonic_mean(rates), measured=True)
    _keep(speed)
    return speed


#: kind of product -> its share of the operations of SD 1.5's UNet at 64 x 64 latents (torch's FlopCounterMode: 0.803e12
#: in a forward)
SHARES = {"convolution": 0.55, "linear": 0.29, "attention": 0.16}
#: of each level where the UNet has attention: channels, side of the latents
LEVELS = ((320, 64), (640, 32), (1280, 16))


def _products(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[float, float, Callable[[], None]]]:
    """Share, operations of forward and backward, and the thing itself: convolutions and linear layers of each level,
    and the attention of the first, where nearly all of it is."""
    for channels, side in LEVELS:
        x = _leaf((1, channels, side, side), device, dtype)
        kernel = _leaf((channels, channels, 3, 3), device, dtype)
        yield SHARES["convolution"] / 3, 3 * 2 * 9 * channels**2 * side**2, _both(
            lambda x=x, w=kernel: F.conv2d(x, w, padding=1), x, kernel)
        tokens, weight = _leaf((1, side**2, channels), device, dtype), _leaf((4 * channels, channels), device, dtype)
        yield SHARES["linear"] / 3, 3 * 2 * 4 * channels**2 * side**2, _both(
            lambda x=tokens, w=weight: F.linear(x, w), tokens, weight)
    channels, side = LEVELS[0]
    q, k, v = (_leaf((1, 8, side**2, channels // 8), device, dtype) for _ in range(3))
    # two products forward; backward five, of which the first is computed again (Dao et al. 2022)
    yield SHARES["attention"], 7 * 2 * channels * side**4, _both(
        lambda: F.scaled_dot_product_attention(q, k, v), q, k, v)


def _others(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[float, Callable[[], None]]]:
    """Bytes read and written, forward and backward, of what waits for the memory."""
    channels, side = LEVELS[0]
    x = _leaf((1, channels, side, side), device, dtype)
    wide = _leaf((1, side**2, 8 * channels), device, dtype)
    size, large = x.numel() * x.element_size(), wide.numel() * wide.element_size()
    yield 5 * size, _both(lambda: F.group_norm(x, 32), x)  # x, out; out's gradient, x, x's gradient
    yield 5 * size, _both(lambda: F.silu(x), x)
    yield 5 * large, _both(lambda: F.gelu(wide), wide)
    long = torch.zeros(2**26 // x.element_size(), device=device, dtype=dtype)  # 64 MiB: more than caches hold

    def add() -> None:
        long.add_(1)

    yield 2 * long.numel() * long.element_size(), add


def _leaf(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor that wants a gradient; small numbers that are not zero."""
    return torch.full(shape, 0.01, device=device, dtype=dtype).requires_grad_()


def _both(forward: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], None]:
    """Forward, and backward to the leaves."""
    out = forward()
    gradient = torch.full_like(out, 0.01)

    def run() -> None:
        torch.autograd.grad(forward(), leaves, gradient)

    return run


def _seconds(run: Callable[[], None], device: torch.device, each: float) -> float:
    """The least of as many runs as fit into `each` seconds, after one that warms up: others were disturbed."""
    def once() -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter() - began

    once()
    found, began = [once() for _ in range(3)], time.perf_counter()
    while time.perf_counter() - began < each:
        found.append(once())
    return min(found)


# --- keeping -------------------------------------------------------------------------------------------------


def kept() -> list[Speed]:
    """All that was measured on this machine; nothing where the file is lost or damaged."""
    try:
        found = json.loads((cache_dir() / "speed.json").read_text(encoding="utf-8"))
        return [Speed(**one) for one in found]
    except (OSError, ValueError, TypeError):
        return []


def speed_here(device: torch.device, precision: str) -> Speed | None:
    """What a device of this machine reaches in a precision: as measured, else as a card of its name is taken to."""
    for speed in kept():
        if (speed.name, speed.precision) == (name_of(device), precision):
            return speed
    if device.type != "cuda":
        return None
    try:
        return speed_of(card_of(name_of(device)), precision)
    except UserError:
        return None


def _keep(speed: Speed) -> None:
    """Remember it in place of what was measured of the same before."""
    others = [one for one in kept() if (one.name, one.precision) != (speed.name, speed.precision)]
    write_json(cache_dir() / "speed.json", [asdict(one) for one in [*others, speed]])
