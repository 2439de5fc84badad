"""Which layers of Stable Diffusion 3's transformer and its text encoders a target word names.

    attention         to_q, to_k, to_v, to_out.0 of the picture, add_q_proj, add_k_proj, add_v_proj, to_add_out of the
                      text, where both attend together (what diffusers' scripts train)
    feed-forward      both linear layers of each block's feed-forward, the picture's and the text's
    text-encoder      q_proj, k_proj, v_proj, out_proj, fc1, fc2 of each layer of both CLIPs
    t5                q, k, v, o, wi_0, wi_1, wo of each layer of T5
    all               every linear layer in the transformer's blocks: the above, the second attention that 3.5 medium
                      has in some (attn2), and what shifts, scales and gates by the time (norm1.linear, …); not what
                      leads in and out, nor the text encoders

Anything else is a regular expression, searched for in the full paths ("transformer.transformer_blocks.0.attn.to_q").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from impasto.core.errors import UserError
from impasto.families.unet_targets import WORDS as UNET_WORDS
from impasto.families.unet_targets import matches, paths, reached

_BLOCKS = r"^transformer\.transformer_blocks\.\d+\."

#: patterns of the words
WORDS = {
    "attention": _BLOCKS + r"attn\.(?:to_(?:q|k|v|out\.0|add_out)|add_[qkv]_proj)$",
    "feed-forward": _BLOCKS + r"ff(?:_context)?\.net\.(?:0\.proj|2)$",
    "text-encoder": UNET_WORDS["text-encoder"],
    "t5": r"^text_encoder_3\.encoder\.block\.\d+\.layer\.\d+\.(?:SelfAttention\.[qkvo]|DenseReluDense\.w(?:i_\d|o))$",
    "all": _BLOCKS,
}

#: words of other families, and why they name nothing here
ABSENT = {
    "cross-attention": "text and picture attend together in this network: say attention, or a regular expression such "
                       "as add_[kv]_proj for the text's part of it",
    "convolutions": "this network has none in its blocks: say feed-forward, or all",
}


def targets(components: Mapping[str, nn.Module], names: Sequence[str], word: str, idle: tuple[str, ...] = ()
            ) -> list[str]:
    """Layer paths that `word` names, in the components `names`; of the words no one names what begins as `idle` says.

    Raises `UserError` with near matches if none.
    """
    if word in ABSENT:
        raise UserError(f"{word!r} names no layer of this base", where="targets", fix=ABSENT[word])
    return reached(matches(paths(components, names, embeddings=word not in WORDS), word, WORDS),
                   idle if word in WORDS else ())
