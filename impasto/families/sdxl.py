"""Stable Diffusion XL and its refiner: two text encoders, a pooled embedding, and the picture's own measures.

Podell et al. 2023, sections 2.1 and 2.2. Which numbers the UNet is told, and in which order: Stability's own code
(github.com/Stability-AI/generative-models, configs/inference/sd_xl_base.yaml and sd_xl_refiner.yaml).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from impasto.families import clip
from impasto.families.base import Caption, Geometry, TextStates
from impasto.families.networks import ClipText
from impasto.families.tokenizer import digest_of, write_tokenizer
from impasto.families.tokens import Vocabulary
from impasto.families.unet_base import UNetBase

if TYPE_CHECKING:
    from impasto.formats.checkpoint import Checkpoint

#: the tokenizer of each text encoder
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

#: how beautiful a picture is, of 10, where nobody says: of what is wanted, and of what is not (diffusers' defaults)
WANTED, UNWANTED = 6.0, 2.5


@dataclass(kw_only=True)
class SDXL(UNetBase):
    """Stable Diffusion XL. Text states: "states" (B, n·77, 2048), the encoders' side by side, of the last layer but
    one; "pooled" (B, 1280), of the first chunk."""

    family: ClassVar[str] = "sdxl"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    zeros_for_nothing: ClassVar[bool] = True
    exact: ClassVar[frozenset[str]] = frozenset({"time_ids"})

    tokenizers: dict[str, CLIPTokenizer] = field(default_factory=dict)
    #: text encoder layers left out at the end, beside the last, which SDXL never uses
    clip_skip: int = 0

    @classmethod
    def tools(cls, checkpoints: Mapping[str, Checkpoint], clip_skip: int) -> dict[str, Any]:
        return {"tokenizers": {name: clip.tokenizer_of(checkpoints[name], cls.family, TOKENIZERS[name])
                               for name in cls.text_encoder_names}, "clip_skip": clip_skip}

    def check(self) -> None:
        super().check()
        self.check_text(self.tokenizers, self.clip_skip, least=1)

    # --- text ----------------------------------------------------------------------------------------
    def encoder(self, name: str) -> ClipText:
        """A text encoder."""
        return cast(ClipText, self.components[name])

    def encode_text(self, captions: Sequence[Caption]) -> TextStates:
        states, pooled = [], None
        for name in self.text_encoder_names:
            own, pooled = clip.encode_unnormed(captions, self.tokenizers[name], self.encoder(name), 1 + self.clip_skip,
                                               self.tokens.of(name))
            states.append(own)
        assert pooled is not None, "the last text encoder has a projection"
        return {"states": torch.cat(_as_long(states), dim=-1), "pooled": pooled}

    def encode_negatives(self, captions: Sequence[Caption]) -> TextStates:
        """No negative prompt is nothing at all, and not the states of no words (Stability's code and A1111; diffusers,
        where a base's model_index.json says `force_zeros_for_empty_prompt`, as the published ones do)."""
        states = self.encode_text(captions)
        for i, caption in enumerate(captions if self.zeros_for_nothing else ()):
            if not "".join(piece if isinstance(piece, str) else piece[0] for piece in caption).strip():
                states = {name: state.index_fill(0, torch.tensor([i], device=state.device), 0.0)
                          for name, state in states.items()}
        return states

    def vocabulary(self, encoder: str) -> Vocabulary:
        return clip.vocabulary(self.tokenizers[encoder], self.encoder(encoder))

    def text_settings(self) -> dict[str, Any]:
        return {"clip_skip": self.clip_skip}

    def spelling(self) -> dict[str, str]:
        return {name: digest_of(tokenizer) for name, tokenizer in self.tokenizers.items()}

    def stack_text(self, states: Sequence[TextStates]) -> TextStates:
        """Captions of unequal length are repeated to a common one, which cross-attention does not notice."""
        length = self.encoder(self.text_encoder_names[-1]).length
        return {"states": clip.stack([state["states"] for state in states], length),
                "pooled": torch.cat([state["pooled"] for state in states])}

    def save_tools(self, folder: Path) -> dict[str, list[str]]:
        for name, tokenizer in self.tokenizers.items():
            write_tokenizer(folder / TOKENIZERS[name], tokenizer)
        return {TOKENIZERS[name]: ["transformers", "CLIPTokenizer"] for name in self.tokenizers}

    @property
    def idle(self) -> tuple[str, ...]:
        """The last layer of a text encoder of which no pooled embedding is taken."""
        found = []
        for name in self.text_encoder_names[:-1]:
            last = self.encoder(name).text_model.config.num_hidden_layers - 1
            found += [f"{name}.text_model.encoder.layers.{last}.", f"{name}.text_model.final_layer_norm"]
        return tuple(found)

    # --- the denoiser --------------------------------------------------------------------------------
    def condition(self, text: TextStates, geometry: Geometry | None = None,
                  extras: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """The UNet's arguments. Without a geometry the picture is a whole one of the native size."""
        told = super().condition(text, geometry, extras)
        return told | {"text_embeds": text["pooled"], "time_ids": self.measures(len(text["pooled"]), geometry, extras)}

    def measures(self, count: int, geometry: Geometry | None, extras: Mapping[str, Tensor] | None) -> Tensor:
        """(B, 6) fp32: original height and width, top and left of the crop, target height and width, in pixels."""
        given = self._whole(count) if geometry is None else geometry
        return torch.cat([given.original, given.crop, given.target], dim=1).float()

    def _whole(self, count: int) -> Geometry:
        side = torch.full((count, 2), float(self.native_size))
        return Geometry(side, torch.zeros(count, 2), side)

    def arguments(self, condition: dict[str, Any]) -> dict[str, Any]:
        added = {name: condition[name] for name in ("text_embeds", "time_ids")}
        return {name: value for name, value in condition.items() if name not in added} | {"added_cond_kwargs": added}


@dataclass(kw_only=True)
class Refiner(SDXL):
    """SDXL's refiner: its last steps, told by the larger text encoder alone, and how beautiful the picture is to be.

    Text states: "states" (B, n·77, 1280), "pooled" (B, 1280).
    """

    family: ClassVar[str] = "sdxl-refiner"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder_2",)
    zeros_for_nothing: ClassVar[bool] = False
    refines: ClassVar[bool] = True

    def measures(self, count: int, geometry: Geometry | None, extras: Mapping[str, Tensor] | None) -> Tensor:
        """(B, 5) fp32: original height and width, top and left of the crop, and the extra "aesthetic_score" (B,)."""
        given = self._whole(count) if geometry is None else geometry
        scores = (extras or {}).get("aesthetic_score", torch.full((count,), WANTED))
        sides = torch.cat([given.original, given.crop], dim=1).float()
        return torch.cat([sides, scores.to(sides)[:, None]], dim=1)

    def sampling_extras(self, unwanted: int, wanted: int) -> dict[str, Tensor]:
        return {"aesthetic_score": torch.tensor([UNWANTED] * unwanted + [WANTED] * wanted)}


def _as_long(states: Sequence[Tensor]) -> list[Tensor]:
    """States (B, l, C) repeated to the least common multiple of their lengths: encoders differ in chunks where a new
    token has more vectors in one of them."""
    most = math.lcm(*(state.shape[1] for state in states))
    return [state if state.shape[1] == most else state.repeat(1, most // state.shape[1], 1) for state in states]
