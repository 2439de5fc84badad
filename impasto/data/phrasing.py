"""From a caption as it was read to what the model is told in one use: a line of several, wildcards, tags, the template.

All chance comes from a `Draw`, a pure function of what it is asked for; the run's is one of (seed, step, sample).
The order: a line and its alternatives are chosen, tags are left out and shuffled, the template is filled, and what is
longer than asked for is cut.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from impasto.data.options import PLACES, DataOptions
from impasto.families import prompts

if TYPE_CHECKING:
    from impasto.families.base import Caption

#: a whole number in [0, 2^63) for a use by name: the same for the same name
Draw = Callable[[str], int]

#: a picture with more captions than so many has them encoded in each step
MOST_VARIANTS = 16

#: alternatives that hold no others
_WILDCARD = re.compile(r"\{([^{}]*\|[^{}]*)\}")
#: where the caption goes, while a template's own alternatives are chosen
_PLACE = "\0"


@dataclass(frozen=True)
class Phrasing:
    """What is done with captions: the keys of `[data]` that say so."""

    template: str | None = None
    shuffle: bool = False
    keep: int = 0
    keep_separator: str = "|||"
    separator: str = ","
    dropout: float = 0.0
    wildcards: bool = False
    weights: bool = False
    max_tokens: int | None = None

    @classmethod
    def of(cls, data: DataOptions) -> Phrasing:
        """The phrasing that a recipe asks for."""
        return cls(data.caption_template, data.shuffle_tags, data.keep_tags, data.keep_tags_separator,
                   data.tag_separator, data.tag_dropout, data.wildcards, data.caption_weights, data.max_tokens)

    @property
    def endless(self) -> bool:
        """Whether a caption has more variants than anybody would encode beforehand."""
        return self.shuffle or self.dropout > 0

    @property
    def facts(self) -> list[tuple[str, object]]:
        """What differs from captions as they are written, for fingerprints."""
        return [(name, value) for name, value in asdict(self).items() if value != getattr(PLAIN, name)]

    # --- one use -----------------------------------------------------------------------------------------
    def say(self, text: str, draw: Draw) -> str:
        """The caption of one use. An empty one stays empty."""
        if not text:
            return ""
        if self.wildcards:
            lines = text.split("\n")
            text = _choose(lines[draw("line") % len(lines)], draw, "wildcard")
        template = self._template
        if template is not None and self.wildcards:
            template = _choose(template, draw, "template")
        return self._fill(template, self._tagged(text, draw))

    def plain(self, text: str) -> str:
        """The caption without chance: the first line, first alternatives, all tags in their order."""
        return self._without_chance.say(text, _first)

    def body(self, text: str) -> str:
        """`plain` without the template: what the caption's own tags are."""
        return Phrasing(keep_separator=self.keep_separator, separator=self.separator, wildcards=self.wildcards,
                        weights=self.weights).say(text, _first)

    def variants(self, text: str) -> list[str] | None:
        """All captions that this one may become, or None where they are endless or more than `MOST_VARIANTS`."""
        if self.endless:
            return None
        if not text or not self.wildcards:
            return [self.say(text, _first)]
        enough = 4 * MOST_VARIANTS  # some of them may be the same
        bodies = list(itertools.islice((body for line in text.split("\n") for body in _expansions(line)), enough + 1))
        template = self._template
        templates = [None] if template is None else list(itertools.islice(_expansions(template), enough + 1))
        if len(bodies) * len(templates) > enough:
            return None
        found = dict.fromkeys(self._fill(one, self._tagged(body, _first)) for one in templates for body in bodies)
        return list(found) if len(found) <= MOST_VARIANTS else None

    def has_choice(self, text: str) -> bool:
        """Whether it has several lines or wildcards, one of which is chosen."""
        return self.wildcards and ("\n" in text or bool(_WILDCARD.search(f"{self._template or ''} {text}")))

    def encoded_as(self, caption: str) -> Caption:
        """A finished caption as the text encoder takes it: pieces with weights where they are asked for, and cut."""
        pieces = prompts.parse(caption) if self.weights else [(caption, 1.0)]
        if self.max_tokens is not None:
            from impasto.data.wording import cut_to

            pieces, _ = cut_to(pieces, self.max_tokens)
        return pieces[0][0] if len(pieces) == 1 and pieces[0][1] == 1.0 else pieces

    def lost(self, text: str) -> str:
        """What `max_tokens` cuts off a caption as it is written."""
        if self.max_tokens is None:
            return ""
        from impasto.data.wording import cut_to

        caption = self.plain(text)
        return cut_to(prompts.parse(caption) if self.weights else [(caption, 1.0)], self.max_tokens)[1]

    # --- how ---------------------------------------------------------------------------------------------
    @property
    def _without_chance(self) -> Phrasing:
        return Phrasing(**asdict(self) | {"shuffle": False, "dropout": 0.0}) if self.endless else self

    @property
    def _template(self) -> str | None:
        """The template, its places marked."""
        if self.template is None:
            return None
        return functools.reduce(lambda template, place: template.replace(place, _PLACE), PLACES, self.template)

    def _fill(self, template: str | None, body: str) -> str:
        if template is None:
            return body
        filled = template.replace(_PLACE, body).strip()
        return filled if body else filled.strip(f"{self.separator} ")

    def _tagged(self, text: str, draw: Draw) -> str:
        """Tags in this use's order, without those that are left out. Text that nothing is to be done with stays."""
        separate = bool(self.keep_separator) and self.keep_separator in text
        if not (separate or self.endless):
            return text.strip() if self.wildcards else text
        if separate:
            first, _, rest = text.partition(self.keep_separator)
            middle, _, last = rest.partition(self.keep_separator)
            kept, free, end = (self.tags(part) for part in (first, middle, last))
        else:
            tags = self.tags(text)
            kept, free, end = tags[:self.keep], tags[self.keep:], []
        order = list(range(len(free)))
        if self.dropout:
            order = [i for i in order if draw(f"tag {i} left out") / 2**63 >= self.dropout]
        if self.shuffle:
            order.sort(key=lambda i: draw(f"tag {i}"))
        between = self.separator if self.separator[-1].isspace() else f"{self.separator} "
        return between.join([*kept, *(free[i] for i in order), *end])

    def tags(self, text: str) -> list[str]:
        """The tags of a text; a separator inside brackets with a weight is none where weights are read."""
        parts = text.split(self.separator)
        if self.weights:
            parts = _closed(parts, self.separator)
        return [part.strip() for part in parts if part.strip()]


