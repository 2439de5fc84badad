"""What lets methods and codecs work on the meta device, where a tensor has a shape and a type, and no values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: draws of initial values, which nobody needs here
DRAWS = (torch.rand, torch.randn)


class Valueless(TorchFunctionMode):
    """A block in which tensors on the meta device pass every look at their values, and stay where they are.

    All are finite and within bounds, as those of a training that went well; their bytes, of which nothing but digests
    is made, are none.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS:
            return func(*args, device="meta")
        if args and isinstance(args[0], Tensor) and args[0].is_meta:
            if func is Tensor.__bool__:
                return True
            if func is Tensor.cpu:
                return args[0]
            if func in (torch.equal, Tensor.equal):  # what was trained apart has come apart
                return args[0] is args[1]
            if func is Tensor.numpy:
                return np.zeros(0, np.uint8)
        return func(*args, **kwargs)
