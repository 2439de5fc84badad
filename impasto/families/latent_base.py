"""What the families of Stable Diffusion have in common, whatever network denoises: loading, and a VAE's latents."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from impasto.core.errors import UserError
from impasto.core.progress import SILENT, Advance, Reporter
from impasto.diffusion.process import process_from_scheduler_config
from impasto.families import networks, vae
from impasto.families.base import Base
from impasto.families.quantised import quantise
from impasto.formats.configs import CONFIGS

if TYPE_CHECKING:
    from impasto.formats.checkpoint import Checkpoint


@dataclass
class LatentBase(Base, abc.ABC):
    """A denoiser of the latents that an AutoencoderKL makes, told by text encoders (Rombach et al. 2022)."""

    # --- loading -------------------------------------------------------------------------------------
    @classmethod
    @abc.abstractmethod
    def tools(cls, checkpoints: Mapping[str, Checkpoint], clip_skip: int) -> dict[str, Any]:
        """The family's own fields: tokenizers and settings."""

    @classmethod
    def from_checkpoints(cls, checkpoints: Mapping[str, Checkpoint], *, device: torch.device | str = "cpu",
                         dtype: torch.dtype = torch.float32, clip_skip: int = 0, report: Reporter = SILENT,
                         init_seed: int | None = None, options: Mapping[str, Any] | None = None,
                         quantised: Mapping[str, str] | None = None) -> Self:
        kind, own = cls.chosen(checkpoints, cls.checked(options or {}), report)
        return kind._built(checkpoints, torch.device(device), dtype, clip_skip, report, init_seed, own, quantised or {})

    @classmethod
    def chosen(cls, checkpoints: Mapping[str, Checkpoint], own: dict[str, Any], report: Reporter
               ) -> tuple[type[Self], dict[str, Any]]:
        """The kind to build of these checkpoints, and its settings. Raises `UserError`."""
        return cls, own

    @classmethod
    def _built(cls, checkpoints: Mapping[str, Checkpoint], device: torch.device, dtype: torch.dtype, clip_skip: int,
               report: Reporter, init_seed: int | None, own: dict[str, Any], quantised: Mapping[str, str]) -> Self:
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
                if name in quantised:
                    quantise(components[name], quantised[name])
                surplus += networks.fill(components[name], _counted(source.tensors(name), advance),
                                         where=source.path, device=device, dtype=width)
        base = cls(components=components, process=process_from_scheduler_config(main.scheduler), source=main.path,
                   surplus=surplus, checkpoints=dict(checkpoints) if init_seed is None else {},
                   quantised={name: held for name, held in quantised.items() if name in components},
                   scheduler=dict(main.scheduler), **cls.tools(checkpoints, clip_skip), **own)
        base.check()
        return base

    @abc.abstractmethod
    def check(self) -> None:
        """That the components fit each other. Raises `UserError`."""

    def check_encoder(self, name: str, tokenizer: Any, skip: int, least: int) -> int:
        """That a CLIP and its tokenizer fit each other, and `skip` leaves layers: `least` are never used. Its channels.

        Raises `UserError`.
        """
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


def _counted(tensors: Iterable[tuple[str, Tensor]], advance: Advance) -> Iterator[tuple[str, Tensor]]:
    for pair in tensors:
        yield pair
        advance(1)
