"""Stable Diffusion 1.x: one CLIP text encoder (ViT-L/14), a UNet of 860 M weights, a VAE of factor 8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from transformers import CLIPTokenizer

from impasto.families import clip
from impasto.families.base import Caption, TextStates
from impasto.families.networks import ClipText
from impasto.families.tokenizer import digest_of, write_tokenizer
from impasto.families.tokens import Vocabulary
from impasto.families.unet_base import UNetBase

if TYPE_CHECKING:
    from impasto.formats.checkpoint import Checkpoint


@dataclass(kw_only=True)
class SD1(UNetBase):
    """Stable Diffusion 1.x. Text states: "states" (B, n·77, 768) for captions of up to n chunks."""

    family: ClassVar[str] = "sd1"
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)

    tokenizer: CLIPTokenizer
    #: text encoder layers left out at the end; 0 is the last one (A1111 and kohya call that clip skip 1)
    clip_skip: int = 0

    @classmethod
    def tools(cls, checkpoints: Mapping[str, Checkpoint], clip_skip: int) -> dict[str, Any]:
        return {"tokenizer": clip.tokenizer_of(checkpoints["text_encoder"], cls.family), "clip_skip": clip_skip}

    def check(self) -> None:
        super().check()
        self.check_text({"text_encoder": self.tokenizer}, self.clip_skip)

    @property
    def text_encoder(self) -> ClipText:
        return cast(ClipText, self.components["text_encoder"])

    def encode_text(self, captions: Sequence[Caption]) -> TextStates:
        words = self.tokens.of("text_encoder")
        return {"states": clip.encode(captions, self.tokenizer, self.text_encoder, self.clip_skip, words)}

    def vocabulary(self, encoder: str) -> Vocabulary:
        return clip.vocabulary(self.tokenizer, self.text_encoder)

    def save_tools(self, folder: Path) -> dict[str, list[str]]:
        write_tokenizer(folder / "tokenizer", self.tokenizer)
        return {"tokenizer": ["transformers", "CLIPTokenizer"]}

    def text_settings(self) -> dict[str, Any]:
        return {"clip_skip": self.clip_skip}

    def spelling(self) -> dict[str, str]:
        return {"text_encoder": digest_of(self.tokenizer)}

    def stack_text(self, states: Sequence[TextStates]) -> TextStates:
        """Captions of unequal length are repeated to a common one, which cross-attention does not notice."""
        return {"states": clip.stack([state["states"] for state in states], self.text_encoder.length)}
