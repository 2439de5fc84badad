"""`impasto dataset check` of shards: every sample counted, what is wrong named, and nothing loaded for it."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from impasto.cli import app
from impasto.evaluation import dataset_parts
from tests.cli.running import impasto, one_line
from tests.data.photos import encoded, photo
from tests.data.sharded import aged, bad_shard, sample, serving, write_shard, write_shards
from tests.evaluation.test_report import Reader

SETTINGS = ("data.resolution=64", "data.bucket_step=8")


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPASTO_CACHE", str(tmp_path / "cache"))


def check(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        app.main(["dataset", "check", *map(str, arguments)])
    code = caught.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().out


def test_good_shards(tmp_path: Path, capsys) -> None:
    write_shards(tmp_path / "s", [[(64, 64)] * 5, [(64, 96)] * 3, [(64, 64)]])
    code, text = check(capsys, tmp_path / "s" / "shard-{0000..0002}.tar", *SETTINGS)
    assert code == 0 and text.startswith("fit to train: 9 samples of 3 shards\n")
    assert "9 of 9 samples can be used" in text and "9 captions, 9 different" in text
    assert re.search(r"64x64 +\S+ +6 ", text) and re.search(r"80x48 +\S+ +3 ", text) and "landscape" in text
    with serving(tmp_path / "s") as server:
        assert check(capsys, server.url("shard-0001.tar"), *SETTINGS)[0] == 0


def test_every_sample_is_counted_once_and_what_is_wrong_is_named(tmp_path: Path, capsys) -> None:
    bad = bad_shard(tmp_path / "s")
    (cut,) = write_shards(tmp_path / "s", [[(64, 64)] * 3])
    cut.write_bytes(cut.read_bytes()[:16_000])
    aged(cut)
    write_shard(tmp_path / "s" / "other.tar", sample("good", 1) | sample("small", 5, (40, 40)))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[base]\npath = "x"\n[data]\nsource = "shards"\nshards = {json.dumps(str(tmp_path / "s"))}\n'
                      "resolution = 64\nbucket_step = 8\n[train]\nbatch_size = 2\n")
    code, text = check(capsys, recipe)
    assert code == 1 and text.startswith("not fit to train yet: a run would refuse 9 samples")
    assert "-> cut short: fetch or make the shards again" in text
    for line in ("4 of 13 samples can be used", "bad.tar/broken.png", "is damaged", "whose key was there before",
                 "the shard is cut short here", "1 exact copy of other pictures", "enlarged"):
        assert line in text, line
    code, text = check(capsys, recipe, "--json")
    told = json.loads(text)
    (folder,) = told["folders"]
    counts = {key: folder[key] for key in ("used", "no_picture", "broken", "twice", "cut", "too_small", "no_caption")}
    assert sum(counts.values()) == folder["samples"] == sum(shard["samples"] for shard in folder["shards"]) == 13
    assert counts == {"used": 4, "no_picture": 3, "broken": 1, "twice": 1, "cut": 1, "too_small": 1, "no_caption": 2}
    assert code == 1 and not told["fit"] and len(folder["shards"]) == 3 and str(bad) == folder["shards"][0]["shard"]
    kinds = {finding["kind"]: finding for finding in folder["findings"]}
    assert kinds["same keys"]["names"] == {"other.tar/good.png": "as bad.tar/good.png"}
    assert kinds["copies"]["level"] == "warning" and kinds["no caption"]["level"] == "refused"
    code, text = check(capsys, recipe, "data.bad_samples=skip")
    assert code == 0 and "fit to train: 4 samples of 3 shards, and 9 samples left out" in text


def test_captions_that_differ_are_told(tmp_path: Path, capsys) -> None:
    members = sample("a", 1) | {"a.json": b'{"caption": "another"}'}
    members |= sample("b", 2) | {"b.json": b'{"caption": "caption 2"}'} | sample("c", 3, caption=None)
    path = write_shard(tmp_path / "a.tar", members)
    code, text = check(capsys, path, *SETTINGS, "data.missing_captions=empty")
    assert code == 0 and "1 sample of which two members say different things" in text
    assert ".txt goes before .json" in text and "1 sample without a caption, learned with none" in text
    code, text = check(capsys, path, *SETTINGS, "data.caption=x")
    assert "2 samples with a caption that is not read" in " ".join(text.split())


def tagged_shards(folder: Path) -> list[Path]:
    """Photos with tags, an exact copy in another shard, near ones, one that is torn and one of a hostile name."""
    shards: list[dict[str, bytes]] = [{}, {}]
    for i in range(12):
        picture = encoded(photo(i, (96, 64 if i % 3 else 96)), "JPEG", quality=90)
        tags = f"dog, grass, tag {i}, {'sky' if i % 2 else 'Sky'}"
        shards[i // 6] |= {f"{i:03}.jpg": picture, f"{i:03}.txt": tags.encode()}
    near = encoded(photo(2, (96, 64)).resize((48, 72)), "JPEG", quality=70)
    shards[1] |= {"copy.jpg": shards[0]["001.jpg"], "copy.txt": b"dog, grass, the same", "near.jpg": near,
                  "near.txt": b"dog, grass, &amp; near", "torn.jpg": near[:300], "torn.txt": b"dog, grass, torn",
                  "<b>.png": encoded(photo(40, (64, 64))), "<b>.txt": b"dog, <script>, sky"}
    return [write_shard(folder / f"s-{i}.tar", members) for i, members in enumerate(shards)]


def test_copies_and_tags_are_told(tmp_path: Path, capsys) -> None:
    tagged_shards(tmp_path / "s")
    code, text = check(capsys, tmp_path / "s" / "*.tar", *SETTINGS, "data.bad_samples=skip")
    assert code == 0 and "1 exact copy of other pictures" in text and "1 near-copy of other pictures" in text
    assert re.search(r"s-1\.tar/near\.jpg +like s-0\.tar/002\.jpg \(\d bits? of 64 differ\)", text)
    assert re.search(r"s-1\.tar/copy\.jpg +of s-0\.tar/001\.jpg, with another caption", text)
    assert "19 tags in 15 captions" in text and re.search(r"dog +\S+ +15", text) and "written in several ways" in text
    assert "1 caption with characters written as in HTML" in text
    text = check(capsys, tmp_path / "s" / "*.tar", *SETTINGS, "data.bad_samples=skip", "--json")[1]
    (told,) = json.loads(text)["folders"]
    assert [(group["names"], group["exact"]) for group in told["alike"]] == [
        (["s-0.tar/001.jpg", "s-1.tar/copy.jpg"], True), (["s-0.tar/002.jpg", "s-1.tar/near.jpg"], False)]
    assert told["compared"] == {"pictures": 14, "all": True} and told["captions"] == {"captions": 15, "different": 15}
    assert told["tags"]["counts"]["dog"] == 15 and told["tags"]["tags"] == 19 and told["tags"]["missed"] == 0
    assert sum(bucket["samples"] for bucket in told["shapes"]["buckets"]) == 15
    text = check(capsys, tmp_path / "s" / "*.tar", *SETTINGS, "data.bad_samples=skip", "--no-near-duplicates")[1]
    assert "exact copy" in text and "near-copy" not in text


def test_the_page_shows_what_the_model_will_see(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    tagged_shards(tmp_path / "s")
    with serving(tmp_path / "s") as server:
        code, text = check(capsys, server.url("s-{0..1}.tar"), *SETTINGS, "--html", tmp_path / "page.html")
    assert code == 1 and text.endswith(f"\npage: {tmp_path / 'page.html'}\n")
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    read = Reader(written)
    for heading in ("What was found", "Copies", "Sizes and shapes", "Tags", "As the model will see them"):
        assert heading in read.text, heading
    cards = [attributes for _, attributes in read.elements if attributes.get("class") == "card"]
    assert len(cards) == 16 and read.text.count("cannot be shown") == 1 and "<script" not in written
    pictures = read.all("img")
    assert all(str(image["src"]).startswith("data:image/") for image in pictures)
    image = next(image for image in pictures if image["alt"] == "s-0.tar/001.jpg")
    back = Image.open(io.BytesIO(base64.b64decode(str(image["src"]).split(",")[1])))
    assert (image["width"], image["height"]) == ("48", "80") == tuple(map(str, back.size))  # its bucket
    monkeypatch.setattr(dataset_parts, "MOST", 8)
    check(capsys, tmp_path / "s" / "*.tar", *SETTINGS, "--html", tmp_path / "page.html", "--force")
    read = Reader((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "8 of 16 are shown" in read.text and "taken evenly from all shards" in read.text
    assert sum(attributes.get("class") == "card" for _, attributes in read.elements) == 8


def test_what_cannot_be_looked_at_is_one_line(tmp_path: Path) -> None:
    assert "no such shard" in one_line(impasto("dataset", "check", tmp_path / "none.tar"))
    write_shards(tmp_path, [[(64, 64)]])
    (tmp_path / "x.html").write_text("mine")
    told = one_line(impasto("dataset", "check", tmp_path / "shard-0000.tar", "--html", tmp_path / "x.html"))
    assert "x.html" in told and "--force" in told


def test_the_check_loads_no_torch(tmp_path: Path) -> None:
    write_shards(tmp_path, [[(64, 64)] * 2])
    code = ("import sys; from impasto.cli import app\ntry:\n"
            f"    app.main(['dataset', 'check', {str(tmp_path / 'shard-0000.tar')!r}, 'data.resolution=64'])\n"
            "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip().endswith("0 False"), shown
