"""Which layers of a UNet and its text encoders a target word names.

    attention         to_q, to_k, to_v, to_out.0 of self- and cross-attention (what diffusers' scripts train)
    cross-attention   the same four of cross-attention (attn2) alone
    feed-forward      both linear layers of each transformer block's feed-forward
    convolutions      conv1, conv2 and conv_shortcut of ResNet blocks, and those of down- and upsamplers
    text-encoder      q_proj, k_proj, v_proj, out_proj, fc1, fc2 of each layer of each text encoder
    all               every linear layer and convolution in the UNet's down, mid and up blocks: the above, and proj_in,
                      proj_out and time_emb_proj; not conv_in, conv_out, the time embedding nor the text encoders

Anything else is a regular expression, searched for in the full paths ("unet.down_blocks.0.…to_q") of all linear,
convolution and embedding layers of UNet and text encoders. `$` at its end means the end of a path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from impasto.core.errors import UserError, nearest
from impasto.families.parts import hint

_BLOCKS = r"^unet\.(?:down_blocks\.\d+|mid_block|up_blocks\.\d+)\."
_ATTENTION = r"\.to_(?:q|k|v|out\.0)$"

#: patterns of the words
WORDS = {
    "attention": _BLOCKS + r"attentions\..*\.attn[12]" + _ATTENTION,
    "cross-attention": _BLOCKS + r"attentions\..*\.attn2" + _ATTENTION,
    "feed-forward": _BLOCKS + r"attentions\..*\.ff\.net\.(?:0\.proj|2)$",
    "convolutions": _BLOCKS + r"(?:resnets\.\d+\.(?:conv1|conv2|conv_shortcut)|(?:down|up)samplers\.\d+\.conv)$",
    "text-encoder": r"^text_encoder(?:_\d+)?\.text_model\.encoder\.layers\.\d+\."
                    r"(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])$",
    "all": _BLOCKS,
}

#: patterns of more words of full fine-tuning, on paths of parameters
PARTS = {
    "keys-values": _BLOCKS + r"attentions\..*\.attn2\.to_[kv]\.",
    "mid-block": r"^unet\.mid_block\.",
}

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def targets(components: Mapping[str, nn.Module], names: Sequence[str], word: str, idle: tuple[str, ...] = ()
            ) -> list[str]:
    """Layer paths that `word` names, in the components `names`; of the words no one names what begins as `idle` says.

    Raises `UserError` with near matches if none.
    """
    return reached(matches(paths(components, names, embeddings=word not in WORDS), word, WORDS),
                   idle if word in WORDS else ())


def reached(found: list[str], idle: tuple[str, ...]) -> list[str]:
    """Those of the paths that do not begin so."""
    return [path for path in found if not path.startswith(idle)]


def paths(components: Mapping[str, nn.Module], names: Sequence[str], embeddings: bool = True) -> list[str]:
    """Full paths of all layers that can carry a delta."""
    kinds = (*_LAYERS, nn.Embedding) if embeddings else _LAYERS
    return [f"{name}.{path}" for name in names for path, module in components[name].named_modules()
            if isinstance(module, kinds)]


def matches(known: Sequence[str], word: str, words: Mapping[str, str]) -> list[str]:
    """Those of the paths `known` that a word of `words`, or a regular expression, names."""
    try:
        pattern = re.compile(words.get(word, word))
    except re.error as error:
        raise UserError(f"{word!r} is neither a word nor a regular expression ({error})", where="targets",
                        fix=nearest(word, words)) from None
    found = [path for path in known if pattern.search(path)] if word else []
    if not found:
        raise UserError(f"{word!r} names no layer of this base", where="targets", fix=_hint(word, known, words))
    return found


def _hint(word: str, known: Sequence[str], words: Mapping[str, str]) -> str:
    """The words, last parts of paths, and paths that are nearest to `word`."""
    candidates = [*words, *dict.fromkeys(path.rsplit(".", 1)[-1] for path in known), *known]
    return hint(word, candidates, words)
