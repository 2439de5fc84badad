"""What becomes of a caption in one use, against closed forms: probabilities, permutations, the first tags in front."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from functools import partial
from typing import Any

import pytest
from pydantic import ValidationError

from impasto.core.rng import seed_for
from impasto.data.options import DataOptions, PriorOptions, of_class_pictures
from impasto.data.phrasing import MOST_VARIANTS, PLAIN, Phrasing

USES = 6000


def phrasing(**keys: Any) -> Phrasing:
    return Phrasing.of(DataOptions(folder="x", **keys))


def said(text: str, uses: int = USES, **keys: Any) -> list[str]:
    """The caption in many uses: of several seeds, steps and places."""
    how = phrasing(**keys)
    return [how.say(text, partial(seed_for, use % 5, use // 5, use % 3, "caption")) for use in range(uses)]


def within(count: int, uses: int, share: float, sigmas: float = 4.5) -> bool:
    """Whether a count is what a binomial of that share would give."""
    return abs(count - uses * share) <= sigmas * math.sqrt(uses * share * (1 - share)) + 1e-9


# --- nothing to do -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "a dog", "a, {b|c} ,d", " spaces ", "(a:1.2), b", "{}", "a\nb"])
def test_captions_are_trained_as_they_are_written(text: str) -> None:
    assert set(said(text, 20)) == {text} and phrasing().variants(text) == [text]
    assert phrasing() == PLAIN and not PLAIN.facts and PLAIN.encoded_as(text) == text


# --- tags ----------------------------------------------------------------------------------------------------


def test_every_order_of_the_free_tags_is_as_likely() -> None:
    found = Counter(said("x, a, b, c, d", shuffle_tags=True, keep_tags=1))
    wanted = {", ".join(("x", *order)) for order in itertools.permutations("abcd")}
    assert set(found) == wanted and len(wanted) == 24
    assert all(within(count, USES, 1 / 24) for count in found.values())


@pytest.mark.parametrize("keep", range(6))
def test_the_first_tags_never_move_and_no_tag_is_lost(keep: int) -> None:
    tags = ["a b", "c", "d", "e (f)"]
    for text in said(", ".join(tags), 200, shuffle_tags=True, keep_tags=keep):
        assert text.split(", ")[:keep] == tags[:keep] and sorted(text.split(", ")) == sorted(tags)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_each_tag_is_left_out_by_itself(share: float) -> None:
    found = [set(text.split(", ")) for text in said("x, a, b, c", tag_dropout=share, keep_tags=1)]
    assert all("x" in tags for tags in found)
    for tag in "abc":
        assert within(sum(tag not in tags for tags in found), USES, share)
    assert within(sum(not tags & {"a", "b"} for tags in found), USES, share ** 2)


def test_order_and_leaving_out_are_drawn_apart() -> None:
    """Where a tag stands says nothing of whether another one is there."""
    found = said("a, b, c", shuffle_tags=True, tag_dropout=0.5)
    both = [text.index("a") < text.index("b") for text in found if "a" in text and "b" in text]
    assert within(sum(both), len(both), 0.5) and within(len(both), USES, 0.25)
    assert within(sum(text == "" for text in found), USES, 1 / 8)
    assert set(said("a, b, c", 50, tag_dropout=1.0)) == {""} and set(said("a, b", 50, tag_dropout=1.0,
                                                                        keep_tags=1)) == {"a"}


def test_a_separator_in_the_caption_keeps_beginning_and_end() -> None:
    found = set(said("x, y ||| a, b ||| z", 200, shuffle_tags=True, keep_tags=4))
    assert found == {"x, y, a, b, z", "x, y, b, a, z"}
    assert set(said("x ||| a", 5)) == {"x, a"} == set(phrasing().variants("x ||| a") or ())
    assert set(said("x ||| a", 5, keep_tags_separator="")) == {"x ||| a"}
    assert set(said("x ## a, b", 200, keep_tags_separator="##", shuffle_tags=True)) == {"x, a, b", "x, b, a"}


@pytest.mark.parametrize(("separator", "text", "wanted"), [
    (";", "a, b;c", {"a, b; c", "c; a, b"}), (" ", "a  b", {"a b", "b a"}),
    (". ", "One. Two", {"One. Two", "Two. One"})])
def test_tags_are_separated_as_asked(separator: str, text: str, wanted: set[str]) -> None:
    assert set(said(text, 100, tag_separator=separator, shuffle_tags=True)) == wanted


def test_a_weight_over_several_tags_stays_whole() -> None:
    text, keys = "(red, blue:1.2), [a, (b, c)], d \\(e, f", {"shuffle_tags": True}
    parts = ["(red, blue:1.2)", "[a, (b, c)]", "d \\(e", "f"]
    assert set(said(text, 500, caption_weights=True, **keys)) == {", ".join(p) for p in itertools.permutations(parts)}
    assert phrasing(caption_weights=True).tags("(a, b, c") == ["(a", "b", "c"]  # never closed
    assert phrasing().tags("(a, b)") == ["(a", "b)"]


# --- wildcards -----------------------------------------------------------------------------------------------


def test_alternatives_are_as_likely_each() -> None:
    found = Counter(said("a {red|blue|} {dog|cat}", wildcards=True))
    wanted = [f"a {colour} {kind}" for colour in ("red", "blue", "") for kind in ("dog", "cat")]
    assert set(found) == set(wanted) == set(phrasing(wildcards=True).variants("a {red|blue|} {dog|cat}") or ())
    assert all(within(count, USES, 1 / 6) for count in found.values())


def test_inner_alternatives_and_lines() -> None:
    found = Counter(said("{a|{b|c}}\n{x}\nplain", wildcards=True))
    assert set(found) == {"a", "b", "c", "{x}", "plain"}
    for text, share in {"a": 1 / 6, "b": 1 / 12, "c": 1 / 12, "{x}": 1 / 3, "plain": 1 / 3}.items():
        assert within(found[text], USES, share)


@pytest.mark.parametrize(("text", "template", "count"), [
    ("a", None, 1), ("{a|a}", None, 1), ("a\nb\nc", None, 3), ("{1|2|3|4} {1|2|3|4}", None, 16),
    ("{1|2|3|4} {1|2|3|4} {1|2}", None, None), ("{a|b}" * 2000, None, None), ("{a|a}" * 30, None, None),
    ("{a|b}" + "{c|c}" * 5, None, 2), ("{c|c}" * 5 + "{a|b}", None, 2), ("{c|c}" * 9 + "{a|b}", None, None),
    ("\n".join(map(str, range(MOST_VARIANTS))), None, MOST_VARIANTS),
    ("\n".join(map(str, range(MOST_VARIANTS + 1))), None, None), ("{a|b}", "{the|a} {} {x|y}", 8), ("", "{a|b} {}", 1),
])
def test_a_finite_choice_is_counted(text: str, template: str | None, count: int | None) -> None:
    how = phrasing(wildcards=True, caption_template=template)
    variants = how.variants(text)
    assert (None if variants is None else len(variants)) == count
    drawn = {how.say(text, partial(seed_for, use)) for use in range(400)}
    assert variants is None or drawn == set(variants)
    assert variants is None or variants[0] == how.plain(text)


def test_tags_have_no_end_of_variants() -> None:
    assert phrasing(shuffle_tags=True).variants("a, b") is None and phrasing(tag_dropout=0.1).variants("a") is None
    assert phrasing(shuffle_tags=True, tag_dropout=0.5).plain("b, a") == "b, a"


# --- the template --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "text", "wanted"), [
    ("a photo of {}", "a dog", "a photo of a dog"), ("{caption}, oil", "a dog", "a dog, oil"),
    ("{} and {caption}", "x", "x and x"), ("a {}", "", ""), ("{x} {}", "a", "{x} a"), ("{}", "{caption}", "{caption}")])
def test_templates(template: str, text: str, wanted: str) -> None:
    assert set(said(text, 5, caption_template=template)) == {wanted}


def test_a_template_stays_when_tags_move_or_go() -> None:
    keys = {"caption_template": "sks, {}, oil", "shuffle_tags": True}
    assert set(said("a, b", 100, **keys)) == {"sks, a, b, oil", "sks, b, a, oil"}
    assert set(said("a", 9, caption_template="sks, {}", tag_dropout=1.0)) == {"sks"}
    assert phrasing(**keys).body("a, b") == "a, b"


# --- weights and length --------------------------------------------------------------------------------------


def test_weights_are_read_only_where_asked() -> None:
    assert phrasing().encoded_as("a (dog:1.2)") == "a (dog:1.2)"
    weighted = phrasing(caption_weights=True)
    assert weighted.encoded_as("a (dog:1.2)") == [("a ", 1.0), ("dog", 1.2)]
    assert weighted.encoded_as("a dog") == "a dog" and weighted.encoded_as("d \\(e\\)") == "d (e)"
    assert weighted.encoded_as("") == ""


def test_a_limit_cuts_and_tells_what() -> None:
    short = phrasing(max_tokens=2, caption_template="a {}")
    assert short.encoded_as("a dog in snow") == "a dog" and short.lost("dog in snow") == "in snow"
    assert short.lost("dog") == "" and phrasing().lost("word " * 500) == ""


# --- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keys", "line"), [
    ({"caption_template": "a photo of"}, "no place for the caption"), ({"tag_dropout": 1.1}, "less than or equal"),
    ({"keep_tags": -1}, "greater than or equal"), ({"tag_separator": ""}, "at least 1 character"),
    ({"tag_separator": "|||"}, "are both"), ({"keep_tags_separator": "  "}, "nothing but spaces"),
    ({"max_tokens": 0}, "greater than or equal"), ({"caption_source": "docx"}, "'auto', 'txt'"),
])
def test_options_that_cannot_be(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError, match=line):
        DataOptions(folder="x", **keys)


def test_class_pictures_keep_their_own_words() -> None:
    data = DataOptions(folder="x", caption="sks", caption_template="sks {}", shuffle_tags=True, wildcards=True,
                       caption_weights=True, max_tokens=5)
    drawn = of_class_pictures(data, PriorOptions(caption="a ||| {b|c}, d"))
    assert drawn.caption == "a ||| {b|c}, d"
    assert Phrasing.of(drawn).variants("a ||| {b|c}, d") == ["a ||| {b|c}, d"]
    read = of_class_pictures(data, PriorOptions(folder="y"))
    assert read.caption is None and read.shuffle_tags and read.caption_template is None
