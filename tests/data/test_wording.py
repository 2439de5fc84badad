"""Captions that are odd, and those that are not; tags by number; chunks as the text encoder makes them."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from impasto.data.wording import (
    CHUNK,
    ODDITIES,
    TagCounter,
    count_chunks,
    cut_to,
    file_oddities,
    garbled,
    oddities,
    tag_statistics,
)
from impasto.families.clip import chunks_of
from impasto.families.tokenizer import clip_tokenizer


@pytest.mark.parametrize(("caption", "kinds"), [
    ("a photo of a dog", []),
    ("a dog, a cat and a bird.", []),
    ("Zoë's café in Łódź, naïve façade, 犬 と 猫, собака", []),
    ("emoji 👩‍🚀 and a thin space, fine", []),
    ("a man (smiling) at 12:30, f/2.8", []),
    ("a dog of", []),  # three words: too short to tell
    ("cafÃ© au lait", ["mojibake"]),
    ("itâ€™s a dog", ["mojibake"]),
    ("a dog \ufffd", ["mojibake"]),
    ("ÐºÐ¾Ñ‚", ["mojibake"]),
    ("a dog\x00", ["control"]),
    ("a dog on the back of a", ["cut"]),
    ("a man walking with his dog and", ["cut"]),
    ("a dog,", ["comma"]),
    ("a dog, , a cat", ["comma"]),
    ("salt &amp; pepper", ["entity"]),
    ("R&D, black & white", []),
    ("a (red:1.3) dog", ["weight"]),
    ("a dog <lora:dog:0.8>", ["weight"]),
    ("character \\(series\\)", ["bracket"]),
])
def test_what_is_odd(caption: str, kinds: list[str]) -> None:
    assert oddities(caption) == kinds
    assert set(kinds) <= set(ODDITIES)


def test_tags_may_repeat_and_end_anyhow() -> None:
    assert oddities("1girl, solo, 1girl", tagged=True) == ["twice"]
    assert oddities("1girl, solo, 1girl") == []
    assert oddities("looking at viewer, one hand on it, what it is", tagged=True) == []


@pytest.mark.parametrize("word", ["café", "Übergröße", "Łódź", "été", "日本語", "кот", "naïve", "Ã", "â", "ÅÄÖ",
                                  "¿Qué?", "“so”"])
def test_every_garbled_word_is_found_and_no_honest_one(word: str) -> None:
    assert not garbled(word)
    data = word.encode()
    for encoding in ("latin-1", "cp1252"):
        try:
            wrong = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        assert garbled(f"a {wrong} b")


@pytest.mark.parametrize(("data", "found"), [
    (b"a dog", []), (b"a dog\n", []), (b"\n\na dog\r\n\r\n", []), (b"a\ndog", ["several lines"]),
    ("a dog".encode("utf-8-sig"), ["byte-order mark"]),
    ("a\ndog".encode("utf-8-sig"), ["byte-order mark", "several lines"]),
    ("a dog".encode("utf-16"), ["UTF-16"]), (b"caf\xe9", []), (b"", []),
])
def test_files_written_in_an_unusual_way(data: bytes, found: list[str]) -> None:
    assert file_oddities(data) == found


def test_alternatives_are_odd_and_separators_are_as_asked() -> None:
    assert oddities("a {red|blue} dog") == ["wildcard"] and oddities("a {red} dog | two") == []
    assert oddities("a; b; a", tagged=True, separator=";") == ["twice"]
    tags = tag_statistics(["a; b, b; c", "a; b, b; d"], ";")
    assert tags is not None and tags.counts == {"a": 2, "b, b": 2, "c": 1, "d": 1}


@pytest.mark.parametrize(("text", "limit", "kept", "lost"), [
    ("a dog", 2, "a dog", ""), ("a dog in snow", 2, "a dog", "in snow"), ("a dog, in snow", 2, "a", "dog, in snow"),
    ("one two  three", 2, "one two", "three"), ("", 1, "", ""),
    ("dog " * 80, 75, "dog " * 74 + "dog", "dog " * 4 + "dog"),
])
def test_captions_are_cut_at_the_end_of_a_word(text: str, limit: int, kept: str, lost: str) -> None:
    assert cut_to([(text, 1.0)], limit) == ([(kept, 1.0)] if kept else [("", 1.0)], lost)


@pytest.mark.parametrize("text", ["dog, cat " * 60, "犬" * 100, "supercalifragilisticexpialidocious " * 9, "x" * 500])
@pytest.mark.parametrize("limit", [1, 7, 75])
def test_a_cut_caption_has_as_many_tokens_as_fit(text: str, limit: int) -> None:
    tokenizer = clip_tokenizer()
    ((kept, _),), lost = cut_to([(text, 1.0)], limit)
    assert len(tokenizer(kept, add_special_tokens=False, verbose=False).input_ids) <= limit and lost
    assert "".join((kept + lost).split()) == "".join(text.split())


def test_weighted_pieces_are_cut_as_one_caption() -> None:
    pieces = [("a red", 1.0), (" big dog", 1.5), (" here", 1.0)]
    assert cut_to(pieces, 3) == ([("a red", 1.0), (" big", 1.5)], "dog here") and cut_to(pieces, 5) == (pieces, "")


def test_tags_are_counted() -> None:
    captions = ["1girl, solo, blue eyes", "1girl, solo, Blue_Eyes, hat", "1girl, blue eyes, blue eyes, a", ""]
    tags = tag_statistics(captions)
    assert tags is not None and tags.captions == 3
    assert tags.counts == {"1girl": 3, "blue eyes": 2, "solo": 2, "Blue_Eyes": 1, "a": 1, "hat": 1}
    assert list(tags.counts) == ["1girl", "blue eyes", "solo", "Blue_Eyes", "a", "hat"]
    assert tags.once == ["Blue_Eyes", "a", "hat"]
    assert tags.spellings == [["blue eyes", "Blue_Eyes"]]


@pytest.mark.parametrize("captions", [
    [], [""], ["1girl, solo, hat"], ["a photo of a dog in the park"] * 5,
    ["a man in a red coat walks his dog, a cat watches them from afar, and it begins to rain on them"] * 5,
    ["1girl, solo, hat"] * 2 + ["a photo of a dog in the park"] * 5,
])
def test_sentences_are_no_tags(captions: list[str]) -> None:
    assert tag_statistics(captions) is None


def test_of_too_many_tags_the_frequent_ones_stay() -> None:
    """No count is too high, none lower than is said, and no tag of more captions than that is left out."""
    rng = random.Random(0)
    captions = [", ".join([f"t{int(rng.paretovariate(0.4))}" for _ in range(6)]) for _ in range(4000)]
    exact = Counter(tag for caption in captions for tag in set(caption.split(", ")))
    for room in (200, 1 << 18):
        counter = TagCounter(room=room)
        for caption in captions:
            counter.add(caption)
        tags = counter.tags()
        assert tags.captions == 4000 and len(tags.counts) <= room and bool(tags.missed) is (room == 200)
        assert all(exact[tag] - tags.missed <= count <= exact[tag] for tag, count in tags.counts.items())
        assert all(tag in tags.counts for tag, count in exact.items() if count > tags.missed)
    assert tags.counts == exact and list(tags.counts)[:3] == [
        tag for tag, _ in sorted(exact.items(), key=lambda pair: (-pair[1], pair[0]))[:3]]


def test_chunks_are_those_of_the_text_encoder() -> None:
    tokenizer = clip_tokenizer()
    captions = ["", "short", "a dog, " * 25, "a dog, " * 26, "word " * CHUNK, "word " * (CHUNK + 1), "犬" * 80,
                "A DOG " * 90, "x" * 76, "a  dog " * 200, "😀" * 60, "İ" * 40]
    assert count_chunks(captions) == [len(chunks_of(caption, tokenizer, CHUNK + 2)) for caption in captions]
    assert max(count_chunks(captions)) > 2 and count_chunks([]) == []
