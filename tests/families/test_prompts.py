"""A1111's prompt language, on cases worked by hand (the first ones are those its documentation gives)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from impasto.core.errors import UserError
from impasto.families.prompts import extract_loras, parse

CASES = [
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).", [
        ("a ", 1.0), ("house", 1.3 * 1.1 * 1.1), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
        (", sun, ", 1.1), ("sky", 1.1**4), (".", 1.1)]),
    ("", [("", 1.0)]),
    ("()", [("", 1.0)]),
    ("((a))", [("a", 1.21)]),
    ("[[a]]", [("a", 1 / 1.21)]),
    ("[a", [("a", 1 / 1.1)]),
    ("a) b]", [("a) b]", 1.0)]),
    ("(a]", [("a]", 1.1)]),
    ("(a: 1.5 )", [("a", 1.5)]),
    ("(a:.5)", [("a", 0.5)]),
    ("(a:-1)", [("a", -1.0)]),
    ("(a:1.5", [("a:1.5", 1.1)]),  # no number where the bracket is not closed
    ("a:1.5)", [("a:1.5)", 1.0)]),
    ("(b:c:1.2)", [("b:c", 1.2)]),
    ("(time 12:30:1.2)", [("time 12:30", 1.2)]),
    (r"(a \(b\):1.2)", [("a (b)", 1.2)]),
    (r"a\\(b)", [("a\\", 1.0), ("b", 1.1)]),
    (r"back\slash", [(r"back\slash", 1.0)]),
    ("naïve (猫:1.4) 🐱", [("naïve ", 1.0), ("猫", 1.4), (" 🐱", 1.0)]),
]


@pytest.mark.parametrize(("text", "pieces"), CASES)
def test_by_hand(text: str, pieces: list[tuple[str, float]]) -> None:
    got = parse(text)
    assert [piece for piece, _ in got] == [piece for piece, _ in pieces]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in pieces])


@given(st.text())
def test_any_text_is_parsed_and_only_brackets_vanish(text: str) -> None:
    pieces = parse(text)
    assert pieces
    if not set(text) & set("()[]\\"):
        assert pieces == [(text, 1.0)]


@given(st.text(st.characters(exclude_characters="\\")))
def test_escaped_text_stays_as_it_is(text: str) -> None:
    escaped = "".join("\\" + c if c in "()[]" else c for c in text)
    assert parse(escaped) == [(text, 1.0)]


def test_loras() -> None:
    assert extract_loras("a <lora:dog:0.8> b <lora:style> <LORA:x:-0.5:-0.5>") == (
        "a  b", [("dog", 0.8), ("style", 1.0), ("x", -0.5)])
    assert extract_loras("nothing <here>") == ("nothing <here>", [])
    assert extract_loras("<lora:folder/my dog v1.0:.7>") == ("", [("folder/my dog v1.0", 0.7)])


@pytest.mark.parametrize("tag", ["<lora:>", "<lora::1>", "<lora:a:b>", "<lora:a:1:0.5>", "<lora:a:>"])
def test_bad_tags(tag: str) -> None:
    with pytest.raises(UserError, match="write <lora:name>"):
        extract_loras(f"a {tag}")
