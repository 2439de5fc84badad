"""How a GPU would compute what is traced on fake tensors of the CPU: other kernels, other casts, workspaces.

Fake tensors of a device that is not there end in an abort at the first backward, so that a trace is always of the
CPU's. Where a GPU keeps or takes something else, this says so: the kernels of attention are called by their names, what
autocast computes in fp32 is CUDA's list, and what a kernel takes for itself is a formula from its source.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from impasto.families import lean

aten = torch.ops.aten
MIB = 2**20

#: the CUDA caching allocator's smallest step (kMinBlockSize, c10/core/AllocatorConfig.h)
ROUND_TO = 512
#: cuBLAS takes ":4096:2:16:8" KiB for each handle, and threads have handles of their own: the forward's and the
#: backward's (aten/src/ATen/cuda/CublasHandlePool.cpp; 32 MiB each on Hopper); cuBLASLt 1 MiB for each
WORKSPACES = 2 * (2 * 4096 + 8 * 16) * 1024 + 2 * MIB
#: what CUDA itself takes of a card: kernels, stacks, page tables. About 300 MB since CUDA 11.7, by card
#: (github.com/pytorch/pytorch/issues/107667)
CONTEXT = 300 * 10**6

#: what CUDA's autocast computes in fp32, as far as networks here use it (AT_FORALL_FP32, AT_FORALL_FP32_SET_OPT_DTYPE
#: and norm in ATen/autocast_mode.h); the CPU's leaves these in half precision
IN_FP32 = frozenset({
    F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm, F.rms_norm, torch.rms_norm,
    F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax,
    F.interpolate, F.softplus, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.cosine_similarity,
    F.binary_cross_entropy_with_logits, F.nll_loss,
    torch.exp, Tensor.exp, torch.log, Tensor.log, torch.rsqrt, Tensor.rsqrt, torch.reciprocal, Tensor.reciprocal,
    torch.pow, Tensor.pow, Tensor.__pow__, torch.cumsum, Tensor.cumsum, torch.cumprod, Tensor.cumprod,
    torch.prod, Tensor.prod, torch.sum, Tensor.sum, torch.norm, Tensor.norm, torch.linalg.vector_norm,
    torch.linalg.norm, torch.linalg.matrix_norm, torch.logsumexp, Tensor.logsumexp,
})

#: heads that flash attention takes at most, elements
FLASH_HEAD = 256


class AsOnCuda(TorchFunctionMode):
    """Calls what a GPU would call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in IN_FP32 and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """By the kernel that a GPU would take: flash attention for half precision without a mask, else the efficient one
    (Dao 2023; Rabe and Staats 2021, xFormers). Shapes (B, heads, tokens, channels of a head)."""
    assert not enable_gqa
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (one.to(dtype) if one.is_floating_point() else one for one in (query, key, value))
    width = query.shape[-1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    if query.dtype != torch.float32 and attn_mask is None and width <= FLASH_HEAD:
        if width % 8:
            query, key, value = (F.pad(one, (0, 8 - width % 8)) for one in (query, key, value))
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return out[..., :width]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -math.inf)
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:2], query.shape[2], key.shape[2])
    keeps = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, keeps, dropout_p, is_causal,
                                                        scale=scale)[0]


def scratch(func: Any, args: Any) -> int:
    """Bytes that a GPU's kernel takes for itself while it runs.

    The backward of flash attention adds up the queries' gradient in fp32, over tokens in blocks of 128 and channels in
    blocks of 32, and keeps a sum for each token (flash_api.cpp, mha_bwd); that of efficient attention the latter.
    """
    if func is aten._scaled_dot_product_flash_attention_backward.default:
        batch, heads, tokens, width = args[1].shape
        tokens, width = _up(tokens, 128), _up(width, 32 if width <= 128 else 64)
        return 4 * batch * heads * tokens * (width + 1)
    if func is aten._scaled_dot_product_efficient_attention_backward.default:
        batch, heads, tokens, _ = args[1].shape
        return 4 * batch * heads * _up(tokens, 32)
    return 0


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


@contextmanager
def as_on(device: str) -> Iterator[None]:
    """A block in which the CPU's fake tensors are computed with as on a device, "cuda" or "cpu"."""
    with ExitStack() as stack:
        if device != "cpu":
            stack.enter_context(AsOnCuda())
            # a shortcut for one picture on a CPU
            stack.enter_context(mock.patch.object(lean, "_is_product", lambda layer, x: False))
        yield


def beside_tensors(device: str) -> Mapping[str, int]:
    """What a device takes beside tensors, bytes by part."""
    return {} if device == "cpu" else {"workspaces": WORKSPACES, "context": CONTEXT}
