"""The report is one well-formed page that needs nothing from outside, whatever is put into it."""

from __future__ import annotations

import base64
import dataclasses
import errno
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from impasto.core.errors import UserError
from impasto.evaluation import report as report_module
from impasto.evaluation.report import Figure, Grid, Report, nice_ticks, page, running_mean, write_report
from impasto.mini import world

HOSTILE = '<script>alert(1)</script> & "x" \' </title></style>'
VOID = {"meta", "link", "img", "br"}
EMPTY = Report("Nothing", "", Grid([]), [], [], [], [], [], [], [])


def picture(seed: int = 0, side: int = 32) -> Image.Image:
    return world.draw(world.scene(seed), side, seed)


def sample(text: str = "a red star", losses: list[float] | None = None) -> Report:
    """A report with something in each part, `text` wherever a text goes."""
    one = picture()
    return Report(
        title=text, lead=text, training=Grid([(text, [one, picture(1)]), ("", [picture(2)])]),
        before_after=[(text, one, picture(3))], strip=[(0, one), (20, picture(4))],
        losses=[1 / (i + 1) for i in range(40)] if losses is None else losses,
        figures=[Figure(text, text, text, True), Figure("b", "2", good=False), Figure("c", "3")],
        forgotten=[(text, one, one)], commands=[(text, text)], notes=[text])


