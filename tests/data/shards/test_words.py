"""Captions of shards counted in one pass, against counters over all of them."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from impasto.data.check import check
from impasto.data.dataset import list_folder
from impasto.data.findings import Finding
from impasto.data.inventory import take_inventory
from impasto.data.options import DataOptions
from impasto.data.shards import words as shards_words
from impasto.data.shards.words import evenly, words_of
from tests.data.photos import encoded, photo, put
from tests.data.sharded import survey, write_shard

KINDS = ["a photo of a dog in the", "cafÃ© by the sea", "a (red:1.3) dog", "tom &amp; jerry", "a dog,, a cat",
         "a {red|blue} cat", "same", "same", "same", "a plain sentence about nothing"]


def folder_findings(folder: Path, captions: list[str], **keys: Any) -> dict[str, Finding]:
    """Of the same captions in a folder."""
    for i, text in enumerate(captions):
        put(folder / f"{i:03}.png", photo(i), text)
    data = DataOptions.model_validate({"folder": str(folder), "resolution": 64, "bucket_step": 8, **keys})
    return {each.kind: each for each in check(take_inventory(list_folder(folder), data, 1)).findings}


def in_shards(folder: Path, captions: list[str], many: int = 2) -> Path:
    picture = encoded(photo(0))
    for shard in range(many):
        own = range(shard * len(captions) // many, (shard + 1) * len(captions) // many)
        write_shard(folder / f"{shard}.tar", dict(pair for i in own for pair in (
            (f"{i:03}.png", picture), (f"{i:03}.txt", captions[i].encode()))))
    return folder


def test_tags_are_counted_as_by_a_counter(tmp_path: Path) -> None:
    rng = random.Random(0)
    captions = [", ".join(rng.choices([f"tag {int(rng.paretovariate(1))}" for _ in range(20)], k=5))
                for _ in range(200)]
    found = words_of(survey(in_shards(tmp_path, captions, 3)), 20)
    exact = Counter(tag for text in captions for tag in set(text.split(", ")))
    assert found.tags is not None and found.tags.counts == exact and found.tags.missed == 0
    assert found.tags.once == sorted(tag for tag, count in exact.items() if count == 1)
    assert (found.captions, found.different, found.tags.captions) == (200, len(set(captions)), 200)


@pytest.mark.parametrize("keys", [{}, {"wildcards": True}, {"caption_weights": True},
                                  {"caption": "tom &amp; a (b:1.2)"}])
def test_findings_are_those_of_a_folder(keys: dict[str, Any], tmp_path: Path) -> None:
    expected = folder_findings(tmp_path / "folder", KINDS, **keys)
    found = words_of(survey(in_shards(tmp_path / "shards", KINDS), **keys), 20)
    mine = {each.kind: each for each in found.findings}
    kinds = {kind for kind in expected if kind.startswith("caption ") or kind == "shared captions"}
    assert set(mine) == kinds and (len(kinds) >= 5 or "caption" in keys)
    for kind, each in mine.items():
        other = expected[kind]
        assert (each.level, each.fix, each.more) == (other.level, other.fix, 0)
        assert each.what.replace("sample", "picture") == other.what
        assert list(each.names.values()) == list(other.names.values())


def test_of_many_some_are_named_and_all_counted(tmp_path: Path) -> None:
    found = words_of(survey(in_shards(tmp_path, ["tom &amp; jerry"] * 9)), 4)
    kinds = {each.kind: each for each in found.findings}
    entity, shared = kinds["caption entity"], kinds["shared captions"]
    assert entity.what.startswith("9 captions") and (len(entity.names), entity.more) == (4, 5)
    assert shared.what == "9 samples that share 1 caption" and (len(shared.names), shared.more) == (4, 5)
    assert list(found.numbers.values()) == [0, 1, 2, 3]


def test_whether_they_are_tags_is_judged_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = ["a, b, c"] * 30 + ["a sentence about a dog"] * 70
    monkeypatch.setattr(shards_words, "JUDGED", 10)
    assert words_of(survey(in_shards(tmp_path / "a", captions)), 5).tags is None
    assert words_of(survey(in_shards(tmp_path / "b", captions[15:60][::-1] + ["a, b, c"] * 20)), 5).tags is not None


@pytest.mark.parametrize("count", [0, 1, 7, 10, 11, 95])
def test_evenly(count: int) -> None:
    chosen = evenly(np.arange(count), 10).tolist()
    assert len(chosen) == min(count, 10) == len(set(chosen)) and chosen == sorted(chosen)
    gaps = np.diff(chosen)
    assert not len(gaps) or gaps.max() - gaps.min() <= 1
