"""Several sets in one run: how often each comes, what is done with each, and that one set is what it ever was."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from impasto.core.errors import UserError
from impasto.data.check import check_all, verdict
from impasto.data.inventory import take_inventories
from impasto.data.options import DataOptions, PriorOptions, ValidationOptions
from impasto.data.sets import DataSets
from impasto.data.source import Source, prepare_source
from impasto.objectives.batch import Batch
from tests.data.fakes import FakeBase, write_picture

#: sizes of the pictures in two folders
ONE = [(64, 64), (64, 64), (64, 96), (64, 96), (90, 64)]
TWO = [(64, 64), (64, 96), (64, 64)]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name, sizes in (("one", ONE), ("two", TWO)):
        for i, size in enumerate(sizes):
            write_picture(tmp_path / name / f"{name}{i}.png", key=i + 10 * len(sizes), size=size,
                          caption=f"{name} {i}")
    return tmp_path


def sets(folders: Path, one: dict[str, Any] | None = None, two: dict[str, Any] | None = None) -> DataSets:
    common = {"resolution": 64, "bucket_step": 8}
    return DataSets.model_validate([{"folder": str(folders / "one"), **common, **(one or {})},
                                    {"folder": str(folders / "two"), **common, **(two or {})}])


def prepare(data: DataOptions | DataSets, *, batch_size: int = 2, accumulation: int = 1, rank: int = 0, world: int = 1,
            prior: PriorOptions | None = None, validation: ValidationOptions | None = None, seed: int = 0,
            trains: str = "unet") -> Source:
    return prepare_source(FakeBase.make(), data, prior, trains=frozenset({trains}), batch_size=batch_size,
                          accumulation=accumulation, seed=seed, device="cpu", rank=rank, world=world,
                          validation=validation)


def flat(batches: list[list[Batch]]) -> list[Batch]:
    return [batch for micro in batches for batch in micro]


def rows(batches: list[list[Batch]]) -> list[tuple[int, str, float, torch.Tensor]]:
    return [(s, n, w, m) for b in flat(batches) if b.moments is not None
            for s, n, w, m in zip(b.samples, b.names, b.weight.tolist(), b.moments, strict=True)]


# --- how often ---------------------------------------------------------------------------------------------


def test_pictures_come_as_often_in_an_epoch_as_their_set_says(folders: Path) -> None:
    source = prepare(sets(folders, two={"repeats": 4}), batch_size=1)
    assert source.epoch_steps == 5 + 4 * 3
    for epoch in range(3):
        uses = Counter(row[1] for step in range(17) for row in rows(source.micro_batches(epoch * 17 + step)))
        assert uses == {f"one{i}.png": 1 for i in range(5)} | {f"two{i}.png": 4 for i in range(3)}
    alone = prepare(DataOptions(folder=str(folders / "two"), resolution=64, bucket_step=8, repeats=3), batch_size=1)
    uses = Counter(row[1] for step in range(9) for row in rows(alone.micro_batches(step)))
    assert alone.epoch_steps == 9 and set(uses.values()) == {3}


def test_batches_are_of_one_shape_and_both_sets_meet_in_them(folders: Path) -> None:
    source = prepare(sets(folders, two={"repeats": 2}), batch_size=2)
    met = 0
    for step in range(40):
        (batch,) = flat(source.micro_batches(step))
        assert len(batch.names) == 2
        met += len({name[:3] for name in batch.names}) == 2
    assert met > 0


def test_shares_are_shares_of_samples(folders: Path) -> None:
    source = prepare(sets(folders, {"share": 1}, {"share": 3}), batch_size=2)
    uses = Counter(row[1][:3] for step in range(200) for row in rows(source.micro_batches(step)))
    assert sum(uses.values()) == 400 and abs(uses["two"] - 300) <= 400**0.5 * (3 / 16) ** 0.5
    assert source.epoch_steps == 10  # five pictures, of a quarter of the samples, in twos
    assert "of the samples 25.0% are of data.0, 75.0% are of data.1" in source.describe()


@pytest.mark.parametrize("how", [({}, {"repeats": 3}), ({"share": 1}, {"share": 1.5})])
def test_ranks_share_the_batch_of_one_and_a_step_is_a_function_of_its_number(folders: Path, how: tuple) -> None:
    data = sets(folders, *how)
    one = prepare(data, batch_size=4, accumulation=2)
    two = [prepare(data, batch_size=2, accumulation=2, rank=rank, world=2) for rank in range(2)]
    again = prepare(data, batch_size=4, accumulation=2)
    for step in (0, 1, 7, 3, 12):
        whole = sorted(row[:3] for row in rows(one.micro_batches(step)))
        assert whole == sorted(row[:3] for source in two for row in rows(source.micro_batches(step)))
        assert whole == sorted(row[:3] for row in rows(again.micro_batches(step)))


# --- what is done with each --------------------------------------------------------------------------------


def test_each_set_has_options_of_its_own(folders: Path) -> None:
    data = sets(folders, {"caption": "thing", "caption_template": "a {}", "loss_weight": 0.25},
                {"flip": True, "resolution": 32, "caption_dropout": 0.5})
    source, plain = prepare(data, batch_size=1), prepare(sets(folders, None, {"resolution": 32}), batch_size=1)
    by_hand = FakeBase.make()
    seen, dropped, mirrored = Counter[str](), 0, 0
    for step in range(120):
        (batch,), (upright,) = flat(source.micro_batches(step)), flat(plain.micro_batches(step))
        (name,) = batch.names
        assert batch.text is not None and batch.moments is not None and upright.moments is not None
        seen[name[:3]] += 1
        empty = batch.text["states"][0].equal(by_hand.encode_text([""])["states"][0])
        if name.startswith("one"):
            assert batch.weight.item() == 0.25 and batch.moments.equal(upright.moments)
            assert batch.text["states"][0].equal(by_hand.encode_text(["a thing"])["states"][0])
            assert max(batch.moments.shape[-2:]) >= 8
        else:
            assert batch.weight.item() == 1 and max(batch.moments.shape[-2:]) <= 5
            assert empty or batch.text["states"][0].equal(by_hand.encode_text([f"two {name[3]}"])["states"][0])
            dropped += empty
            mirrored += not batch.moments.equal(upright.moments)
    assert 0.3 < dropped / seen["two"] < 0.7 and 0.3 < mirrored / seen["two"] < 0.7


def test_class_pictures_come_on_top_of_all_sets(folders: Path) -> None:
    for i in range(2):
        write_picture(folders / "class" / f"c{i}.png", key=90 + i)
    prior = PriorOptions(caption="a dog", folder=str(folders / "class"), weight=0.5)
    with_prior, without = prepare(sets(folders, two={"loss_weight": 2}), prior=prior), prepare(sets(folders))
    for step in range(8):
        found, plain = rows(with_prior.micro_batches(step)), rows(without.micro_batches(step))
        assert [row[:2] for row in found if not row[1].startswith("c")] == [row[:2] for row in plain]
        assert {(n[0], w) for _, n, w, _ in found} <= {("o", 1.0), ("t", 2.0), ("c", 0.5)}
        assert sum(n.startswith("c") for _, n, _, _ in found) == 2


def test_a_drawn_set_beside_a_folder(folders: Path) -> None:
    data = DataSets.model_validate([
        {"folder": str(folders / "one"), "resolution": 64, "bucket_step": 8, "caption": "x"},
        {"source": "world", "pictures": 4, "resolution": 64}, {"source": "world", "pictures": 4, "resolution": 64}])
    source = prepare(data, batch_size=1, validation=ValidationOptions(fraction=0.2))
    labels = {}
    for step in range(source.epoch_steps):
        (batch,) = flat(source.micro_batches(step))
        assert batch.labels is not None
        labels[batch.names[0]] = batch.labels[0]
    assert all((values == -1).all() == name.startswith("one") for name, values in labels.items())
    digests = [item.picture.digest for item in (*source.pictures, *source.held_out)]
    assert len(set(digests)) == len(digests)  # two drawn sets show different pictures
    assert [item.handling.number for item in source.pictures] == [0] * 4 + [1] * 4 + [2] * 4


# --- held out, fingerprints, reports -----------------------------------------------------------------------


def test_held_out_pictures_come_from_all_sets_and_none_is_emptied(folders: Path) -> None:
    write_picture(folders / "two" / "copy.png", key=50, caption="a copy of one0")
    for seed in range(8):
        source = prepare(sets(folders, two={"loss_weight": 3}), validation=ValidationOptions(fraction=0.5), seed=seed)
        kept, out = ({item.picture.digest for item in items} for items in (source.pictures, source.held_out))
        assert not kept & out and len(out) == 4
        assert {item.handling.number for item in source.pictures} == {0, 1}
        assert all(item.weight == 1 for item in source.held_out)
    most = prepare(sets(folders), validation=ValidationOptions(fraction=0.99))
    assert len(most.pictures) >= 2 and {item.handling.number for item in most.pictures} == {0, 1}


def test_a_set_that_is_all_held_out_by_name_is_an_error(folders: Path) -> None:
    for i, size in enumerate(TWO):
        write_picture(folders / "apart" / f"{i}.png", key=i + 30, size=size, caption="same")
    with pytest.raises(UserError, match=r"every picture of data\.1 is held out"):
        prepare(sets(folders), validation=ValidationOptions(folder=str(folders / "apart")))


def test_the_fingerprint_follows_every_set_and_one_set_is_none_of_several(folders: Path) -> None:
    plain = prepare(sets(folders)).fingerprint
    assert prepare(sets(folders), batch_size=1, seed=3).fingerprint == plain
    turned = DataSets.model_validate(sets(folders).model_dump()[::-1])
    others = [prepare(data).fingerprint for data in (
        turned, sets(folders, two={"flip": True}), sets(folders, {"caption": "x"}),
        sets(folders, two={"resolution": 32}), sets(folders).sets[0])]
    (folders / "two" / "two1.txt").write_text("another")
    others.append(prepare(sets(folders)).fingerprint)
    assert len({plain, *others}) == 7


def test_every_set_is_accounted_for(folders: Path) -> None:
    (folders / "two" / "phone.heic").write_bytes(b"x")
    text = "\n".join(prepare(sets(folders, two={"repeats": 5})).describe())
    assert f"5 pictures of data.0 ({folders / 'one'}): " in text and "3 pictures of data.1" in text
    assert "in an epoch a picture comes of data.0 once, of data.1 5 times" in text
    assert "data.1: not used, since nothing here reads such files: phone.heic" in text


def test_what_is_wrong_with_all_sets_is_told_at_once(folders: Path) -> None:
    (folders / "one" / "bad.png").write_text("x")
    (folders / "two" / "two0.txt").unlink()
    with pytest.raises(UserError) as caught:
        prepare(sets(folders))
    text = str(caught.value)
    assert "2 sets of pictures cannot be used" in text and "data.0" in text and "bad.png" in text and "two0" in text
    with pytest.raises(UserError, match=r"data\.1\.bucket_step: 12 is not a multiple of 8"):
        prepare(sets(folders, two={"bucket_step": 12}))


def test_the_check_looks_at_every_set(folders: Path) -> None:
    write_picture(folders / "two" / "copy.png", key=50, caption="a copy of one0")
    checked = check_all(take_inventories(sets(folders), PriorOptions(caption="a dog", folder=str(folders / "one")), 1))
    assert [c.inventory.title for c in checked] == ["pictures of data.0", "pictures of data.1", "class pictures"]
    assert "9 pictures in 2 sets and 5 class pictures" in verdict(checked).line
    named = {f.kind: f.names for c in checked for f in c.findings}
    assert named["in several sets"] == {"copy.png": "is one0.png of data.0"}
    assert named["in both"]["one0.png"] == "is one0.png of data.0"


def test_a_bucket_that_sets_fill_together_is_not_thin(folders: Path) -> None:
    def thin(data: DataSets) -> set[str]:
        return {name for c in check_all(take_inventories(data, None, 3)) for f in c.findings
                if f.kind == "thin buckets" for name in f.names}

    assert thin(sets(folders)) == {"56x72"}  # five squares, three wide ones together
    assert not thin(sets(folders, {"repeats": 3})) and not thin(sets(folders, {"share": 1}, {"share": 1}))
