"""Captions on their way into batches: the same at the same step, encoded once where they are few, and accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from impasto.core.progress import SILENT
from impasto.data.check import check, plain
from impasto.data.dataset import list_folder
from impasto.data.findings import Level
from impasto.data.inventory import take_inventory
from impasto.data.options import DataOptions, PriorOptions
from impasto.data.source import Source, collect, data_fingerprint, prepare_source
from impasto.families import prompts
from impasto.objectives.batch import Batch
from tests.data.fakes import FakeBase, write_picture

TAGS = [f"sks, a{i}, b{i}, c{i}, d{i}" for i in range(4)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i, caption in enumerate(TAGS):
        write_picture(tmp_path / "photos" / f"{i}.png", key=i, caption=caption)
    return tmp_path / "photos"


def prepare(photos: Path, *, base: FakeBase | None = None, trains: str = "unet", seed: int = 0, rank: int = 0,
            world: int = 1, batch_size: int = 2, prior: PriorOptions | None = None, **keys: Any) -> Source:
    data = DataOptions(**{"folder": str(photos), "resolution": 64, "bucket_step": 8, **keys})
    return prepare_source(base or FakeBase.make(), data, prior, trains=frozenset({trains}), batch_size=batch_size,
                          accumulation=1, seed=seed, device="cpu", rank=rank, world=world)


def rows(batches: list[list[Batch]]) -> dict[int, tuple[str, Any]]:
    """By their place in the effective batch: picture and caption, as it is or as its states."""
    found = {}
    for batch in (batch for micro in batches for batch in micro):
        texts = batch.captions if batch.captions is not None else \
            [tuple(state.flatten().tolist()) for state in batch.text["states"]]  # type: ignore[index]
        found |= dict(zip(batch.samples, zip(batch.names, texts, strict=True), strict=True))
    return found


def state_of(caption: Any) -> tuple[float, ...]:
    return tuple(FakeBase.make().encode_text([caption])["states"].flatten().tolist())


CHANCE: dict[str, dict[str, Any]] = {
    "shuffled": {"shuffle_tags": True, "keep_tags": 1}, "left out": {"tag_dropout": 0.4, "keep_tags": 1},
    "all": {"shuffle_tags": True, "tag_dropout": 0.2, "caption_dropout": 0.2, "caption_template": "{a|b} {}",
            "wildcards": True, "caption_weights": True},
    "few": {"caption_template": "{a photo|a picture} of {}", "wildcards": True, "caption_dropout": 0.3},
}


@pytest.mark.parametrize("kind", CHANCE)
def test_the_same_captions_at_the_same_steps(kind: str, photos: Path) -> None:
    """Whatever came before, and over however many processes."""
    first = prepare(photos, batch_size=4, **CHANCE[kind])
    wanted = [rows(first.micro_batches(step)) for step in range(8)]
    again = prepare(photos, batch_size=4, **CHANCE[kind])
    for step in (5, 6, 7, 0):
        assert rows(again.micro_batches(step)) == wanted[step]
    two = [prepare(photos, rank=rank, world=2, **CHANCE[kind]) for rank in range(2)]
    for step in range(8):
        assert rows(two[0].micro_batches(step)) | rows(two[1].micro_batches(step)) == wanted[step]
    other = prepare(photos, batch_size=4, seed=1, **CHANCE[kind])
    assert any(rows(other.micro_batches(step)) != wanted[step] for step in range(8))
    assert len({caption for step in wanted for _, caption in step.values()}) > 4


@pytest.mark.parametrize("kind", ["shuffled", "left out"])
def test_chance_over_tags_is_encoded_in_the_step(kind: str, photos: Path) -> None:
    base = FakeBase.make()
    source = prepare(photos, base=base, **CHANCE[kind])
    assert source.rule.captions and source.needs == {"text_encoder"} and base.encoded_captions == []
    for step in range(10):
        for name, caption in rows(source.micro_batches(step)).values():
            assert isinstance(caption, str) and caption.startswith("sks")
            assert set(caption.split(", ")) <= set(TAGS[int(name[0])].split(", "))
    assert "captions are encoded in each step, as they vary" in "\n".join(source.describe())


def test_a_few_alternatives_are_all_encoded_once(photos: Path) -> None:
    base = FakeBase.make()
    source = prepare(photos, base=base, **CHANCE["few"])
    wanted = {f"{start} of {tags}" for start in ("a photo", "a picture") for tags in TAGS} | {""}
    assert set(base.encoded_captions) == wanted and len(base.encoded_captions) == 9 and not source.needs
    seen = {state for step in range(60) for _, state in rows(source.micro_batches(step)).values()}
    assert seen == {state_of(caption) for caption in wanted}
    text = "\n".join(source.describe())
    assert "captions are encoded once" in text and "one is chosen in each use: 4" in text
    prepare(photos, base=base, **CHANCE["few"])
    assert len(base.encoded_captions) == 9
    (photos / "0.txt").write_text("{1|2|3|4} {1|2|3|4} {1|2|3|4}")
    assert prepare(photos, base=base, **CHANCE["few"]).needs == {"text_encoder"} and len(base.encoded_captions) == 9


def test_an_empty_caption_and_a_dropped_one_are_the_same(photos: Path) -> None:
    (photos / "0.txt").unlink()
    base = FakeBase.make()
    source = prepare(photos, base=base, missing_captions="empty", caption_template="a {}")
    assert sorted(base.encoded_captions) == sorted(["", *(f"a {tags}" for tags in TAGS[1:])])
    assert {name for step in range(6) for name, state in rows(source.micro_batches(step)).values()
            if state == state_of("")} == {"0.png"}


@pytest.mark.parametrize("trains", ["unet", "text_encoder"])
def test_weights_reach_the_text_encoder(trains: str, photos: Path) -> None:
    (photos / "0.txt").write_text("a (dog:1.3)")
    pieces = prompts.parse("a (dog:1.3)")
    for on in (False, True):
        source = prepare(photos, trains=trains, caption_weights=on)
        found = {caption for step in range(6) for name, caption in (
            (name, repr(caption)) for name, caption in rows(source.micro_batches(step)).values()) if name == "0.png"}
        wanted = pieces if on else "a (dog:1.3)"
        assert found == {repr(wanted if trains == "text_encoder" else state_of(wanted))}


def test_class_pictures_are_not_told_the_template(photos: Path, tmp_path: Path) -> None:
    write_picture(tmp_path / "class" / "c.png", key=9, caption="x, y")
    keys: dict[str, Any] = {"trains": "text_encoder", "caption_template": "sks {}", "shuffle_tags": True}
    prior = PriorOptions(folder=str(tmp_path / "class"))
    source = prepare(photos, prior=prior, **keys)
    of_class = {caption for step in range(20) for name, caption in rows(source.micro_batches(step)).values()
                if name == "c.png"}
    assert of_class == {"x, y", "y, x"}
    source = prepare(photos, prior=prior.model_copy(update={"caption": "p, q"}), **keys)
    assert {caption for step in range(20) for name, caption in rows(source.micro_batches(step)).values()
            if name == "c.png"} == {"p, q"}


def test_the_fingerprint_covers_what_is_said(photos: Path) -> None:
    plain_one = prepare(photos).fingerprint
    options = [{"caption_template": "a {}"}, {"shuffle_tags": True}, {"shuffle_tags": True, "keep_tags": 1},
               {"tag_dropout": 0.1}, {"wildcards": True}, {"caption_weights": True}, {"max_tokens": 3},
               {"tag_separator": ";"}, {"keep_tags_separator": ""}]
    found = [prepare(photos, **keys).fingerprint for keys in options]
    (photos / "0.txt").write_text("a long caption " * 40 + "x")
    found.append(prepare(photos, max_tokens=3).fingerprint)
    (photos / "0.txt").write_text("a long caption " * 40 + "y")  # what is cut off counts too
    found.append(prepare(photos, max_tokens=3).fingerprint)
    (photos / "0.txt").write_text(TAGS[0])
    assert len({plain_one, *found}) == 12 and prepare(photos).fingerprint == plain_one
    (photos / "0.txt").unlink()
    (photos / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": TAGS[0]}))
    assert prepare(photos).fingerprint == plain_one  # wherever it is written
    data = DataOptions(folder=str(photos), resolution=64, bucket_step=8)
    assert data_fingerprint(data, [collect(list_folder(photos), data, SILENT)]) == plain_one


def test_what_is_cut_differs_or_is_not_read_is_told(photos: Path) -> None:
    (photos / "0.caption").write_text("something else")
    (photos / "1.txt").write_text("word " * 9 + "end")
    text = "\n".join(prepare(photos, max_tokens=9).describe())
    assert "cut to 9 tokens (data.max_tokens)" in text and "'end'" not in text  # tags are longer
    assert "of which two files say different things: 1 (0.png: 0.txt goes before 0.caption" in text
    assert "trained as" not in "\n".join(prepare(photos).describe())
    text = "\n".join(prepare(photos, caption_template="a {}", shuffle_tags=True, caption_source="txt").describe())
    assert f"captions are trained as in 0.png: 'a {TAGS[0]}', in each use with tags in another order" in text
    assert "different things" not in text
    text = "\n".join(prepare(photos, caption="x").describe())
    assert "5 caption files are not read, as data.caption is set" in text


# --- `impasto dataset check` ---------------------------------------------------------------------------------


def checked(photos: Path, **keys: Any) -> Any:
    data = DataOptions(folder=str(photos), resolution=64, bucket_step=8, **keys)
    return check(take_inventory(list_folder(photos), data, 1), near=False)


def test_the_check_reads_what_a_run_reads(photos: Path) -> None:
    for i in range(4):
        (photos / f"{i}.txt").unlink()
    (photos / "metadata.jsonl").write_text("\n".join(
        json.dumps({"file_name": f"{i}.png", "text": f"sks ||| {{a{i}|x}}; b, c; d"}) for i in range(4)))
    keys: dict[str, Any] = {"tag_separator": ";", "wildcards": True, "caption_template": "my {}"}
    found = checked(photos, **keys)
    assert found.fit and found.tags.counts["sks"] == 4 and found.tags.counts["b, c"] == 4 and "a0" in found.tags.counts
    source = prepare(photos, **keys)
    assert found.inventory.captions == {item.picture.name: item.caption for item in source.pictures}
    assert plain(found)["files"]["0.png"]["trained_as"] == "my sks; a0; b, c; d"
    assert "trained_as" not in plain(checked(photos))["files"]["0.png"]


def test_the_check_tells_of_cut_and_differing_captions(photos: Path) -> None:
    (photos / "0.caption").write_text("something else")
    (photos / "1.txt").write_text("a {red|blue} (dog:1.2)")
    found = {finding.kind: finding for finding in checked(photos).findings}
    assert found["captions differ"].level is Level.WARNING
    assert found["captions differ"].names == {"0.png": "0.txt goes before 0.caption"}
    assert list(found["caption wildcard"].names) == list(found["caption weight"].names) == ["1.png"]
    found = {finding.kind: finding for finding in
             checked(photos, wildcards=True, caption_weights=True, max_tokens=6, caption_source="txt").findings}
    assert not {"captions differ", "caption wildcard", "caption weight"} & set(found)
    assert found["cut captions"].level is Level.WARNING and "0.png" in found["cut captions"].names
