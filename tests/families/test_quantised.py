"""Weights in few bits: numbers against the papers' and bitsandbytes', layers against layers of the made weight."""

from __future__ import annotations

import math
from pathlib import Path

import bitsandbytes.functional
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from impasto.core.errors import UserError
from impasto.deltas.adapter import Adapter
from impasto.deltas.attach import attach
from impasto.deltas.dora import Dora
from impasto.deltas.hadamard import Hadamard
from impasto.deltas.kronecker import Kronecker
from impasto.deltas.layers import shape_of, weight_of
from impasto.deltas.lowrank import LowRank
from impasto.families import networks
from impasto.families.base import Base
from impasto.families.codes import BLOCK, CODES, NF4
from impasto.families.load import load_base
from impasto.families.quantised import quantise, quantised_layers
from impasto.formats.checkpoint import open_checkpoint
from tests.checkpoints import write_checkpoint

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.03


def through(kind: str, W: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    code = CODES[kind]
    return code.unpack(code.pack(W, dtype), tuple(W.shape), dtype)


# --- the numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
def test_int8_is_at_most_half_a_step_away(dtype: torch.dtype) -> None:
    W = weight(40, 24, 3, 3)
    made = through("int8", W, dtype).double()
    step = W.double().flatten(1).abs().amax(1) / 127
    rounding = torch.finfo(dtype).eps * W.double().abs().amax()  # of the step, and of the product
    assert made.shape == W.shape
    assert ((made - W.double()).abs().flatten(1) <= 0.5 * step[:, None] + rounding).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_fp8_has_three_bits_behind_the_first(dtype: torch.dtype) -> None:
    W = weight(40, 216)
    made = through("fp8", W, dtype).double()
    largest = W.double().abs().amax(1, keepdim=True)
    # half of 2^-3 of a number, or half of the smallest step, 2^-9 of 448 such
    bound = torch.maximum(2.0**-4 * W.double().abs(), 2.0**-10 * largest / 448) + torch.finfo(dtype).eps * largest
    assert ((made - W.double()).abs() <= bound).all() and made.isfinite().all()


def test_nf4s_numbers_are_quantiles_of_a_normal() -> None:
    """Seven below zero and eight above, evenly spaced from 1 - 0.9677083 on (QLoRA, equation 4 and its code)."""
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64))[:-1]
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64))[:-1]
    numbers = torch.cat([above, below, torch.zeros(1)]).sort().values
    torch.testing.assert_close(torch.tensor(NF4).double(), numbers / numbers.max(), rtol=0, atol=1e-6)


def test_nf4_is_bitsandbytes() -> None:
    """The codes, to the bit, and what they mean, up to how a block's size is written."""
    W = weight(96, 128)  # rows of whole blocks: of others its CPU kernel (0.50) reads something else than it wrote
    packed, state = bitsandbytes.functional.quantize_4bit(W, blocksize=BLOCK, compress_statistics=False,
                                                          quant_type="nf4")
    assert torch.equal(packed.flatten(), CODES["nf4"].pack(W, torch.float32)[0])
    theirs, ours = bitsandbytes.functional.dequantize_4bit(packed, state), through("nf4", W)
    # a size is at most half a step off, a step being a 127th of how far sizes are from their mean
    sizes = state.absmax.float()
    bound = (sizes - sizes.mean()).abs().max() / 127 / 2
    assert (theirs - ours).abs().max() <= bound * (1 + 1e-5)
    twice, state = bitsandbytes.functional.quantize_4bit(W, blocksize=BLOCK, quant_type="nf4")
    errors = [(made - W).norm() for made in (ours, bitsandbytes.functional.dequantize_4bit(twice, state))]
    assert errors[0] <= errors[1] * 1.001


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("shape", [(3, 5), (64, 1), (7, 3, 3, 3), (130, 130)])
def test_any_shape_and_zeros_come_back(kind: str, shape: tuple[int, ...]) -> None:
    W = weight(*shape)
    W[0] = 0
    made = through(kind, W)
    assert made.shape == shape and (made - W).norm() < 0.15 * W.norm()
    assert not made[0].any() and not through(kind, torch.zeros(shape)).any()


