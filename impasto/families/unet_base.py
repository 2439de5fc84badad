"""What the families of Stable Diffusion with a UNet have in common: loading, VAE, predicting, targets."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.core.progress import SILENT, Advance, Reporter
from impasto.diffusion.process import process_from_scheduler_config
from impasto.families import networks, unet_targets, vae, variants
from impasto.families.base import Base, Geometry, TextStates
from impasto.families.parts import Places
from impasto.formats.configs import CONFIGS

if TYPE_CHECKING:
    from impasto.formats.checkpoint import Checkpoint


@dataclass
class UNetBase(Base, abc.ABC):
    """A UNet on latents that attends to text states (Rombach et al. 2022)."""

    denoiser_name: ClassVar[str] = "unet"
    #: of the condition, what is told as it is, whatever precision the UNet has
    exact: ClassVar[frozenset[str]] = frozenset()

    # --- loading -------------------------------------------------------------------------------------
    @classmethod
    @abc.abstractmethod
    def tools(cls, checkpoints: Mapping[str, Checkpoint], clip_skip: int) -> dict[str, Any]:
        """The family's own fields: tokenizers and settings."""

    @classmethod
    def from_checkpoints(cls, checkpoints: Mapping[str, Checkpoint], *, device: torch.device | str = "cpu",
                         dtype: torch.dtype = torch.float32, clip_skip: int = 0, report: Reporter = SILENT,
                         init_seed: int | None = None, options: Mapping[str, Any] | None = None) -> Self:
        own = cls.checked(options or {})
        names = (cls.denoiser_name, *cls.text_encoder_names, "vae")
        for name in names:
            if name not in checkpoints or name not in checkpoints[name].components:
                where = next(iter(checkpoints.values())).path
                raise UserError(f"holds no {name}", where=where,
                                fix="give a VAE with vae=FILE" if name == "vae" else "a whole checkpoint is needed")
        main = checkpoints[cls.denoiser_name]
        main.check_prediction()
        components: dict[str, nn.Module] = {}
        surplus = list(main.surplus)
        total = sum(len(checkpoints[name].names(name)) for name in names)
        with report.phase("reading weights", total, "tensors") as advance:
            for name in names:
                source, width = checkpoints[name], vae.DTYPE if name == "vae" else dtype
                kind = CONFIGS.get(cls.family).parts[name].classes[0]
                if init_seed is not None:
                    components[name] = networks.random_init(name, kind, source.configs[name], init_seed, device=device,
                                                            dtype=width)
                    continue
                components[name] = networks.build(kind, source.configs[name])
                surplus += networks.fill(components[name], _counted(source.tensors(name), advance),
                                         where=source.path, device=device, dtype=width)
        base = cls(components=components, process=process_from_scheduler_config(main.scheduler), source=main.path,
                   surplus=surplus, checkpoints=dict(checkpoints) if init_seed is None else {},
                   scheduler=dict(main.scheduler), **cls.tools(checkpoints, clip_skip), **own)
        base.check()
        return base

    def check(self) -> None:
        """That the components fit each other. Raises `UserError`."""
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

    def check_encoder(self, name: str, tokenizer: Any, skip: int, least: int) -> int:
        """As `check_text`, of one CLIP alone; its channels."""
        config = cast(Any, self.components[name]).text_model.config
        layers = config.num_hidden_layers - least
        if not 0 <= skip < layers:
            raise UserError(f"clip_skip {skip} leaves none of {layers} layers", where=self.source,
                            fix=f"give 0 … {layers - 1}")
        if len(tokenizer) > config.vocab_size:
            raise UserError(f"the tokenizer knows {len(tokenizer)} tokens, the text encoder {config.vocab_size}",
                            where=self.source, fix="give a folder with the tokenizer that belongs to it")
        return config.hidden_size

    def config(self, component: str) -> Any:
        """A diffusers component's config."""
        return cast(Any, self.components[component]).config

    # --- pictures ------------------------------------------------------------------------------------
    @property
    def cell(self) -> int:
        return vae.cell(self.components["vae"])

    @property
    def latent_channels(self) -> int:
        return self.config("vae").latent_channels

    def encode_images(self, pixels: Tensor) -> Tensor:
        return vae.encode(self.components["vae"], pixels)

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        return vae.sample(self.components["vae"], moments, noise)

    def decode_latents(self, latents: Tensor) -> Tensor:
        return vae.decode(self.components["vae"], latents)

    @property
    def latent_scale(self) -> float:
        return self.config("vae").scaling_factor

    def set_latent_scale(self, scale: float) -> None:
        cast(Any, self.components["vae"]).register_to_config(scaling_factor=scale)

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


def _counted(tensors: Iterable[tuple[str, Tensor]], advance: Advance) -> Iterator[tuple[str, Tensor]]:
    for pair in tensors:
        yield pair
        advance(1)