class Reader(HTMLParser):
    """Reads a page and asserts that its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> says something twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def full() -> Reader:
    return Reader(page(sample()))


def test_a_page_of_everything_is_well_formed(full: Reader) -> None:
    levels = [int(tag[1]) for tag, _ in full.elements if re.fullmatch("h[1-6]", tag)]
    assert levels == [1] + [2] * 7  # a title, and a heading for each section
    assert not re.search(r"\$\w", full.text)  # no slot is left unfilled


def test_nothing_is_loaded_from_outside_and_nothing_runs(full: Reader) -> None:
    for tag, attributes in full.elements:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "poster", "data", "action"):
                assert value is not None and value.startswith("data:"), (tag, name)
    without = re.sub(r"base64,[\w+/=]+", "", page(sample()))  # base64 has slashes of its own
    assert not re.search(r"https?:|//|@import|url\(", without, re.IGNORECASE)
    policy = next(meta["content"] for meta in full.all("meta") if "http-equiv" in meta)
    assert policy is not None and "default-src 'none'" in policy


def test_pictures_come_back(full: Reader) -> None:
    pictures = full.all("img")
    assert len(pictures) == 10  # 3 of training, 1 at the head, 2 + 2 in pairs, 2 previews
    for attributes in pictures:
        assert attributes["alt"]
        head, data = str(attributes["src"]).split(",")
        assert re.fullmatch("data:image/(webp|png);base64", head)
        shown = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        assert shown.size == (64, 64) == (int(str(attributes["width"])), int(str(attributes["height"])))
    original = np.asarray(picture().resize((64, 64), Image.Resampling.LANCZOS), dtype=float)
    first = Image.open(io.BytesIO(base64.b64decode(str(pictures[1]["src"]).split(",")[1])))
    assert np.abs(np.asarray(first.convert("RGB"), dtype=float) - original).mean() < 8


@pytest.mark.parametrize("text", [HOSTILE, "${title} $x", "sk\udcff \x00", "p" * 300])
def test_any_text_is_only_text(text: str, tmp_path: Path) -> None:
    written = write_report(sample(text), tmp_path / "r.html").read_text(encoding="utf-8")
    read = Reader(written)
    plain = Reader(page(sample()))
    assert [tag for tag, _ in read.elements] == [tag for tag, _ in plain.elements]
    assert [sorted(attributes) for _, attributes in read.elements] == [sorted(a) for _, a in plain.elements]
    if text == HOSTILE:
        assert written.count("<script") == 0 and read.text.count(HOSTILE) == 12


def test_a_table_has_its_columns() -> None:
    report = dataclasses.replace(EMPTY, training=Grid([(HOSTILE, [picture(), picture(1)]), ("b", [picture(2)])],
                                                      ["first", HOSTILE]))
    read = Reader(page(report))
    assert [th["scope"] for th in read.all("th")] == ["col", "col", "rowgroup", "rowgroup"]
    assert len(read.all("td")) == 3


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("losses", [
    [], [NAN], [NAN, INF, -INF], [0.5], [0.5, NAN], [0.0] * 5, [0.0] * 9 + [1.0], [-3.0, -2.0], [1e-30, 1e30],
    [0.3] * 50 + [1e9, NAN] + [0.2] * 50, [1e300] * 3, list(np.linspace(1, 0.1, 20_000))])
def test_no_loss_breaks_the_curve(losses: list[float]) -> None:
    text = page(sample(losses=losses))
    read = Reader(text)
    assert len(read.all("svg")) == bool(np.isfinite(losses).any())
    for path in read.all("path"):
        numbers = [float(number) for number in re.findall(r"[^MLHhZ ]+", str(path["d"]))]
        assert all(0 <= number <= 1000 for number in numbers)
    assert len(text) < 300_000


def test_wild_steps_are_told_and_do_not_flatten_the_rest() -> None:
    text = page(sample(losses=[0.3] * 50 + [1e9, NAN] + [0.2] * 50))
    assert "1 step lies outside the frame" in text and "1 step has no finite loss" in text
    levels = [float(level) for level in re.findall(r'class="y"[^>]*>([^<]*)<', text)]
    assert 0.3 <= max(levels) < 10


def test_the_running_mean_is_that_of_the_finite_values_around() -> None:
    values = np.array([1.0, NAN, 3.0, 4.0, 8.0, INF, 1.0, NAN, NAN, NAN, NAN])
    for window in (1, 2, 3, 5, 100):
        for i, mean in enumerate(running_mean(values, window)):
            around = values[max(0, i - window // 2): i + (window + 1) // 2]
            around = around[np.isfinite(around)]
            assert mean == pytest.approx(around.mean()) if len(around) else np.isnan(mean)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, .37), (-.2, .9), (0, 400), (0, 1e-9), (5, 5), (0, 0), (-2, -1)])
def test_ticks_are_few_and_enclose(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high - 1e-6 * (high - low) and 2 <= len(ticks) <= 7
    assert all(len(f"{tick:g}") < 7 for tick in ticks)


def test_large_pictures_are_kept_smaller_and_transparent_ones_transparent() -> None:
    large = report_module._picture(picture(0, 600), "", 448)
    assert 'width="448" height="448"' in large
    clear = report_module.data_uri(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))
    assert Image.open(io.BytesIO(base64.b64decode(clear.split(",")[1]))).mode == "RGBA"
    for mode in ("1", "L", "P", "CMYK"):
        assert report_module._picture(Image.new(mode, (8, 4)), "", 448).startswith("<img")


def test_without_webp_pictures_are_png(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module.features, "check", lambda name: False)
    assert report_module.data_uri(picture()).startswith("data:image/png;")


def test_sixty_pictures_stay_small() -> None:
    pictures = [picture(i, 128) for i in range(60)]
    assert len(page(dataclasses.replace(EMPTY, training=Grid([("all", pictures)])))) < 1_000_000


def test_an_empty_report_is_a_page_too() -> None:
    assert not Reader(page(EMPTY)).all("section")


def test_it_is_written_into_folders_that_were_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "report.html"
    assert write_report(EMPTY, path) == path
    assert path.read_text(encoding="utf-8") == page(EMPTY)


@pytest.mark.parametrize("break_", ["parent is a file", "path is a folder", "no permission", "full disk"])
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(break_, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "out"
    if break_ == "parent is a file":
        folder.write_bytes(b"mine")
    else:
        folder.mkdir()
    if break_ == "path is a folder":
        (folder / "r.html").mkdir()
    if break_ == "no permission":  # as a folder of mode 0555 says, which does not bind root
        def denied(**_: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        monkeypatch.setattr("tempfile.mkstemp", denied)
    if break_ == "full disk":
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        monkeypatch.setattr("os.fsync", full)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"r\.html"):
        write_report(EMPTY, folder / "r.html")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir(mode=0o555)
    with pytest.raises(UserError, match="cannot be written"):
        write_report(EMPTY, folder / "r.html")
    assert not list(folder.iterdir())
