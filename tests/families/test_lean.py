"""`lean` against the same network left plain."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from impasto.families.lean import lean, recomputed


def unet(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    options = dict(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=16,
                   attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                   up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    return UNet2DConditionModel(**{**options, **changes}).eval().requires_grad_(False)


@pytest.fixture
def networks() -> tuple[nn.Module, nn.Module]:
    """A plain one and its lean copy."""
    plain = unet()
    other = copy.deepcopy(plain)
    lean(other)
    return plain, other


def loss_and_gradients(network: nn.Module, latents: Tensor | None = None) -> list[Tensor]:
    torch.manual_seed(1)
    draws = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 16)
    latents = draws[0].requires_grad_()
    loss = network(latents, torch.tensor([3, 400]), draws[1]).sample.square().mean()
    wanted = [latents, *(p for p in network.parameters() if p.requires_grad)]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def saved_bytes(function: Callable[[], object], network: nn.Module) -> int:
    """Bytes of distinct storages, weights apart, that autograd keeps while function runs."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        alive.append(x)
        return x

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function()
    return sum(size for where, size in kept.items() if where not in weights)


def test_frozen_network_gives_the_same_loss_and_gradient(networks):
    plain, other = (loss_and_gradients(n) for n in networks)
    torch.testing.assert_close(other, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("pattern", ["to_q", "conv1", "norm2", "conv_shortcut", "downsamplers",
                                     "time_emb_proj", "ff.net"])
def test_layers_that_train_get_the_same_gradients(networks, pattern):
    for network in networks:
        trained = [p.requires_grad_() for name, p in network.named_parameters() if pattern in name]
        assert trained
    plain, other = (loss_and_gradients(n) for n in networks)
    torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-9)


def test_same_under_autocast(networks):
    with torch.autocast("cpu", torch.bfloat16):
        plain, other = (loss_and_gradients(n) for n in networks)
    assert other[1].dtype == torch.float32
    torch.testing.assert_close(other, plain)


def test_same_in_half_precision(networks):
    plain, other = (n.to(torch.bfloat16) for n in networks)

    def prediction(network: nn.Module) -> Tensor:
        torch.manual_seed(1)
        latents = torch.randn(1, 4, 16, 16, dtype=torch.bfloat16, requires_grad=True)
        text = torch.randn(1, 5, 16, dtype=torch.bfloat16)
        return torch.autograd.grad(network(latents, torch.tensor(3), text).sample.square().mean(), latents)[0]

    torch.testing.assert_close(prediction(other), prediction(plain))


def test_resnet_keeps_its_input_and_one_tensor_more():
    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=32, out_channels=32, temb_channels=8).eval().requires_grad_(False)
    x, time = torch.randn(1, 32, 16, 16, requires_grad=True), torch.randn(1, 8)
    plain = saved_bytes(lambda: block(x, time), block)
    lean(block)
    other = saved_bytes(lambda: block(x, time), block)
    assert 2 * x.nbytes <= other < 2.1 * x.nbytes
    assert plain > 5.9 * x.nbytes


def test_keeps_a_fifth_less_of_the_whole(networks):
    plain, other = (saved_bytes(lambda n=n: loss_and_gradients(n), n) for n in networks)
    assert other < 0.82 * plain, (other, plain)


def test_names_stay_and_layers_stay_layers(networks):
    plain, other = networks
    assert list(other.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in other.named_modules()] == [n for n, _ in plain.named_modules()]
    assert isinstance(other.conv_in, nn.Conv2d)
    assert isinstance(other.down_blocks[0].resnets[0], ResnetBlock2D)


def test_hooks_and_replaced_forwards_of_layers_run(networks):
    _, other = networks
    block = other.down_blocks[0].resnets[0]
    seen = []
    block.conv1.register_forward_hook(lambda layer, inputs, output: seen.append("hook"))
    original = block.conv2.forward
    block.conv2.forward = lambda x: seen.append("replaced") or original(x)
    loss_and_gradients(other)
    assert seen == ["hook", "replaced"]


def test_works_with_gradient_checkpointing(networks):
    plain, other = networks
    expected = loss_and_gradients(plain)
    other.enable_gradient_checkpointing()
    other.train()
    torch.testing.assert_close(loss_and_gradients(other), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("options", [dict(up=True), dict(down=True), dict(time_embedding_norm="scale_shift"),
                                     dict(temb_channels=None), dict(output_scale_factor=2.0)])
def test_other_resnet_blocks(options):
    torch.manual_seed(0)
    plain = ResnetBlock2D(**{"in_channels": 32, "out_channels": 64, "temb_channels": 8, **options})
    plain.eval().requires_grad_(False)
    other = copy.deepcopy(plain)
    lean(other)
    time = None if plain.time_emb_proj is None else torch.randn(2, 8)
    x = torch.randn(2, 32, 8, 8, requires_grad=True)

    def gradient(block: nn.Module) -> Tensor:
        return torch.autograd.grad(block(x, time).square().sum(), x)[0]

    torch.testing.assert_close(gradient(other), gradient(plain))


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("options", [dict(kernel_size=3, padding=1), dict(kernel_size=3, stride=2, padding=1),
                                     dict(kernel_size=3, stride=2), dict(kernel_size=3, bias=False),
                                     dict(kernel_size=(1, 3), padding=(0, 1), dilation=2),
                                     dict(kernel_size=1), dict(kernel_size=1, stride=2),
                                     dict(kernel_size=3, groups=2), dict(kernel_size=3, padding="same"),
                                     dict(kernel_size=3, padding=1, padding_mode="reflect")])
def test_convolution_against_the_plain_one(options, pictures):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, **options).requires_grad_(False)
    x = torch.randn(pictures, 4, 7, 9, requires_grad=True)

    def output_and_gradient() -> tuple[Tensor, Tensor]:
        y = layer(x)
        return y.detach(), torch.autograd.grad(y.sin().sum(), x)[0]

    plain = output_and_gradient()
    lean(layer)
    torch.testing.assert_close(output_and_gradient(), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [dict(stride=2, padding=1), dict(padding=2, dilation=2), dict(groups=2)])
def test_convolution_against_finite_differences(options):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, dtype=torch.float64, **options).requires_grad_(False)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64, requires_grad=True)
    plain = layer(x)
    lean(layer)
    assert torch.equal(layer(x), plain)
    assert torch.autograd.gradcheck(layer, (x,))


def test_recomputing_runs_once_forward_and_once_back():
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return x.sin()

    x = torch.randn(5, requires_grad=True)
    y = recomputed(function, x)
    assert calls == [False]
    gradient, = torch.autograd.grad(y.sum(), x)
    assert calls == [False, True]
    torch.testing.assert_close(gradient, x.detach().cos())


def test_asking_for_a_second_derivative_is_an_error():
    x = torch.randn(5, requires_grad=True)
    gradient, = torch.autograd.grad(recomputed(torch.sin, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
