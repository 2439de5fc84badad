"""What a family of Stable Diffusion is to the rest of the program.

A `Base` is a checkpoint made usable. Everything above this floor speaks to this class alone and never
asks which family it is: the condition is opaque outside the family, *time* is of the process's own type
(an integer step for DDPM, a real number for flow matching), text states are a dictionary of tensors.

Shapes: B pictures, C latent channels, (h, w) latent cells, (H, W) pixels.
"""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from impasto.core.errors import UserError, nearest
from impasto.core.progress import SILENT, Reporter
from impasto.diffusion.process import Process
from impasto.families.blocks import compute_again
from impasto.families.tokens import Tokens, Vocabulary
from impasto.families.weights import Merged, Weights

if TYPE_CHECKING:
    from impasto.families.asleep import Asleep
    from impasto.formats.checkpoint import Checkpoint

#: What the text encoders leave behind, by name; each tensor has a leading batch dimension.
TextStates = dict[str, Tensor]

#: A caption as it stands (a str, taken literally), or pieces of text with weights (from `prompts.parse`).
Caption = str | Sequence[tuple[str, float]]


@dataclass
class Geometry:
    """Where each picture of a batch comes from, in pixels, each (B, 2) as (height, width) or (top, left).

    SDXL is conditioned on it; other families ignore it.
    """

    original: Tensor
    crop: Tensor
    target: Tensor

    def to(self, device: torch.device | str) -> Geometry:
        """The same geometry on `device`."""
        return Geometry(self.original.to(device), self.crop.to(device), self.target.to(device))


