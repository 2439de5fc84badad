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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from impasto.core.errors import UserError, nearest
from impasto.core.files import key_of
from impasto.core.progress import SILENT, Reporter
from impasto.deltas.attach import attach, beside_layers
from impasto.deltas.delta import Delta
from impasto.diffusion.process import Process
from impasto.families.blocks import compute_again
from impasto.families.tokens import Tokens, Vocabulary

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


@dataclass(frozen=True)
class Merged:
    """An adapter in a base's weights."""

    name: str  # of its file
    digest: str  # of what it holds
    strength: float
    components: frozenset[str]  # that it changed
    deltas: Mapping[str, tuple[Delta, ...]] = field(repr=False, compare=False)  # by layer, at full strength


@dataclass
class Base(abc.ABC):
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
    def _first(self) -> dict[str, str]:
        """What `origin` told of each component when it was first asked."""
        return {}

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

    def layer(self, path: str) -> nn.Module:
        """The layer at "component.path.inside"."""
        component, _, inside = path.partition(".")
        return self.components[component].get_submodule(inside)

    def parameter(self, path: str) -> nn.Parameter:
        """The parameter at "component.path.inside.weight"."""
        component, _, inside = path.partition(".")
        return self.components[component].get_parameter(inside)

    @torch.no_grad()
    def hold(self, paths: Iterable[str], dtype: torch.dtype) -> None:
        """Hold these parameters in `dtype` from now on, whatever precision the base was loaded in.

        Their values are the checkpoint's own again: what loading has rounded comes back, and onto that, what was merged
        into them since. Random ones are cast.
        """
        wanted: dict[str, dict[str, nn.Parameter]] = {}
        for path in paths:
            component, _, inside = path.partition(".")
            if (parameter := self.parameter(path)).dtype != dtype:
                wanted.setdefault(component, {})[inside] = parameter
        for component, parameters in wanted.items():
            if component not in self.checkpoints:
                for parameter in parameters.values():
                    parameter.data = parameter.data.to(dtype)  # diffusers warns of `Module.to`
                continue
            for name, tensor in self.stored(component):
                if name in parameters:
                    parameters[name].data = tensor.to(parameters[name].device, dtype)
            self._merge_again({f"{component}.{name}" for name in parameters})

    def _merge_again(self, paths: set[str]) -> None:
        """Put the merged adapters' changes onto these parameters, of the checkpoint's values, and onto no others."""
        layers = {path.rpartition(".")[0] for path in paths}
        for each in self.merged:
            deltas = {layer: terms for layer, terms in each.deltas.items() if layer in layers}
            attach(self.components, beside_layers(self.components, deltas), each.strength).merge(only=paths)

    def precision(self, component: str) -> str:
        """What a component is held and computes in: its type, and how it is held if that is in few bits. For keys of
        what it has made."""
        held = self.quantised.get(component)
        return str(next(self.components[component].parameters()).dtype) + (f", {held}" if held else "")

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by path: all others are what the checkpoint has, up to the precision in use."""
        return {f"{name}.{path}": parameter for name, network in self.components.items() if not self._sleeps(name)
                for path, parameter in network.named_parameters() if parameter.requires_grad}

    def stored(self, component: str) -> Iterator[tuple[str, Tensor]]:
        """A component's tensors as its checkpoint has them, by name, one at a time.

        Raises `UserError` if that is no longer there.
        """
        checkpoint = self.checkpoints[component]
        try:
            yield from checkpoint.tensors(component)
        except OSError as error:
            raise UserError(f"can no longer be read ({error.strerror or error})", where=checkpoint.path,
                            fix="put the base back to where it was") from error

    def fingerprint(self, components: Iterable[str] | None = None) -> dict[str, str]:
        """What identifies each component's weights: that of the checkpoint, and what was merged into them since.

        Encodings and drawn pictures are kept under it. A component without a merged adapter has its `origin`.
        """
        found = self.origin(components)
        for name in found:
            if own := [(each.digest, each.strength) for each in self.merged if name in each.components]:
                found[name] = key_of("merged", found[name], own)
        return found

    def origin(self, components: Iterable[str] | None = None) -> dict[str, str]:
        """blake2b of each component's tensors in diffusers' naming: one for all layouts of the same weights.

        Of the weights as the checkpoint holds them, whatever precision they are used in and is merged into them.
        """
        from impasto.families.fingerprint import fingerprint, of_module

        found = {name: fingerprint(self.checkpoints[name], name) if name in self.checkpoints
                 else of_module(self.components[name])
                 for name in (self.components if components is None else components)}
        for name, own in found.items():
            self._first.setdefault(name, own)
        return found

    def checkpoint_gradients(self, share: float = 1.0) -> None:
        """Compute blocks of the denoiser and the text encoders again in the backward instead of keeping what
        they made: less memory, about a third more time. A share less than 1 is of the denoiser's blocks alone, those
        that keep the most."""
        if share < 1:
            compute_again(self.denoiser, share)
            return
        for name in (self.denoiser_name, *self.text_encoder_names):
            cast(Any, self.components[name]).enable_gradient_checkpointing()

    # --- sleep ---------------------------------------------------------------------------------------
    def sleep(self, components: Iterable[str]) -> None:
        """Put components to sleep that nobody needs now.

        One that is what its checkpoint holds, up to precision, is let go: its weights are read again from there, to the
        denoiser's device, as soon as one of them is looked at (see `asleep`). That raises `UserError` if the checkpoint
        has changed since it was loaded. Any other is moved to the CPU, and what it is asked for is computed there.
        """
        from impasto.families.asleep import Asleep

        for name in components:
            if self._sleeps(name):
                continue
            if self._can_be_read(name):
                self.asleep[name] = Asleep(self.components[name], functools.partial(self._read_again, name),
                                           self.device)
            else:
                self.components[name].to("cpu")

    @contextlib.contextmanager
    def awake(self, components: Iterable[str] | None = None) -> Iterator[None]:
        """A block in which components, or all, may be asked for anything, on the denoiser's device; afterwards those
        that slept do so again."""
        names = [*(self.components if components is None else components)]
        away = {name: place for name in names if not self._sleeps(name) and
                (place := next(self.components[name].parameters()).device) != self.device}
        sleeping = [name for name in names if self._sleeps(name)]
        for name in away:
            self.components[name].to(self.device)
        try:
            yield
        finally:
            for name, place in away.items():
                self.components[name].to(place)
            self.sleep(sleeping)

    def awake_networks(self) -> list[nn.Module]:
        """The networks whose weights are there."""
        return [network for name, network in self.components.items() if not self._sleeps(name)]

    def numbers(self, component: str) -> int:
        """How many a component's parameters hold; whether it sleeps or not."""
        return self.asleep[component].count if self._sleeps(component) else \
            sum(parameter.numel() for parameter in self.components[component].parameters())

    def _sleeps(self, name: str) -> bool:
        return name in self.asleep and not self.asleep[name].woken

    def _can_be_read(self, name: str) -> bool:
        """Whether a component is what its checkpoint holds, and that is what it was when it was first looked at."""
        return name in self.checkpoints and not any(name in each.components for each in self.merged) and \
            not any(parameter.requires_grad for parameter in self.components[name].parameters()) and \
            self._is_first(name)

    def _is_first(self, name: str) -> bool:
        try:
            return self.origin([name])[name] == self._first[name]
        except OSError:
            return False

    def _read_again(self, name: str) -> Iterator[tuple[str, Tensor]]:
        if not self._is_first(name):
            raise UserError(f"its {name}, which is needed again, is not what it was when this began",
                            where=self.checkpoints[name].path, fix="put the base back to where and what it was")
        return self.stored(name)
