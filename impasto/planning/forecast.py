"""What is known of a run beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

GIB = 2**30

#: what memory is taken by, in the order in which it is drawn and listed
PARTS = {
    "vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "text encoder 2", "text_encoder_3": "T5",
    "unet": "UNet", "transformer": "transformer", "adapter": "adapter", "gradients": "gradients",
    "optimizer": "optimizer states", "ema": "EMA", "batch": "batch", "activations": "activations",
    "autocast": "autocast copies", "temporaries": "temporaries", "workspaces": "workspaces", "allocator": "allocator",
    "context": "CUDA context",
}

#: those of PARTS that are a base's weights
WEIGHTS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "unet", "transformer")

#: moments of an optimizer step
STEPS = ("forward", "backward", "optimizer step", "average")


@dataclass(frozen=True)
class Forecast:
    """What one run will take."""

    #: bytes at the peak, by a name of `PARTS`; their sum is `peak_bytes`
    parts: Mapping[str, int]
    #: where the peak is: "backward", "optimizer step", "preview", "encoding pictures"
    moment: str
    #: of the file, or folder, that the run leaves
    artifact_bytes: int
    #: multiply-adds count two: of one optimizer step's forward, backward, and what is computed again
    flops: Mapping[str, float] = field(default_factory=dict)
    #: bytes that one optimizer step reads and writes in the card's memory
    traffic: float = 0.0
    #: bytes of tensors alone, at the peak of each moment: "encoding pictures", "forward", "backward", "preview", …
    moments: Mapping[str, int] = field(default_factory=dict)
    #: what `torch.cuda.max_memory_allocated` will say; on a CPU, the most bytes of tensors
    allocated: int = 0
    #: one line each: what was assumed
    remarks: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def in_steps(self) -> int:
        """Bytes of tensors alone, at the peak of the steps: not of encoding, nor of previews."""
        return max((self.moments[moment] for moment in STEPS if moment in self.moments), default=0)

    @property
    def weight_bytes(self) -> int:
        """The base's weights, as far as they are there at the peak."""
        return sum(self.parts.get(name, 0) for name in WEIGHTS)
