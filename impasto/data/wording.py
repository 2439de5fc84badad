"""What is odd about captions: words that came out wrong, marks that a caption does not have, and tags by number."""

from __future__ import annotations

import bisect
import codecs
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

#: tokens of a caption in one chunk between the marks of its beginning and end
CHUNK = 75
#: captions are taken as tags where at least half of them have so many parts, of so many words in the middle
TAG_PARTS, TAG_WORDS = 3, 3
#: kinds of oddity, and what is to be said of the captions that have it
ODDITIES = {
    "mojibake": "with letters that were garbled in a change of encoding",
    "control": "with invisible control characters",
    "cut": "apparently cut off in the middle",
    "entity": "with characters written as in HTML (&amp;), which are learned as they stand",
    "wildcard": "with alternatives such as {a|b}, which are learned as they stand",
    "weight": "with weights or adapters as in prompts, such as (word:1.2), which are learned as words",
    "bracket": "with brackets after a backslash, as prompts need them and captions do not",
    "comma": "ending in a comma, or with nothing between two",
    "twice": "naming a tag twice",
}

_ENTITY = re.compile(r"&(?:[a-zA-Z]{2,8}|#\d{1,5}|#x[0-9a-fA-F]{1,4});")
_WEIGHT = re.compile(r"\([^()]*:\s*\d*\.?\d+\s*\)|<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE)
_WILDCARD = re.compile(r"\{[^{}]*\|[^{}]*\}")
_COMMA = re.compile(r"[,;]\s*$|,\s*,")
#: words that no sentence ends with
_OPEN_END = re.compile(r"(?:^|\s)(?:a|an|the|of|and|or|with|at|by|from|into|is|are|has|its|their|his|very|while)\s*$")


@dataclass(frozen=True)
class Tags:
    """Captions that are lists of tags."""

    captions: int
    counts: dict[str, int]  # how many captions each tag is in, the most frequent first
    once: list[str]  # tags of one caption only, sorted
    spellings: list[list[str]]  # tags that differ only in case, underscores or hyphens, the most frequent first
    missed: int = 0  # captions that a count may be too low by, where there were too many tags; rarer ones are left out

    @property
    def doubt(self) -> str:
        """What is to be said where not all tags could be counted."""
        return f"Counts may be too low by up to {self.missed:,}: there are too many tags to count the rare ones."


def oddities(caption: str, tagged: bool = False, separator: str = ",") -> list[str]:
    """Keys of `ODDITIES` that are so of a caption; `tagged`: captions here are tags."""
    parts = split_tags(caption, separator) if tagged else []
    found = {
        "mojibake": garbled(caption),
        "control": not caption.isprintable() and any(
            not c.isprintable() and not c.isspace() and c not in "\u200c\u200d" for c in caption),
        "cut": not tagged and len(caption.split()) > 3 and bool(_OPEN_END.search(caption)),
        "entity": bool(_ENTITY.search(caption)),
        "wildcard": bool(_WILDCARD.search(caption)),
        "weight": bool(_WEIGHT.search(caption)),
        "bracket": "\\(" in caption or "\\)" in caption,
        "comma": bool(_COMMA.search(caption)),
        "twice": len(set(parts)) < len(parts),
    }
    return [kind for kind, so in found.items() if so]


def garbled(text: str) -> bool:
    """Whether letters of it are UTF-8 that was read as Latin-1 or Windows-1252 ("cafÃ©"), or were lost (U+FFFD)."""
    if text.isascii():
        return False
    if "\ufffd" in text:
        return True
    for run in re.findall(r"[^\x00-\x7f]{2,}", text):
        try:
            b"".join(map(_byte, run)).decode("utf-8")
            return True
        except ValueError:  # an honest foreign word
            continue
    return False


def _byte(character: str) -> bytes:
    """The byte that Windows-1252 shows as that character; its five unused ones are Latin-1's."""
    try:
        return character.encode("cp1252")
    except UnicodeEncodeError:
        return character.encode("latin-1")


def file_oddities(data: bytes) -> list[str]:
    """What is unusual about a caption's file, though it is read all the same."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return ["UTF-16"]
    lines = [line for line in data.decode("utf-8", "replace").removeprefix("\ufeff").splitlines() if line.strip()]
    found = ["byte-order mark"] if data.startswith(codecs.BOM_UTF8) else []
    return [*found, "several lines"] if len(lines) > 1 else found


def split_tags(caption: str, separator: str = ",") -> list[str]:
    """The parts between separators, without those that are empty."""
    return [part.strip() for part in caption.split(separator) if part.strip()]


def are_tags(captions: Iterable[str], separator: str = ",") -> bool:
    """Whether captions are lists of tags; not where they are sentences, or too few to tell."""
    whole = listed = 0
    for caption in captions:
        if parts := split_tags(caption, separator):
            whole += 1
            listed += len(parts) >= TAG_PARTS and _middle_words(parts) <= TAG_WORDS
    return whole >= 2 and 2 * listed >= whole


class TagCounter:
    """How many captions each tag is in, one caption after another, in a table of at most `room` tags.

    When it is full, the rarest half goes (lossy counting: Manku and Motwani 2002).
    """

    def __init__(self, separator: str = ",", room: int = 1 << 18) -> None:
        self.separator, self.room = separator, room
        self._counts, self._captions, self._missed = Counter[str](), 0, 0

    def add(self, caption: str) -> None:
        """One more caption."""
        parts = split_tags(caption, self.separator)
        self._captions += bool(parts)
        self._counts.update(dict.fromkeys(parts).keys())
        if len(self._counts) > self.room:
            least = sorted(self._counts.values())[len(self._counts) // 2]
            self._missed += least
            self._counts = Counter({tag: count for tag, count in self._counts.items() if count > least})

    def tags(self) -> Tags:
        """What was counted."""
        ordered = dict(sorted(self._counts.items(), key=lambda pair: (-pair[1], pair[0])))
        alike: dict[str, list[str]] = {}
        for tag in ordered:
            alike.setdefault(re.sub(r"[\s_-]+", " ", tag).casefold(), []).append(tag)
        return Tags(self._captions, ordered, sorted(tag for tag, count in ordered.items() if count == 1),
                    [tags for tags in alike.values() if len(tags) > 1], self._missed)


def tag_statistics(captions: Iterable[str], separator: str = ",") -> Tags | None:
    """How often each tag occurs; None where captions are no tags."""
    captions = list(captions)
    if not are_tags(captions, separator):
        return None
    counter = TagCounter(separator)
    for caption in captions:
        counter.add(caption)
    return counter.tags()


def _middle_words(parts: Sequence[str]) -> int:
    """The median number of words of a part."""
    return sorted(len(re.split(r"[\s_]+", part)) for part in parts)[len(parts) // 2]


def count_chunks(captions: Sequence[str]) -> list[int]:
    """How many chunks of CLIP's encoder each caption takes, one at least.

    A token is a byte or more, so that short captions need no tokenizer.
    """
    long = [caption for caption in captions if len(caption.lower().encode("utf-8", "replace")) > CHUNK]
    if not long:
        return [1] * len(captions)
    lengths = map(len, _tokenizer()(long, add_special_tokens=False, verbose=False).input_ids)
    chunks = {caption: -(-length // CHUNK) for caption, length in zip(long, lengths, strict=True)}
    return [max(chunks.get(caption, 1), 1) for caption in captions]


def cut_to(pieces: Sequence[tuple[str, float]], limit: int) -> tuple[list[tuple[str, float]], str]:
    """The pieces of a caption within so many CLIP tokens, cut at the end of a word, and the text that is lost."""
    if sum(len(text.lower().encode("utf-8", "replace")) for text, _ in pieces) <= limit:
        return list(pieces), ""

    def count(text: str) -> int:
        return len(_tokenizer()(text, add_special_tokens=False, verbose=False).input_ids)

    kept: list[tuple[str, float]] = []
    room = limit
    for i, (text, weight) in enumerate(pieces):
        size = count(text)
        if size > room:
            ends = [match.start() for match in re.finditer(r"(?<=\S)\s", text)]
            if not kept and (not ends or count(text[:ends[0]]) > room):  # a writing without spaces
                ends = list(range(1, len(text)))
            fits = bisect.bisect_right(ends, room, key=lambda end: count(text[:end]))
            end = ends[fits - 1] if fits else 0
            kept += [(text[:end], weight)] if end else []
            return kept or [("", 1.0)], (text[end:] + "".join(other for other, _ in pieces[i + 1:])).strip()
        room -= size
        kept.append((text, weight))
    return kept, ""


@functools.cache
def _tokenizer() -> Callable[..., Any]:
    from impasto.families.tokenizer import clip_tokenizer  # takes a moment

    return clip_tokenizer()
