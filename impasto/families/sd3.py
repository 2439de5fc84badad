"""Stable Diffusion 3 and 3.5: a transformer in which text and picture attend together, told by two CLIPs and by T5.

Esser et al. 2024. How the text states are put together: diffusers' StableDiffusion3Pipeline, and Stability's own code
(github.com/Stability-AI/sd3.5, `sd3_infer.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from impasto.core.errors import UserError
from impasto.core.progress import Reporter
from impasto.diffusion.process import RectifiedFlow
from impasto.families import clip, mmdit_targets, t5
from impasto.families.base import Caption, Geometry, TextStates
from impasto.families.latent_base import LatentBase
from impasto.families.networks import ClipText, T5Text
from impasto.families.parts import Places
from impasto.families.tokenizer import digest_of, t5_tokenizer, write_tokenizer
from impasto.families.tokens import Vocabulary

if TYPE_CHECKING:
    from impasto.formats.checkpoint import Checkpoint

#: the tokenizer of each CLIP, and T5's
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
T5_ENCODER, T5_TOKENIZER = "text_encoder_3", "tokenizer_3"


@dataclass(kw_only=True)
class SD3(LatentBase):
    """Stable Diffusion 3. Text states: "clip" (B, 77, 2048), both CLIPs' side by side, of the last layer but one;
    "t5" (B, `t5_length`, 4096); "pooled" (B, 2048).

    Of a longer caption CLIP reads the first chunk, 75 tokens, and T5 what fits into its length: the text attends too,
    so that a caption repeated or filled up for the sake of its neighbours would draw another picture.
    """

    family: ClassVar[str] = "sd3"
    denoiser_name: ClassVar[str] = "transformer"
    text_encoder_names: ClassVar[tuple[str, ...]] = (*TOKENIZERS, T5_ENCODER)
    own_options: ClassVar[Mapping[str, type]] = {"t5": bool, "t5_length": int, "mask_padding": bool}
    longest: ClassVar[int | None] = 75
    refuses: ClassVar[Mapping[str, str]] = {
        "hypernetwork": "its keys and values are made of text and picture together, and no program reads such a file"}

    tokenizers: dict[str, CLIPTokenizer] = field(default_factory=dict)
    t5_tokenizer: T5Tokenizer | None = None
    #: layers of both CLIPs left out at the end, beside the last, which SD 3 never uses
    clip_skip: int = 0
    #: tokens of T5's sequence (diffusers: 256; Stability's code: 77)
    t5_length: int = 256
    #: whether T5 does not read what fills its sequence up (see `t5`). Encoded captions then take the room of what they
    #: say; the published models were trained otherwise
    mask_padding: bool = False

    # --- loading -------------------------------------------------------------------------------------
    @classmethod
    def chosen(cls, checkpoints: Mapping[str, Checkpoint], own: dict[str, Any], report: Reporter
               ) -> tuple[type[Self], dict[str, Any]]:
        """Without T5 where that is not wanted, or not there."""
        if not set(TOKENIZERS) & checkpoints.keys():
            raise UserError("holds no text encoders", where=next(iter(checkpoints.values())).path,
                            fix="name their files (base.text_encoders, or --text-encoder), or take the file that has "
                            "them, or a diffusers folder")
        wanted = own.get("t5", True)
        own = {name: value for name, value in own.items() if name != "t5"}
        if (why := _no_t5(checkpoints)) and wanted:
            report.note(f"goes on without T5, which understands long captions: {why}")
        return cast(type[Self], WithoutT5) if why or not wanted else cls, own

    @classmethod
    def tools(cls, checkpoints: Mapping[str, Checkpoint], clip_skip: int) -> dict[str, Any]:
        words = t5_tokenizer(checkpoints[T5_ENCODER].tokenizers[T5_TOKENIZER]) if T5_ENCODER in cls.text_encoder_names \
            else None
        return {"tokenizers": {name: clip.tokenizer_of(checkpoints[name], cls.family, tokenizer)
                               for name, tokenizer in TOKENIZERS.items()},
                "t5_tokenizer": words, "clip_skip": clip_skip}

    def check(self) -> None:
        transformer, pooled, width = self.config("transformer"), 0, 0
        wanted = long = transformer.joint_attention_dim
        for name, tokenizer in self.tokenizers.items():
            width += self.check_encoder(name, tokenizer, self.clip_skip, least=1)
            pooled += self.clip(name).text_projection.out_features
        if self.t5 is not None and self.t5_tokenizer is not None:
            long = self.t5.config.d_model
            if len(self.t5_tokenizer) > self.t5.config.vocab_size:
                raise UserError(f"{T5_TOKENIZER} knows {len(self.t5_tokenizer)} tokens, T5 {self.t5.config.vocab_size}",
                                where=self.source, fix="give the tokenizer that belongs to it")
        for what, made, known in (("channels", max(width, wanted), wanted),  # what CLIPs lack is filled up
                                  ("channels", long, wanted),
                                  ("pooled channels", pooled, transformer.pooled_projection_dim),
                                  ("channels of latents", self.latent_channels, transformer.in_channels)):
            if made != known:
                raise UserError(f"its other networks make {made} {what}, the transformer wants {known}",
                                where=self.source, fix="its components are of different models")
        if not isinstance(self.process, RectifiedFlow):
            raise UserError("its scheduler is of no rectified flow, as this family is", where=self.source,
                            fix="take FlowMatchEulerDiscreteScheduler's configuration")

    # --- text ----------------------------------------------------------------------------------------
    def clip(self, name: str) -> ClipText:
        """A CLIP."""
        return cast(ClipText, self.components[name])

    @property
    def t5(self) -> T5Text | None:
        """T5, if it is there."""
        return cast(T5Text | None, self.components.get(T5_ENCODER))

    def encode_text(self, captions: Sequence[Caption]) -> TextStates:
        each = [clip.encode_unnormed(captions, tokenizer, self.clip(name), 1 + self.clip_skip, self.tokens.of(name),
                                     most=1) for name, tokenizer in self.tokenizers.items()]
        found = {"clip": torch.cat([states for states, _ in each], dim=-1),
                 "pooled": torch.cat([pooled for _, pooled in each if pooled is not None], dim=-1)}
        if self.t5 is not None and self.t5_tokenizer is not None:
            found["t5"] = t5.encode(captions, self.t5_tokenizer, self.t5, self.t5_length, self.tokens.of(T5_ENCODER),
                                    masked=self.mask_padding)
        return found

    def vocabulary(self, encoder: str) -> Vocabulary:
        if encoder == T5_ENCODER and self.t5 is not None and self.t5_tokenizer is not None:
            return t5.vocabulary(self.t5_tokenizer, self.t5, self.t5_length)
        return clip.vocabulary(self.tokenizers[encoder], self.clip(encoder))

    @property
    def token_encoders(self) -> tuple[str, ...]:
        """The CLIPs: the way back through T5's 4.7 billion weights costs more than all else in a step."""
        return tuple(self.tokenizers)

    def text_settings(self) -> dict[str, Any]:
        own = {"t5_length": self.t5_length, "mask_padding": self.mask_padding} if self.t5 is not None else {}
        return {"clip_skip": self.clip_skip, **own}

    def spelling(self) -> dict[str, str]:
        t5 = {T5_ENCODER: digest_of(self.t5_tokenizer)} if self.t5_tokenizer is not None else {}
        return {name: digest_of(tokenizer) for name, tokenizer in self.tokenizers.items()} | t5

    def own_settings(self) -> dict[str, Any]:
        if self.t5 is None:
            return {"t5": False}
        own = {"t5_length": self.t5_length, "mask_padding": self.mask_padding}
        return {name: value for name, value in own.items() if value != getattr(SD3, name)}

    def stack_text(self, states: Sequence[TextStates]) -> TextStates:
        """T5's states, where they are of unequal length, end in zeros, as they would up to the full length."""
        found = {name: torch.cat([state[name] for state in states]) for name in ("clip", "pooled")}
        if "t5" in states[0]:
            most = max(state["t5"].shape[1] for state in states)
            found["t5"] = torch.cat([_filled(state["t5"], most) for state in states])
        return found

    def save_tools(self, folder: Path) -> dict[str, list[str]]:
        for name, tokenizer in self.tokenizers.items():
            write_tokenizer(folder / TOKENIZERS[name], tokenizer)
        told = {TOKENIZERS[name]: ["transformers", "CLIPTokenizer"] for name in self.tokenizers}
        if self.t5_tokenizer is not None:
            self.t5_tokenizer.save_pretrained(str(folder / T5_TOKENIZER))
            told[T5_TOKENIZER] = ["transformers", "T5TokenizerFast"]
        return told

    # --- the denoiser --------------------------------------------------------------------------------
    @property
    def grid(self) -> int:
        return self.cell * self.config("transformer").patch_size

    def condition(self, text: TextStates, geometry: Geometry | None = None,
                  extras: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """The transformer's arguments: CLIP's states, filled up with zeros to T5's width, then T5's along the sequence,
        or zeros in their place where there is no T5."""
        clips, width = text["clip"], self.config("transformer").joint_attention_dim
        long = text.get("t5", clips.new_zeros(len(clips), 0, width))
        states = torch.cat([F.pad(clips, (0, width - clips.shape[-1])), _filled(long, self.t5_length)], dim=1)
        return {"encoder_hidden_states": states, "pooled_projections": text["pooled"]}

    def predict(self, latents: Tensor, time: Tensor, condition: dict[str, Any]) -> Tensor:
        """The prediction, computed in the precision of the transformer's weights, in that of `latents`.

        Raises `UserError` for pictures larger than its table of positions.
        """
        config = self.config("transformer")
        if max(latents.shape[2:]) > config.pos_embed_max_size * config.patch_size:
            raise UserError(f"draws no picture with a side above {config.pos_embed_max_size * self.grid} pixels",
                            where=self.source or self.family, fix="take a smaller size")
        weight = next(self.denoiser.parameters())
        told = {name: value.to(weight.device, weight.dtype) for name, value in condition.items()}
        steps = cast(RectifiedFlow, self.process).num_train_timesteps
        out = self.denoiser(latents.to(weight.device, weight.dtype), timestep=time.to(weight.device) * steps, **told,
                            return_dict=False)[0]
        return out.to(latents.dtype)

    def targets(self, word: str) -> list[str]:
        """See `mmdit_targets` for the exact set that each word names."""
        return mmdit_targets.targets(self.components, (self.denoiser_name, *self.text_encoder_names), word, self.idle)

    def parts(self, word: str) -> list[str]:
        """See `parts` for what each word names."""
        return Places(self.components, self.denoiser_name, self.text_encoder_names, {}, list(mmdit_targets.WORDS),
                      self.targets, self.idle).find(word)

    @property
    def idle(self) -> tuple[str, ...]:
        """The text's queries in the last block, which makes no more of the text."""
        last = f"transformer.transformer_blocks.{self.config('transformer').num_layers - 1}.attn."
        return (f"{last}add_q_proj", f"{last}norm_added_q")

    def key_value_layers(self) -> list[tuple[str, str, int]]:
        """None: see `refuses`."""
        return []


@dataclass(kw_only=True)
class WithoutT5(SD3):
    """Stable Diffusion 3 without T5, which draws what short captions say as well. Text states: "clip", "pooled"."""

    text_encoder_names: ClassVar[tuple[str, ...]] = tuple(TOKENIZERS)


def _no_t5(checkpoints: Mapping[str, Checkpoint]) -> str:
    """Why there is no T5; "" if there is."""
    if T5_ENCODER not in checkpoints:
        return "the checkpoint holds none"
    if T5_TOKENIZER not in checkpoints[T5_ENCODER].tokenizers:
        return f"there is no {T5_TOKENIZER}; put that folder, of a diffusers folder of this model, beside the file"
    return ""


def _filled(states: Tensor, length: int) -> Tensor:
    """States (B, l, C) with zeros up to (B, length, C)."""
    return F.pad(states, (0, 0, 0, length - states.shape[1]))
