"""Encoded pictures and captions on disk, keyed by all that they depend on, so that none is ever stale.

One safetensors file an entry, written atomically: several processes may fill one cache, an interrupted one
goes on where it stopped, one new picture is one encoding. Entries are computed one by one, since the
composition of a batch changes the last bits. An entry that is damaged counts as absent and is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.files import atomic_write, cache_dir, key_of
from impasto.core.progress import Reporter
from impasto.data.augment import Variant
from impasto.data.dataset import Picture
from impasto.data.frontier import VAE
from impasto.data.masks import Mask
from impasto.families.base import Base, Caption, TextStates

#: raise it when the way from a file to an entry changes: decoding, scaling, cutting
RECIPE = 1


class Cache:
    """A folder of entries, each a dictionary of tensors under a key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def at(cls, folder: str | None) -> Cache:
        """The cache in that folder, or in the user's cache directory."""
        return cls(Path(folder) if folder else cache_dir() / "encodings")

    def path(self, key: str) -> Path:
        """Where an entry lies: 256 inner folders keep each of them short."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The entry's tensors, on the CPU; None where it is absent or damaged.

        It is read whole: a mapped file could be cut short under us, and Windows would not let it be replaced.
        """
        try:
            return unpacked(self.path(key).read_bytes())
        except FileNotFoundError:
            return None

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry whole. Raises `UserError` on a full disk."""
        with atomic_write(self.path(key)) as file:
            file.write(packed(tensors))

    def load_all(self, keys: Sequence[str]) -> list[dict[str, Tensor]]:
        """Entries that were there when the run began. Raises `UserError` if one has gone since."""
        return [self._there(key, self.load(key)) for key in keys]

    def _there(self, key: str, entry: dict[str, Tensor] | None) -> dict[str, Tensor]:
        if entry is None:
            raise UserError("an encoded picture or caption was lost or damaged during the run",
                            where=self.path(key), fix="run the same command again: it is made again")
        return entry

    def fill(self, makers: Mapping[str, Callable[[], Mapping[str, Tensor]]], title: str, unit: str,
             report: Reporter, rank: int = 0, world: int = 1) -> int:
        """Make the entries that are absent or damaged; returns how many were made here.

        Each process begins at its own share and goes once around, passing over what others made meanwhile.
        """
        keys = list(makers)
        start = rank * len(keys) // world
        made = 0
        with report.phase(title, len(keys), unit) as advance:
            for key in keys[start:] + keys[:start]:
                if self.load(key) is None:
                    tensors = makers[key]()
                    try:
                        self.save(key, tensors)
                    except UserError:
                        if self.load(key) is None:  # else another process, reading its own, kept ours out (Windows)
                            raise
                    made += 1
                advance(1)
        return made


def packed(tensors: Mapping[str, Tensor]) -> bytes:
    """An entry as it is kept: safetensors, with a digest of the tensors."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, {"digest": _digest(plain)})


def unpacked(data: bytes) -> dict[str, Tensor] | None:
    """The tensors of an entry, on the CPU; None where it is damaged."""
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError:
        return None
    header = json.loads(data[8:8 + int.from_bytes(data[:8], "little")])
    return tensors if header.get("__metadata__", {}).get("digest") == _digest(tensors) else None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """What a flipped bit anywhere in an entry changes."""
    hasher = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        hasher.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


# --- pictures ----------------------------------------------------------------------------------------------


def latent_key(picture: Picture, variant: Variant, flip: bool, background: str, encoder: str) -> str:
    """The key of a picture's moments: content, cut, what else is done to it, and encoder."""
    placement, facts = variant.placement, variant.facts
    return key_of("moments", RECIPE, picture.digest, placement.resized, placement.crop, placement.bucket,
                  flip, background, encoder, *([facts] if facts else []))


def mask_key(mask: Mask, variant: Variant, cell: int) -> str:
    """The key of a mask's cells: content, which channel of it, and how it is cut."""
    placement = variant.placement
    return key_of("mask", RECIPE, mask.digest, mask.alpha, placement.resized, placement.crop, placement.bucket,
                  variant.angle, cell)


def image_encoder_key(base: Base, fingerprint: Mapping[str, str]) -> str:
    """What moments depend on beside the picture: the VAE's weights and its precision."""
    return key_of(fingerprint[VAE], precision(base, VAE))


def encode_picture(base: Base, picture: Picture, variant: Variant, flip: bool, background: str,
                   device: torch.device) -> dict[str, Tensor]:
    """A picture's moments (1, 2C, h, w), fp32. Raises `UserError` if they are not finite."""
    return encode_pixels(base, variant.show(picture.read(background), flip), device, picture.path)


def encode_pixels(base: Base, pixels: Tensor, device: torch.device, where: object) -> dict[str, Tensor]:
    """The moments (1, 2C, h, w), fp32, of one picture's pixels (3, H, W). Raises `UserError` as `encode_picture`."""
    with torch.no_grad():
        moments = base.encode_images(pixels[None].to(device)).float()
    if not torch.isfinite(moments).all():
        raise UserError("the VAE makes numbers of it that are not finite", where=where,
                        fix="give another VAE (base.vae), or train.precision=fp32")
    return {"moments": moments}


# --- captions ----------------------------------------------------------------------------------------------


def text_key(caption: Caption, encoder: str) -> str:
    """The key of a caption's states."""
    return key_of("text", RECIPE, caption, encoder, *(["as a negative"] if caption == "" else []))


def text_encoder_key(base: Base, fingerprint: Mapping[str, str]) -> str:
    """What text states depend on beside the caption: weights, precision, tokenizers, family settings (clip skip), new
    tokens."""
    weights = [(name, fingerprint[name], precision(base, name)) for name in base.text_encoder_names]
    tokens = base.tokens.facts()
    return key_of(weights, sorted(base.spelling().items()), sorted(base.text_settings().items()),
                  *([tokens] if tokens else []))


def encode_caption(base: Base, caption: Caption) -> TextStates:
    """A caption's states, each with a leading dimension of 1."""
    with torch.no_grad():
        states = base.encode_negatives([caption])
    if any(not torch.isfinite(state).all() for state in states.values() if state.is_floating_point()):
        raise UserError("the text encoder makes numbers of it that are not finite",
                        where=f"caption {caption!r}", fix="use train.precision=fp32")
    return states


def precision(base: Base, component: str) -> str:
    """What a component is held and computes in."""
    return base.precision(component)
