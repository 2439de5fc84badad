"""Textual inversion: new words for the text encoder, and nothing else (Gal et al. 2022, arXiv:2208.01618)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pydantic
from pydantic import Field

from impasto.core.counts import check_steps, steps_of
from impasto.core.errors import UserError
from impasto.methods.base import Method, MethodOptions, switched_off

if TYPE_CHECKING:
    from torch import Tensor, nn

    from impasto.deltas.adapter import Adapter
    from impasto.families.base import Base
    from impasto.families.tokens import TokenVectors

#: what a token's name cannot hold: a dot ends it in files of several tokens, brackets are weights in prompts
FORBIDDEN = re.compile(r"[.()\[\]\\]")


#: descriptions of what one token and each of several have
VECTORS = ("Vectors of the token: more of them reconstruct no better and edit worse, says the paper (default 1, "
           "diffusers; or as many as initial_file has).")
INITIAL = ("Words whose vectors it begins as, spread over its own in their order (A1111's practice); more words than "
           "vectors are averaged.")
INITIAL_FILE = "An embedding file that it begins as."


class TokenOptions(pydantic.BaseModel):
    """One token: how many vectors, and what they begin as."""

    model_config = pydantic.ConfigDict(extra="forbid")

    vectors: int | None = Field(None, ge=1, description=VECTORS)
    initial: str | None = Field(None, min_length=1, description=INITIAL)
    initial_file: str | None = Field(None, description=INITIAL_FILE)

    @pydantic.model_validator(mode="after")
    def _one_beginning(self) -> TokenOptions:
        if self.initial is not None and self.initial_file is not None:
            raise ValueError("give initial or initial_file, not both")
        return self


class TextualInversion(Method):
    """Trains the vectors of new tokens, in fp32; every weight of the base stays as it is."""

    class Options(MethodOptions):
        #: diffusers' 5e-4, which it multiplies by the pictures of a step: 2e-3 at four. A1111 and the paper's code
        #: begin with 5e-3, OneTrainer with 3e-4
        recommended: ClassVar[float | None] = 5e-4

        kind: Literal["textual_inversion"] = "textual_inversion"
        learning_rate: float | None = Field(
            None, gt=0, description="Rate of the vectors; default: train.learning_rate, or where that is left out too "
            "5e-4 (diffusers', for each picture of a step: it recommends 2e-3 at four; A1111 5e-3, OneTrainer 3e-4).")
        token: str | None = Field(None, description="The new token as captions and prompts spell it, such as "
                                  "\"<cat>\" or \"sks cat\".")
        vectors: int | None = Field(None, ge=1, description=VECTORS)
        initial: str | None = Field(None, min_length=1, description=INITIAL)
        initial_file: str | None = Field(None, description=INITIAL_FILE)
        tokens: dict[str, TokenOptions] = Field(
            {}, description="Several tokens instead: a table for each by its name, with vectors, initial and "
            "initial_file. A token without a beginning is drawn at random as the vocabulary's vectors lie.")
        norm_penalty: float = Field(
            0.1, ge=0, allow_inf_nan=False, description="Weight of the squared difference between the mean norm of the "
            "vectors and the vocabulary's, which keeps them where the encoder knows its way; 0: none.")
        project: bool = Field(False, description="Whether each vector is brought back to the vocabulary's mean norm "
                              "after each step.")
        stop: int | float | None = Field(None, gt=0, description="Steps after which the vectors rest; a share of all "
                                         "steps if less than 1 (pivotal tuning: 0.5, diffusers' advanced scripts).")

        @pydantic.model_validator(mode="after")
        def _named(self) -> TextualInversion.Options:
            if (self.token is None) == (not self.tokens):
                raise ValueError("give token or tokens" if self.token is None else "give token or tokens, not both")
            if self.tokens and {self.vectors, self.initial, self.initial_file} != {None}:
                raise ValueError("vectors, initial and initial_file belong to token; in tokens each has its own")
            check_steps(self.stop, "a stop")
            for name in self.wanted:
                if not name or name != name.strip() or FORBIDDEN.search(name):
                    raise ValueError(f"{name!r} cannot be a token: dots, brackets, backslashes and spaces around it "
                                     "mean other things in prompts and files")
            return self

        @property
        def wanted(self) -> dict[str, TokenOptions]:
            """Each token's own options."""
            if self.token is None:
                return self.tokens
            return {self.token: TokenOptions(vectors=self.vectors, initial=self.initial,
                                             initial_file=self.initial_file)}

    options: Options
    formats = ("kohya", "webui-embedding", "diffusers-embedding")

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        #: by text encoder, then by token
        self.trained: dict[str, dict[str, TokenVectors]] = {}
        self.norms: dict[str, Tensor] = {}  # the vocabulary's mean norm in each text encoder
        self.notes: list[str] = []
        self.until = math.inf

    def check(self, base: Base) -> None:
        for encoder in base.token_encoders:
            self._beginnings(base, encoder, 0)

    def _beginnings(self, base: Base, encoder: str, seed: int) -> dict[str, tuple[Tensor, list[str]]]:
        """Each token's first vectors in a text encoder, and lines for the user. Raises `UserError`."""
        from impasto.methods import token_values

        vocabulary = base.vocabulary(encoder)
        made: dict[str, tuple[Tensor, list[str]]] = {}
        for token, options in self.options.wanted.items():
            token_values.check_name(token, encoder, vocabulary, base.tokens.of(encoder), made)
            made[token] = token_values.beginning(token, options, encoder, vocabulary, seed)
        return made

    def prepare(self, base: Base, seed: int) -> list[dict[str, Any]]:
        """Add the tokens to the base; one parameter group for each text encoder."""
        from impasto.families.tokens import TokenVectors
        from impasto.methods.token_values import mean_norm

        self.base = base
        groups = []
        for encoder in base.token_encoders:
            table, own = base.vocabulary(encoder).table.weight, dict[str, TokenVectors]()
            for token, (values, notes) in self._beginnings(base, encoder, seed).items():
                own[token] = TokenVectors(values.to(table.device))
                self.notes += [line for line in notes if line not in self.notes]
            self.norms[encoder], self.trained[encoder] = mean_norm(table), own
            groups.append({"params": [module.vectors for module in own.values()],
                           "paths": [f"{encoder}.{token}" for token in own], "lr": self.options.learning_rate,
                           "name": f"textual_inversion {encoder}"})
        tokens = {token: {encoder: own[token].vectors for encoder, own in self.trained.items()}
                  for token in self.options.wanted}
        self.added = base.tokens.add(tokens)
        return groups

    def modules(self) -> dict[str, nn.Module]:
        """The vectors, by text encoder and token."""
        return {f"{encoder}.{token}": module for encoder, own in self.trained.items()
                for token, module in own.items()}

    def trains(self, base: Base) -> frozenset[str]:
        """The text encoders that learn them: what is learned lies upstream of every state that they make."""
        return frozenset(base.token_encoders)

    def begin(self, total: int) -> None:
        if self.options.stop is not None:
            self.until = steps_of(self.options.stop, total)

    def remarks(self) -> list[str]:
        return self.notes

    def look(self, captions: Iterable[str]) -> None:
        """Raises `UserError` if one of the tokens is in no caption."""
        missing, seen = set(self.options.wanted), ""
        words = self.base.tokens.of(next(iter(self.trained)))
        assert words is not None
        for caption in captions:
            seen = seen or caption
            missing -= words.within(caption)
            if not missing:
                return
        token = min(missing)
        raise UserError(f"no caption contains the token {token!r}, and nothing could be learned of it",
                        where="method textual_inversion",
                        fix=f"write it into the captions, as in data.caption=\"a photo of {token}\""
                        + (f" (they begin with {seen[:60]!r})" if seen else ""))

    def penalty(self) -> Tensor | None:
        """The weight times (mean norm of the vectors - mean norm of the vocabulary)², over all text encoders."""
        if not self.options.norm_penalty:
            return None
        import torch

        gaps = [torch.cat([module.vectors for module in own.values()]).norm(dim=1).mean() - self.norms[encoder]
                for encoder, own in self.trained.items()]
        return self.options.norm_penalty * torch.stack(gaps).square().sum()

    def after_step(self, step: int) -> None:
        """Project, if asked to, while the vectors train."""
        import torch

        if self.options.project and step < self.until:
            with torch.no_grad():
                for encoder, own in self.trained.items():
                    for module in own.values():
                        norms = module.vectors.norm(dim=1, keepdim=True)
                        module.vectors.mul_(self.norms[encoder] / norms.clamp(min=1e-12))

    def resting(self, step: int) -> Iterable[nn.Parameter]:
        if step < self.until:
            return ()
        return [module.vectors for own in self.trained.values() for module in own.values()]

    def off(self) -> AbstractContextManager[None]:
        """Its names are then words like others."""
        return switched_off(self.added)

    def adapter(self) -> Adapter:
        from impasto.deltas.adapter import Adapter

        return Adapter({}, family=self.base.family, embeddings={
            token: {encoder: own[token].vectors.detach().cpu().clone() for encoder, own in self.trained.items()}
            for token in self.options.wanted})