#: captions as they are written
PLAIN = Phrasing()


def _first(use: str) -> int:
    """No chance at all."""
    return 0


def _choose(text: str, draw: Draw, use: str) -> str:
    """The text with one of each alternatives, inner ones first."""
    for i in itertools.count():
        match = _WILDCARD.search(text)
        if match is None:
            return text
        alternatives = match[1].split("|")
        chosen = alternatives[draw(f"{use} {i}") % len(alternatives)]
        text = text[:match.start()] + chosen + text[match.end():]
    raise AssertionError("the count is endless")


def _expansions(text: str) -> Iterator[str]:
    """All that `_choose` may make of a text, some perhaps twice."""
    waiting = [text]
    while waiting:
        text = waiting.pop()
        match = _WILDCARD.search(text)
        if match is None:
            yield text
        else:
            waiting += [text[:match.start()] + each + text[match.end():] for each in reversed(match[1].split("|"))]


def _closed(parts: list[str], separator: str) -> list[str]:
    """Neighbours joined again where a bracket was open between them; one that is never closed joins nothing."""
    joined: list[str] = []
    start = 0
    while start < len(parts):
        depth, end = 0, start
        for end in range(start, len(parts)):
            depth += _depth(parts[end])
            if depth <= 0:
                break
        if depth > 0:
            end = start
        joined.append(separator.join(parts[start:end + 1]))
        start = end + 1
    return joined


def _depth(part: str) -> int:
    """Brackets opened less brackets closed, without those behind a backslash."""
    bare = re.sub(r"\\.", "", part)
    return sum(map(bare.count, "([")) - sum(map(bare.count, ")]"))