@dataclass
class Base(Weights, abc.ABC):
    """A checkpoint made usable: tokenizers, text encoders, denoiser, VAE and its noise process."""

    family: ClassVar[str]
    #: component name of the denoiser ("unet", "transformer") and of the text encoders, diffusers' names
    denoiser_name: ClassVar[str]
    text_encoder_names: ClassVar[tuple[str, ...]]
    #: kinds of methods that it cannot be trained by, and why
    refuses: ClassVar[Mapping[str, str]] = {}

    #: settings of the family's own, by name: their kind, which are its fields too or what loading asks for
    own_options: ClassVar[Mapping[str, type]] = {}
    #: tokens of a caption that its CLIPs read; None: all, however long it is
    longest: ClassVar[int | None] = None
    #: whether it was made to finish pictures that others began
    refines: ClassVar[bool] = False

    components: dict[str, nn.Module]
    process: Process
    source: Path | None = None
    #: keys of the file that no component took: listed and kept, not an error
    surplus: list[str] = field(default_factory=list)
    #: the checkpoint that each component came from; none for random weights
    checkpoints: dict[str, Checkpoint] = field(default_factory=dict)
    #: the checkpoint's own scheduler config, for what it says about sampling
    scheduler: dict[str, Any] = field(default_factory=dict)
    #: how components are held that are in few bits: names of `codes.CODES`
    quantised: dict[str, str] = field(default_factory=dict)
    #: components that were put to sleep, and whose weights were let go: they may have woken since
    asleep: dict[str, Asleep] = field(default_factory=dict)
    #: adapters that were merged into the weights after loading, in this order
    merged: tuple[Merged, ...] = ()

    # --- loading -------------------------------------------------------------------------------------
    @classmethod
    @abc.abstractmethod
    def from_checkpoints(cls, checkpoints: Mapping[str, Checkpoint], *, device: torch.device | str = "cpu",
                         dtype: torch.dtype = torch.float32, clip_skip: int = 0, report: Reporter = SILENT,
                         init_seed: int | None = None, options: Mapping[str, Any] | None = None,
                         quantised: Mapping[str, str] | None = None) -> Self:
        """Build from the checkpoint of each component: one and the same, but for a VAE that was replaced.

        `options`: of `own_options`. With an `init_seed` their configurations alone count, and weights are random.
        `quantised`: components whose blocks' weights are held in few bits, and how (`codes.CODES`); each is so before
        the next tensor is read.
        Modules are in eval mode and frozen. `dtype` is of the weights; a family may hold a component in more.
        Raises `UserError` for what is missing or does not fit.
        """

    # --- text ----------------------------------------------------------------------------------------
    @classmethod
    def checked(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of the family's own, if they are. Raises `UserError`."""
        for name, value in options.items():
            if name not in cls.own_options:
                raise UserError(f"has no setting {name!r} of its own", where=cls.family,
                                fix=nearest(name, cls.own_options) if cls.own_options else "leave it out")
            if (kind := cls.own_options[name]) is not type(value) or kind is int and value < 1:
                raise UserError(f"takes no {value!r} as its {name}", where=cls.family,
                                fix=f"give {'true or false' if kind is bool else 'a whole number from 1 on'}")
        return dict(options)

    @abc.abstractmethod
    def encode_text(self, captions: Sequence[Caption]) -> TextStates:
        """Text states of captions of any length (in chunks)."""

    def vocabulary(self, encoder: str) -> Vocabulary:
        """What a text encoder knows: what new tokens stand beside. Raises `UserError` where it takes none."""
        raise UserError("takes no new tokens", where=f"{self.family} {encoder}", fix="choose another method")

    @functools.cached_property
    def tokens(self) -> Tokens:
        """New tokens, which captions may contain while they are there."""
        return Tokens(self.text_encoder_names, self.vocabulary)

    @property
    def token_encoders(self) -> tuple[str, ...]:
        """The text encoders in which new tokens are trained; others may read those of a file, too."""
        return self.text_encoder_names

    def text_settings(self) -> dict[str, Any]:
        """What text states depend on beside caption, weights and precision (clip skip), for cache keys."""
        return {}

    def spelling(self) -> dict[str, str]:
        """What makes ids of captions, a digest for each text encoder, for cache keys."""
        return {}

    def own_settings(self) -> dict[str, Any]:
        """Those of `own_options` in force, where they are not the usual ones."""
        return {}

    def stack_text(self, states: Sequence[TextStates]) -> TextStates:
        """One batch out of several text states, which may differ in their number of chunks."""
        return {name: torch.cat([s[name] for s in states]) for name in states[0]}

    # --- pictures ------------------------------------------------------------------------------------
    @property
    @abc.abstractmethod
    def cell(self) -> int:
        """Pixels along one side of a latent cell (8 for Stable Diffusion's VAEs)."""

    @property
    def grid(self) -> int:
        """Pixels of which both sides of a picture are multiples: a latent cell's, or a patch of them."""
        return self.cell

    @property
    def native_size(self) -> int:
        """Side in pixels of the pictures that the denoiser was made for (512 for SD 1.x)."""
        return getattr(self.denoiser, "config").sample_size * self.cell  # noqa: B009

    @property
    @abc.abstractmethod
    def latent_channels(self) -> int:
        """C."""

    @abc.abstractmethod
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Moments (B, 2C, h, w), mean and log-variance, of pixels (B, 3, H, W) in [-1, 1]; no draw."""

    @abc.abstractmethod
    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w): the sample of `moments` that the standard normal `noise` picks."""

    @abc.abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in about [-1, 1] of scaled latents."""

    @property
    def latent_scale(self) -> float:
        """What latents are multiplied by."""
        return 1.0

    @abc.abstractmethod
    def set_latent_scale(self, scale: float) -> None:
        """Have latents multiplied by `scale` from now on, in place of the VAE's own factor."""

    @contextlib.contextmanager
    def keeping_latent_scale(self) -> Iterator[None]:
        """Whatever is set in the block, latents have the scale that they had, afterwards."""
        scale = self.latent_scale
        try:
            yield
        finally:
            if self.latent_scale != scale:
                self.set_latent_scale(scale)

    # --- saving --------------------------------------------------------------------------------------
    @abc.abstractmethod
    def save_tools(self, folder: Path) -> dict[str, list[str]]:
        """Write tokenizers into a diffusers folder; their entries in its model_index.json."""

    # --- the denoiser --------------------------------------------------------------------------------
    @property
    def variant(self) -> str:
        """What kind of denoiser of its family it is: "inpainting", "instruct-pix2pix", or "", a plain one."""
        return ""

    @property
    def extras(self) -> tuple[str, ...]:
        """What `condition` must be given beside text, by name: "mask" and "masked", the picture without what the mask
        covers, or "picture", one to edit; of a plain denoiser nothing."""
        return ()

    def seen(self, extras: Mapping[str, Tensor], normal: Callable[[str, Sequence[int]], Tensor]) -> dict[str, Tensor]:
        """Extras as `condition` takes them, of masks and of pictures' moments (B, 2C, h, w); `normal` draws standard
        normal noise (B, *shape) for a use."""
        return dict(extras)

    @abc.abstractmethod
    def condition(self, text: TextStates, geometry: Geometry | None = None,
                  extras: Mapping[str, Tensor] | None = None) -> Any:
        """All that the denoiser is told beside latents and time. Opaque to callers.

        `extras`: masks (B, 1, h, w) or (B, 1, H, W) and latents (B, C, h, w) under the names in `self.extras`. Raises
        `UserError` for one that is missing or has no place.
        """

    def encode_negatives(self, captions: Sequence[Caption]) -> TextStates:
        """Text states of negative prompts, and of captions that are learned from: a family may have its own for none at
        all, and what guidance starts from is to be what was trained without caption."""
        return self.encode_text(captions)

    def sampling_extras(self, unwanted: int, wanted: int) -> dict[str, Tensor]:
        """Extras of the condition for drawing: (B, …) of the negative prompts first, then of the prompts."""
        return {}

    @abc.abstractmethod
    def predict(self, latents: Tensor, time: Tensor, condition: Any) -> Tensor:
        """The denoiser's prediction (B, C, h, w), of the kind that `process.prediction` names."""

    @abc.abstractmethod
    def targets(self, word: str) -> list[str]:
        """Layer paths ("unet.down_blocks.0…to_q") that a target word or a regular expression names; no word those that
        are `idle`.

        Words: attention, cross-attention, feed-forward, convolutions, text-encoder, all.
        Raises `UserError` with near matches if nothing matches.
        """

    @abc.abstractmethod
    def parts(self, word: str) -> list[str]:
        """Parameter paths ("unet.conv_in.weight") that a word, a path or a regular expression names: `parts.Places`.

        Raises `UserError` with near matches if nothing matches.
        """

    @property
    def idle(self) -> tuple[str, ...]:
        """The beginnings of paths of what the family's networks hold and never compute with: no word names it."""
        return ()

    def key_value_layers(self) -> list[tuple[str, str, int]]:
        """For each attention of the denoiser the paths of the layers that make its keys and its values, and the
        width of the context that both read. None where a family makes them otherwise."""
        return []

    # --- shared --------------------------------------------------------------------------------------
    @property
    def denoiser(self) -> nn.Module:
        return self.components[self.denoiser_name]

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def checkpoint_gradients(self, share: float = 1.0) -> None:
        """Compute blocks of the denoiser and the text encoders again in the backward instead of keeping what
        they made: less memory, about a third more time. A share less than 1 is of the denoiser's blocks alone, those
        that keep the most."""
        if share < 1:
            compute_again(self.denoiser, share)
            return
        for name in (self.denoiser_name, *self.text_encoder_names):
            cast(Any, self.components[name]).enable_gradient_checkpointing()
