"""Where a run computes and how: device, precision, threads, versions.

Trained weights are fp32 always; frozen weights are held in the compute precision, and autocast computes in it.
"""

from __future__ import annotations

import os
import platform
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import psutil
import torch

import impasto
from impasto.core.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device of that name; auto is the first of cuda, mps, cpu that is there."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name!r} cannot be used ({str(error).splitlines()[0]})",
                        fix="impasto doctor lists the devices that can") from None
    return device


@dataclass(frozen=True)
class Precision:
    """Compute precision on a device."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def choose(cls, name: str, device: torch.device) -> Precision:
        """auto: bf16 on a GPU that has it, fp16 on another GPU, fp32 elsewhere.

        Half precision on a CPU ranges from 1.3 times faster to 200 times slower, by its instruction set.
        """
        if name == "auto":
            if device.type != "cuda":
                name = "fp32"
            else:
                name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        if name == "fp16" and device.type != "cuda":
            raise UserError("fp16 training needs a CUDA device", where="train.precision", fix="use bf16 or fp32")
        return cls(device, DTYPES[name])

    @property
    def name(self) -> str:
        """As recipes say it: fp32, bf16 or fp16."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    def autocast(self) -> AbstractContextManager:
        """The context in which a step computes."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling, which fp16's narrow exponent needs and the others do not."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def settle(deterministic: bool) -> None:
    """Process-wide switches of a run."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may sum in another order
        torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward does so too; flash's has a fixed order
        torch.use_deterministic_algorithms(True)


def describe(device: torch.device) -> dict[str, str]:
    """What the last bits of a result depend on, for the manifest."""
    return {
        "impasto": impasto.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """One line for each fact that has changed since the checkpoint was written."""
    return [f"{fact} was {before.get(fact)} and is {value}" for fact, value in now.items()
            if before.get(fact) != value]


def peak_resident() -> int:
    """The most resident bytes this process has ever had."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
