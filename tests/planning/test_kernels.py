"""What a GPU would compute in the place of a CPU: which kernel, in which type, with how much for itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from impasto.planning.kernels import as_on, scratch
from impasto.planning.ledger import Ledger

aten = torch.ops.aten
FLASH, EFFICIENT = aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention


class Calls(TorchDispatchMode):
    """What was called, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.made = list[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made.append(func._overloadpacket)
        return func(*args, **(kwargs or {}))


@contextmanager
def on(device: str, half: bool = True) -> Iterator[None]:
    with FakeTensorMode(), as_on(device), torch.autocast("cpu", torch.bfloat16, enabled=half):
        yield


@pytest.mark.parametrize(("norm", "shape"), [
    (lambda x: F.layer_norm(x, (64,)), (2, 8, 64)), (lambda x: F.group_norm(x, 4), (2, 64, 8)),
    (lambda x: F.softmax(x, -1), (2, 64)), (lambda x: F.mse_loss(x, x), (2, 64)), (torch.exp, (2, 64))])
def test_autocast_computes_on_a_gpu_in_fp32_what_a_cpu_leaves_in_half(norm: Any, shape: tuple[int, ...]) -> None:
    """CUDA's list (torch's docs, "CUDA Ops that can autocast to float32"); what is not on it stays what it is."""
    with on("cuda"):
        x = torch.empty(shape, dtype=torch.bfloat16)
        assert norm(x).dtype == torch.float32 and F.silu(x).dtype == torch.bfloat16
    with on("cuda", half=False):
        assert norm(torch.empty(shape, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(("half", "mask", "width", "kernel"), [
    (True, False, 40, FLASH), (True, False, 256, FLASH), (True, False, 512, EFFICIENT), (True, True, 64, EFFICIENT),
    (False, False, 64, EFFICIENT)])
def test_attention_is_by_the_kernel_that_a_gpu_takes(half: bool, mask: bool, width: int, kernel: Any) -> None:
    """Flash attention has half precision, heads of up to 256 and no mask (torch's sdp_utils.cpp)."""
    with on("cuda", half), Calls() as calls:
        q, k, v = (torch.empty(2, 4, tokens, width, requires_grad=True) for tokens in (64, 77, 77))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.empty(64, 77) if mask else None)
        assert out.shape == (2, 4, 64, width) and out.dtype == (torch.bfloat16 if half else torch.float32)
    assert [made for made in calls.made if made in (FLASH, EFFICIENT)] == [kernel]
    with on("cpu", half), Calls() as calls:
        q = torch.empty(2, 4, 64, width, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q)
    assert not {FLASH, EFFICIENT} & set(calls.made)


def test_the_backward_of_flash_attention_adds_up_in_fp32() -> None:
    """Over tokens in blocks of 128 and channels in blocks of 32, with a sum for each token (flash_api.cpp)."""
    taken = list[int]()
    with on("cuda"), Ledger(1, lambda func, args: taken.append(scratch(func, args))):
        q = torch.empty(1, 2, 100, 40, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q).float().sum().backward()
    assert [count for count in taken if count] == [4 * 2 * 128 * (64 + 1)]
