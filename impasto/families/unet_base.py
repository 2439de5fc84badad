"""What the families of Stable Diffusion with a UNet have in common: predicting, its variants, targets."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.families import unet_targets, variants
from impasto.families.base import Geometry, TextStates
from impasto.families.latent_base import LatentBase
from impasto.families.parts import Places


@dataclass
class UNetBase(LatentBase, abc.ABC):
    """A UNet on latents that attends to text states."""

    denoiser_name: ClassVar[str] = "unet"
    #: of the condition, what is told as it is, whatever precision the UNet has
    exact: ClassVar[frozenset[str]] = frozenset()

    def check(self) -> None:
        unet, latents = self.config("unet"), self.latent_channels
        if variants.variant_of(unet.in_channels, latents) is None:
            raise UserError(f"the VAE makes {latents} channels, the UNet wants {unet.in_channels}",
                            where=self.checkpoints["vae"].path if self.checkpoints else self.source,
                            fix="take a VAE of this family")

    def check_text(self, tokenizers: Mapping[str, Any], skip: int, least: int = 0) -> None:
        """That tokenizers, text encoders and UNet fit each other, and `skip` leaves layers: `least` are never used.

        Raises `UserError`.
        """
        width = 0
        for name, tokenizer in tokenizers.items():
            width += self.check_encoder(name, tokenizer, skip, least)
        wanted = self.config("unet").cross_attention_dim
        if width != wanted:
            verb = "s make" if len(tokenizers) > 1 else " makes"
            raise UserError(f"the text encoder{verb} {width} channels, the UNet wants {wanted}",
                            where=self.source, fix="its components are of different models")

    # --- the denoiser --------------------------------------------------------------------------------
    @property
    def variant(self) -> str:
        return variants.variant_of(self.config(self.denoiser_name).in_channels, self.latent_channels) or ""

    @property
    def extras(self) -> tuple[str, ...]:
        return variants.EXTRAS[self.variant]

    def seen(self, extras: Mapping[str, Tensor], normal: variants.Normal) -> dict[str, Tensor]:
        return variants.seen(extras, self.latents, normal)

    def condition(self, text: TextStates, geometry: Geometry | None = None,
                  extras: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """The UNet's arguments beside latents and time, and what `variants` shows it."""
        return {"encoder_hidden_states": text["states"], **variants.beside(self.variant, extras)}

    def predict(self, latents: Tensor, time: Tensor, condition: dict[str, Any]) -> Tensor:
        """The prediction, computed in the precision of the UNet's weights, in that of `latents`."""
        weight = next(self.denoiser.parameters())
        x, rest = variants.joined(latents.to(weight.device, weight.dtype), condition)
        told = {name: value.to(weight.device, None if name in self.exact else weight.dtype)
                for name, value in rest.items()}
        out = self.denoiser(x, time.to(weight.device), **self.arguments(told), return_dict=False)[0]
        return out.to(latents.dtype)

    def arguments(self, condition: dict[str, Any]) -> dict[str, Any]:
        """What the condition is to diffusers' UNet."""
        return condition

    def targets(self, word: str) -> list[str]:
        """See `unet_targets` for the exact set that each word names."""
        return unet_targets.targets(self.components, (self.denoiser_name, *self.text_encoder_names), word,
                                    self.idle)

    def parts(self, word: str) -> list[str]:
        """See `parts` for what each word names."""
        return Places(self.components, self.denoiser_name, self.text_encoder_names, unet_targets.PARTS,
                      list(unet_targets.WORDS), self.targets, self.idle).find(word)

    def key_value_layers(self) -> list[tuple[str, str, int]]:
        """Self- and cross-attention alike, in the network's order."""
        found = []
        for path, module in self.denoiser.named_modules(prefix=self.denoiser_name):
            key, value = getattr(module, "to_k", None), getattr(module, "to_v", None)
            if isinstance(key, nn.Linear) and isinstance(value, nn.Linear):
                found.append((f"{path}.to_k", f"{path}.to_v", key.in_features))
        return found
