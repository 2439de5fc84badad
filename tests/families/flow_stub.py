"""A family as unlike Stable Diffusion 1 as Stable Diffusion 3 is, small: what bends the protocol's seams most.

Three text encoders whose states are joined along tokens and padded to one width, pooled states beside them, a
transformer on patches in which text and picture attend to each other, rectified flow with real-valued time, a VAE
of 16 channels with a shift.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impasto.diffusion.process import RectifiedFlow
from impasto.families import unet_targets
from impasto.families.base import Base, Caption, Geometry, TextStates
from impasto.families.parts import Places

TOKENS, VOCABULARY, WIDTH = 8, 100, 16
WORDS = {"attention": r"^transformer\.attn\.to_", "feed-forward": r"^transformer\.ff\.",
         "text-encoder": r"^text_encoder(_\d)?\.layer$", "all": r"^transformer\."}


class Encoder(nn.Module):
    def __init__(self, width: int, pooled: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layer = nn.Linear(width, width)
        self.pool = nn.Linear(width, width) if pooled else None

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        states = torch.tanh(self.layer(self.embedding(ids)))
        return states, None if self.pool is None else self.pool(states[:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        heads = [f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v)]
        return self.to_out[0](F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_in, self.patch_out = nn.Linear(16 * 4, WIDTH), nn.Linear(WIDTH, 16 * 4)
        self.context_in, self.vector_in = nn.Linear(WIDTH, WIDTH), nn.Linear(12 + 8, WIDTH)
        self.time_in = nn.Linear(2, WIDTH)
        self.attn = Attention()
        self.ff = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, latents: Tensor, time: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
        h, w = latents.shape[2] // 2, latents.shape[3] // 2
        patches = F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)
        angle = torch.stack([torch.sin(time / 100), torch.cos(time / 100)], dim=1).to(latents)
        told = (self.time_in(angle) + self.vector_in(pooled))[:, None]
        x = torch.cat([self.patch_in(patches), self.context_in(states)], dim=1) + told
        x = x + self.attn(x)
        x = x + self.ff(x)
        return F.pixel_shuffle(self.patch_out(x[:, :h * w]).transpose(1, 2).unflatten(2, (h, w)), 2)


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 32, 8, stride=8), nn.ConvTranspose2d(16, 3, 8, stride=8)


@dataclass
class FlowStub(Base):
    family: ClassVar[str] = "flowstub"
    denoiser_name: ClassVar[str] = "transformer"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")

    @classmethod
    def from_checkpoints(cls, checkpoints: Any, **options: Any) -> Self:
        raise NotImplementedError

    @classmethod
    def random(cls) -> FlowStub:
        torch.manual_seed(0)
        components: dict[str, nn.Module] = {
            "transformer": Transformer(), "text_encoder": Encoder(12, True), "text_encoder_2": Encoder(8, True),
            "text_encoder_3": Encoder(WIDTH, False), "vae": VAE()}
        for module in components.values():
            module.eval().requires_grad_(False)
        return cls(components, RectifiedFlow(shift=3.0))

    def encode_text(self, captions: Sequence[Caption]) -> TextStates:
        plain = [c if isinstance(c, str) else "".join(text for text, _ in c) for c in captions]
        rows = [[zlib.crc32(word.encode()) % VOCABULARY for word in text.split()[:TOKENS]] for text in plain]
        ids = torch.tensor([row + [0] * (TOKENS - len(row)) for row in rows])
        (one, pool), (two, pool_two), (three, _) = (
            self.components[name](ids.to(next(self.components[name].parameters()).device))
            for name in self.text_encoder_names)
        assert pool is not None and pool_two is not None
        clips = F.pad(torch.cat([one, two], dim=-1)[..., :WIDTH], (0, 0))
        return {"states": torch.cat([clips, three], dim=1), "pooled": torch.cat([pool, pool_two], dim=1)}

    @property
    def cell(self) -> int:
        return 8

    @property
    def latent_channels(self) -> int:
        return 16

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.components["vae"].encoder(pixels)  # pyright: ignore

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        mean, logvar = moments.chunk(2, dim=1)
        return (mean + torch.exp(0.5 * logvar) * noise - 0.0609) * 1.5305

    def decode_latents(self, latents: Tensor) -> Tensor:
        return self.components["vae"].decoder(latents / 1.5305 + 0.0609)  # pyright: ignore

    def set_latent_scale(self, scale: float) -> None:
        raise NotImplementedError

    def save_tools(self, folder: Path) -> dict[str, list[str]]:
        return {}

    def condition(self, text: TextStates, geometry: Geometry | None = None,
                  extras: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return text["states"], text["pooled"]

    def predict(self, latents: Tensor, time: Tensor, condition: tuple[Tensor, Tensor]) -> Tensor:
        return self.denoiser(latents, time * 1000, *condition)

    def targets(self, word: str) -> list[str]:
        names = (self.denoiser_name, *self.text_encoder_names)
        return unet_targets.matches(unet_targets.paths(self.components, names), word, WORDS)

    def parts(self, word: str) -> list[str]:
        return Places(self.components, self.denoiser_name, self.text_encoder_names, {}, list(WORDS),
                      self.targets).find(word)
