"""`impasto dataset check` of shards: every sample counted, what is wrong named, and nothing loaded for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from impasto.cli import app
from tests.cli.running import impasto, one_line
from tests.data.sharded import aged, sample, serving, write_shard, write_shards
from tests.data.shards.test_index import bad_shard

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
    assert "9 of 9 samples can be used" in text and "6 at 64x64, 3 at 80x48" in text
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
                 "the shard is cut short here", "with exact copies of other pictures", "enlarged"):
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
    assert "2 samples with a caption that is not read" in text.replace("\n", " ").replace("  ", " ") \
        or "3 samples" in text


def test_what_cannot_be_looked_at_is_one_line(tmp_path: Path) -> None:
    assert "no such shard" in one_line(impasto("dataset", "check", tmp_path / "none.tar"))
    write_shards(tmp_path, [[(64, 64)]])
    told = one_line(impasto("dataset", "check", tmp_path / "shard-0000.tar", "--html", tmp_path / "x.html"))
    assert "made of folders only" in told


def test_the_check_loads_no_torch(tmp_path: Path) -> None:
    write_shards(tmp_path, [[(64, 64)] * 2])
    code = ("import sys; from impasto.cli import app\ntry:\n"
            f"    app.main(['dataset', 'check', {str(tmp_path / 'shard-0000.tar')!r}, 'data.resolution=64'])\n"
            "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip().endswith("0 False"), shown