@pytest.mark.parametrize(("kind", "bits", "error"), [("int8", 8, 0.01), ("fp8", 8, 0.03), ("nf4", 4.127, 0.1)])
def test_bits_and_errors_are_what_is_said(kind: str, bits: float, error: float) -> None:
    W = weight(1280, 1280)
    parts = CODES[kind].pack(W, torch.bfloat16)
    held = 8 * sum(part.numel() * part.element_size() for part in parts) / W.numel()
    assert held == pytest.approx(bits, rel=0.002)
    assert (through(kind, W, torch.bfloat16).float() - W).norm() < error * W.norm()


# --- the layers --------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3)
        self.down_blocks = nn.ModuleList([nn.Linear(16, 24), nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)])


def layers(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A network, and the same held in few bits and its weights as they are then made."""
    torch.manual_seed(0)
    plain, held = (Blocks().to(dtype).requires_grad_(False) for _ in range(2))
    held.load_state_dict(plain.state_dict())
    quantise(held, kind)
    for name, layer in quantised_layers(held).items():
        plain.get_parameter(name).copy_(layer.weight)  # pyright: ignore
    return plain, held


INPUTS = {"0": (2, 5, 16), "1": (2, 8, 6, 6)}


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("place", INPUTS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_computes_with_the_weight_that_it_makes(kind: str, place: str, autocast: bool) -> None:
    plain, held = layers(kind)
    results = []
    for network in (plain, held):
        x = torch.randn(INPUTS[place], generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = network.get_submodule(f"down_blocks.{place}")(x)
        y.float().square().sum().backward()
        results.append((y.detach(), x.grad))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours is not None and theirs is not None and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_is_kept_for_the_backward_is_bits() -> None:
    _, held = layers("int8")
    kept = list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        held.down_blocks[0](torch.ones(1, 16, requires_grad=True))  # pyright: ignore
    assert {tensor.dtype for tensor in kept if tensor.ndim > 1} == {torch.int8, torch.float32}
    assert all(tensor.numel() <= 24 for tensor in kept if tensor.dtype == torch.float32)


def test_blocks_alone_are_held_so() -> None:
    _, held = layers("int8")
    assert set(quantised_layers(held)) == {"down_blocks.0.weight", "down_blocks.1.weight"}
    assert set(dict(held.named_parameters())) == {"conv_in.weight", "conv_in.bias", "down_blocks.0.bias"}
    assert shape_of(held.down_blocks[0]) == (24, 16)  # pyright: ignore


DELTAS = {"lora": lambda shape: LowRank(shape, 2), "loha": lambda shape: Hadamard(shape, 2),
          "lokr": lambda shape: Kronecker(shape, 2, factor=4)}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("place", INPUTS)
def test_deltas_stand_beside(delta: str, place: str, dora: bool) -> None:
    """Output and gradients, of the input and of every factor, as on a layer of the made weight."""
    results = []
    for network in layers("nf4"):
        layer = network.get_submodule(f"down_blocks.{place}")
        made = DELTAS[delta](shape_of(layer))
        for i, parameter in enumerate(made.parameters()):
            parameter.data = weight(*parameter.shape, seed=i) * 3
        if dora:
            made = Dora.of(made, weight_of(layer))
        attached = attach(network, {f"down_blocks.{place}": made})
        x = torch.randn(INPUTS[place], generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(parameter.grad for parameter in made.parameters())])
        attached.detach()
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_nothing_is_merged_into_them() -> None:
    _, held = layers("nf4")
    delta = LowRank.from_factors(torch.ones(24, 1), torch.ones(1, 16))
    before = held.down_blocks[0].weight  # pyright: ignore
    with pytest.raises(UserError, match="held as nf4, which would round most of the change away"):
        attach(held, Adapter({"down_blocks.0": (delta,)})).merge()
    assert torch.equal(held.down_blocks[0].weight, before)  # pyright: ignore


def test_they_can_be_traced() -> None:
    """On fake tensors: shapes and types alone."""
    with torch.device("meta"):
        network = Blocks().requires_grad_(False)
    quantise(network, "nf4")
    with FakeTensorMode():
        for layer in network.modules():
            for held in (layer._parameters, layer._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        held[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        x = torch.empty(2, 8, 6, 6, requires_grad=True)
        network.down_blocks[1](x).sum().backward()  # pyright: ignore
        assert x.grad is not None and x.grad.shape == x.shape


# --- bases -------------------------------------------------------------------------------------------------


def bytes_of(network: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "mini.safetensors")


def predicted(base: Base) -> Tensor:
    x = torch.randn(1, base.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return base.predict(x, torch.tensor([500]), base.condition(base.encode_text(["a cat"])))


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.03), ("fp8", 0.1), ("nf4", 0.4)])
def test_a_base_is_loaded_so(checkpoint: Path, kind: str, error: float) -> None:
    plain, held = load_base(checkpoint), load_base(checkpoint, quantize=kind, quantize_text=kind)
    assert held.origin() == plain.origin() and held.fingerprint() == plain.fingerprint()
    assert held.quantised == {"unet": kind, "text_encoder": kind}
    assert held.precision("unet") == f"torch.float32, {kind}" and held.precision("vae") == "torch.float32"
    assert held.targets("all") == plain.targets("all") and held.key_value_layers() == plain.key_value_layers()
    exact, near = predicted(plain), predicted(held)
    assert 0 < (near - exact).norm() < error * exact.norm()
    assert bytes_of(held.components["unet"]) < (0.45 if kind != "nf4" else 0.35) * bytes_of(plain.components["unet"])
    again = load_base(checkpoint, quantize=kind, quantize_text=kind)
    assert torch.equal(predicted(again), near)


def test_every_family_is_loaded_so(tmp_path: Path) -> None:
    for family in ("sdxl", "sd3"):
        folder = write_checkpoint(tmp_path / family, family, layout="diffusers")
        plain, held = load_base(folder), load_base(folder, quantize="int8", quantize_text="int8")
        assert set(held.quantised) == {held.denoiser_name, *held.text_encoder_names}
        for encoder in plain.text_encoder_names:
            assert bytes_of(held.components[encoder]) < bytes_of(plain.components[encoder])
        states = [base.encode_text(["a cat"]) for base in (plain, held)]
        for name, exact in states[0].items():
            assert 0 < (states[1][name] - exact).norm() < 0.05 * exact.norm(), (family, name)
        assert math.isfinite(bytes_of(held.components[held.denoiser_name]))


def test_a_tensor_that_is_missing_or_of_another_shape_is_told() -> None:
    config = {"in_channels": 4, "block_out_channels": [32], "layers_per_block": 1, "norm_num_groups": 8,
              "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "cross_attention_dim": 8}
    network = networks.build("UNet2DConditionModel", config)
    quantise(network, "int8")
    whole = dict(networks.random_init("unet", "UNet2DConditionModel", config).state_dict())
    lacking = {name: tensor for name, tensor in whole.items() if name != "down_blocks.0.resnets.0.conv1.weight"}
    with pytest.raises(UserError, match="'down_blocks.0.resnets.0.conv1.weight' is missing"):
        networks.fill(network, lacking.items())
    with pytest.raises(UserError, match="'down_blocks.0.resnets.0.conv1.weight' is 1×1, the network wants 32×32×3×3"):
        networks.fill(network, {**whole, "down_blocks.0.resnets.0.conv1.weight": torch.ones(1, 1)}.items())
    assert networks.fill(network, whole.items()) == []


@pytest.mark.parametrize("kind", CODES)
def test_a_whole_base_can_be_traced(checkpoint: Path, kind: str) -> None:
    """Built, filled and used on fake tensors, as large as real ones."""
    opened = open_checkpoint(checkpoint)
    with FakeTensorMode():
        given = [(name, torch.empty(shape, dtype=dtype)) for name, (shape, dtype) in opened.names("unet").items()]
        network = networks.build("UNet2DConditionModel", opened.configs["unet"])
        quantise(network, kind)
        networks.fill(network, given, dtype=torch.bfloat16)
        x = torch.empty(1, 4, 8, 8, dtype=torch.bfloat16, requires_grad=True)
        states = torch.empty(1, 77, 32, dtype=torch.bfloat16)
        network(x, torch.empty(1, dtype=torch.long), states, return_dict=False)[0].sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
    held = load_base(checkpoint, dtype=torch.bfloat16, quantize=kind)
    assert bytes_of(network) == bytes_of(held.components["unet"])
