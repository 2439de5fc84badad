"""What is cached for each set of trained components."""

from __future__ import annotations

import pytest

from impasto.data.frontier import frontier
from impasto.data.options import DataOptions

TWO = ("text_encoder", "text_encoder_2")


@pytest.mark.parametrize(("trains", "latents", "text", "needs"), [
    ({"unet"}, True, True, set()),
    (set(), True, True, set()),
    ({"unet", "text_encoder_2"}, True, False, {"text_encoder", "text_encoder_2"}),
    ({"vae"}, False, True, {"vae"}),
    ({"vae", "text_encoder"}, False, False, {"vae", "text_encoder", "text_encoder_2"}),
])
@pytest.mark.parametrize("flip", [False, True])
def test_the_rule(trains: set, latents: bool, text: bool, needs: set, flip: bool) -> None:
    rule = frontier(frozenset(trains), TWO, DataOptions(folder="x", flip=flip))
    assert (rule.latents, rule.text, rule.needs) == (latents, text, needs)
    assert (rule.pixels, rule.captions) == (not latents, not text)
    assert rule.flips == ((False, True) if flip else (False,))


@pytest.mark.parametrize(("keys", "many", "text"), [
    ({}, False, True), ({"shuffle_tags": True}, False, False), ({"tag_dropout": 0.1}, False, False),
    ({"wildcards": True}, False, True), ({"wildcards": True}, True, False), ({"caption_dropout": 0.5}, False, True),
    ({"caption_template": "a {}", "caption_weights": True, "keep_tags": 2}, False, True),
])
def test_captions_that_chance_makes_too_many_of_are_encoded_in_the_step(keys: dict, many: bool, text: bool) -> None:
    rule = frontier({"unet"}, TWO, DataOptions(folder="x", **keys), many=many)
    assert (rule.text, rule.captions, rule.latents) == (text, not text, True)
    assert rule.needs == (set() if text else set(TWO))
    rule = frontier({"unet"}, TWO, DataOptions(folder="x", **keys), {"pictures"}, many=many)
    assert not (rule.text or rule.captions or rule.needs)


@pytest.mark.parametrize(("reads", "trains", "found"), [
    ({"pictures"}, {"vae"}, (False, True, False, False)),
    ({"pictures"}, {"unet"}, (True, False, False, False)),
    ({"captions"}, {"text_encoder"}, (False, False, False, True)),
    ({"captions"}, {"unet"}, (False, False, True, False)),
])
def test_what_the_objective_does_not_look_at_is_neither_cached_nor_read(reads: set, trains: set, found: tuple) -> None:
    rule = frontier(trains, TWO, DataOptions(folder="x"), reads)
    assert (rule.latents, rule.pixels, rule.text, rule.captions) == found
    assert rule.needs <= trains | set(TWO)
