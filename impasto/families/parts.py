"""Which weights of a base a word of full fine-tuning names, as paths of parameters ("unet.conv_in.weight").

    unet, text-encoder, vae   all of it; text-encoder is all of them, embeddings included
    vae-decoder               the VAE without what makes latents: decoder and post_quant_conv
    a target word             weights and biases of the layers that it names (see `unet_targets`): attention,
                              cross-attention, feed-forward, convolutions, all
    keys-values               to_k and to_v of cross-attention: what Custom Diffusion trains (Kumari et al. 2022,
                              arXiv:2212.04488)
    mid-block                 the block at the bottom of the UNet
    norms                     weights and biases of all the denoiser's norms
    biases                    all the denoiser's biases, those of norms included (BitFit, Zaken et al. 2021,
                              arXiv:2106.10199)
    down_blocks.1, …          a path: what lies there, in the denoiser, or in the component that it begins with
                              ("vae.decoder.conv_out", "text_encoder.text_model.final_layer_norm.bias")

Anything else is a regular expression, searched for in the full paths of the parameters of denoiser and text
encoders; one that begins with vae, in those of the VAE.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from impasto.core.errors import UserError
from impasto.deltas.layers import NORMS

#: words of this module's own, beside target words and patterns
OWN = ("unet", "text-encoder", "vae", "vae-decoder", "norms", "biases")


@dataclass(frozen=True)
class Places:
    """Where to look: a base's components, and what its family calls things."""

    components: Mapping[str, nn.Module]
    denoiser: str
    encoders: Sequence[str]
    #: what else has a word: regular expressions on paths of parameters
    patterns: Mapping[str, str]
    #: target words, and the layers that one names
    targets: Sequence[str]
    layers: Callable[[str], list[str]]
    #: the beginnings of what nothing computes with: it comes along with no word, and with no path of more than it
    idle: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        return list(dict.fromkeys((*OWN, *self.patterns, *self.targets)))

    def find(self, word: str) -> list[str]:
        """Paths of the parameters that `word` names. Raises `UserError` with near matches if none."""
        found = self._by_word(word) or self._at_path(word)
        found = [path for path in found if not path.startswith(self.idle)] or found or self._by_pattern(word)
        if not found:
            raise UserError(f"{word!r} names no weight of this base", where="parts", fix=self._hint(word))
        return found

    def _by_word(self, word: str) -> list[str]:
        unet = self.denoiser
        match word:
            case "unet":
                return self._all(unet)
            case "text-encoder":
                return [path for name in self.encoders for path in self._all(name)]
            case "vae":
                return self._all("vae")
            case "vae-decoder":
                return [path for path in self._all("vae") if path.startswith(("vae.decoder.", "vae.post_quant_conv."))]
            case "norms":
                return [f"{unet}.{path}.{leaf}" for path, module in self.components[unet].named_modules()
                        if isinstance(module, NORMS) for leaf, _ in module.named_parameters()]
            case "biases":
                return [path for path in self._all(unet) if path.endswith(".bias")]
            case _ if word in self.patterns:
                return [path for path in self._all(unet) if re.search(self.patterns[word], path)]
            case _ if word in self.targets:
                layers = set(self.layers(word))
                return [path for name in (unet, *self.encoders) for path in self._all(name)
                        if path.rpartition(".")[0] in layers]
        return []

    def _at_path(self, word: str) -> list[str]:
        """What lies at that path, or in the denoiser below it."""
        for start in (word, f"{self.denoiser}.{word}"):
            name = start.partition(".")[0]
            if name in self.components and (found := [path for path in self._all(name) if
                                                      path == start or path.startswith(f"{start}.")]):
                return found
        return []

    def _by_pattern(self, word: str) -> list[str]:
        try:
            pattern = re.compile(word)
        except re.error as error:
            raise UserError(f"{word!r} is neither a word, nor a path, nor a regular expression ({error})",
                            where="parts", fix=self._hint(word)) from None
        return [path for path in self._searched(word) if pattern.search(path)] if word else []

    def _searched(self, word: str) -> list[str]:
        """The paths among which a regular expression is looked for."""
        names = ("vae",) if word.lstrip("^").startswith("vae") else (self.denoiser, *self.encoders)
        return [path for name in names for path in self._all(name)]

    def _all(self, component: str) -> list[str]:
        return [f"{component}.{path}" for path, _ in self.components[component].named_parameters()]

    def _hint(self, word: str) -> str:
        """Words, paths and parts of paths that are nearest."""
        plain = re.sub(r"\\(?=\.)|[\^$\[\]]", "", word)
        known = dict.fromkeys((*self.words, *(start for path in self._searched(word) for start in _starts(path))))
        return hint(plain, known, self.words)


def hint(word: str, known: Iterable[str], words: Iterable[str]) -> str:
    """Those of `known` that are nearest to `word`; all `words` where none is."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return "did you mean " + " or ".join(map(repr, close)) + "?" if close else "words: " + ", ".join(words)


def _starts(path: str) -> Iterable[str]:
    """Of unet.a.b.c: a, a.b, a.b.c, and each part by itself."""
    parts = path.split(".")[1:]
    return [*(".".join(parts[:n]) for n in range(1, len(parts) + 1)), *parts]
