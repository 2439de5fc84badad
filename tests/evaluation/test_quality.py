"""Prompts say what is true, and marks count what is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from impasto.evaluation.quality import NAMED_TEXTURE, Asked, Marks, ask, drawn, mark, rendered, settings
from impasto.families.load import load_base
from impasto.mini import world
from tests.checkpoints import write_checkpoint
from tests.mini.weights import needs_reader


@pytest.mark.parametrize("held_out", [False, True])
def test_prompts_are_scenes_of_the_kind_that_is_asked_for(held_out: bool) -> None:
    asked = ask(60, 3, held_out=held_out)
    assert all(each.scene is not None and each.scene.held_out == held_out for each in asked)
    assert all(str(each.truth[key]) in each.prompt for each in asked for key in ("shape", "colour", "background"))
    assert 3 <= sum("relation" in each.truth for each in asked) <= 25
    assert [each.prompt for each in asked] == [each.prompt for each in ask(60, 3, held_out=held_out)]
    assert [each.prompt for each in asked] != [each.prompt for each in ask(60, 4, held_out=held_out)]
    assert len({each.seed for each in asked}) == 60


@pytest.mark.parametrize(("pairs", "many"), [(0.0, 0), (1.0, 20)])
def test_pairs_are_as_many_as_wanted(pairs: float, many: int) -> None:
    assert sum("relation" in each.truth for each in ask(20, 0, pairs=pairs)) == many


def test_the_truth_is_right_and_each_wrong_answer_counts_against_its_questions_alone() -> None:
    asked = ask(80, 5)
    perfect = mark(asked, [dict(each.truth) for each in asked])
    assert all(right == count for right, count in perfect.counts.values())
    pairs = sum("relation" in each.truth for each in asked)
    named = sum(each.truth.get("texture", "plain") != "plain" for each in asked)
    assert perfect.counts["all three"] == (80, 80) and perfect.counts["texture"] == (80 - pairs, 80 - pairs)
    assert perfect.counts["relation"] == perfect.counts["second object"] == perfect.counts["whole pair"] == (pairs,) * 2
    assert perfect.counts[NAMED_TEXTURE] == (named, named) and 0 < named < 80 - pairs
    wrong = [{**each.truth, "colour": "none"} for each in asked]
    marks = mark(asked, wrong)
    assert marks.share("colour") == marks.share("all three") == marks.share("whole pair") == 0
    assert marks.share("shape") == marks.share("second object") == marks.share("size") == 1


def test_two_objects_that_changed_places_are_right_but_for_their_relation() -> None:
    asked = [each for each in ask(40, 6, pairs=1.0) if each.truth["shape"] != each.truth["second shape"]]
    turned = [{**each.truth, "shape": each.truth["second shape"], "second shape": each.truth["shape"],
               "colour": each.truth["second colour"], "second colour": each.truth["colour"]} for each in asked]
    marks = mark(asked, turned)
    assert marks.share("shape") == marks.share("colour") == marks.share("all three") == 1
    assert marks.share("second object") == 1
    assert marks.share("relation") == marks.share("whole pair") == 0


def test_a_question_that_nobody_asked_has_no_share() -> None:
    assert Marks({}).share("shape") is None
    assert mark([Asked("a mascot", 0, {"background": "blue"})], [{"background": "blue"}]).counts == {
        "background": (1, 1)}


def test_renders_are_the_worlds_own() -> None:
    asked = ask(3, 1)
    scene = asked[2].scene
    assert scene is not None
    assert np.array_equal(np.asarray(rendered(asked, 32)[2]), np.asarray(world.draw(scene, 32, asked[2].seed)))


def test_a_base_draws_a_picture_of_each_whatever_the_batch(tmp_path: Path) -> None:
    base = load_base(write_checkpoint(tmp_path / "mini.safetensors"))
    asked = ask(3, 1)
    once, others = (list(drawn(base, asked, settings(32, 2), batch=batch)) for batch in (2, 3))
    assert [picture.size for picture in once] == [(32, 32)] * 3
    for a, b in zip(once, others, strict=True):
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1


@needs_reader
@pytest.mark.slow
def test_the_reader_reads_renders_rightly() -> None:
    from impasto.evaluation.reader import load_reader

    asked = ask(100, 9)
    marks = mark(asked, load_reader().read(rendered(asked, 128)))
    assert (marks.share("all three") or 0) >= 0.95
