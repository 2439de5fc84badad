from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from benchmarks.squares import columns, parameters
from impasto.planning.cards import card_of
from impasto.planning.drawn import SIDE, Box, draw, scene
from impasto.planning.forecast import GIB, PARTS
from impasto.planning.picture import LOOKS, Column, gib, show, squares


def printed(made: list[Column], width: int = 80, *, ascii_only: bool = False) -> str:
    """As it comes out of a pipe."""
    stream = io.StringIO()
    show(squares(made, width, ascii_only=ascii_only), stream)
    return stream.getvalue()


def test_the_well_known_table_of_sd_1_5() -> None:
    """859.52 + 123.06 + 83.65 M parameters are 3.97 GiB in fp32; gradients of two of them 3.66, Adam's states 7.32."""
    assert [f"{count / 1e6:.2f}" for count in parameters("sd1").values()] == ["859.52", "123.06", "83.65"]
    fp32, fp16, lora = columns()
    assert gib(sum(fp32.parts[name] for name in ("unet", "text_encoder", "vae"))) == "3.97"
    assert gib(fp32.parts["gradients"]) == "3.66" and gib(fp32.parts["optimizer"]) == "7.32"
    assert fp16.total * 2 == fp32.total
    assert lora.parts["adapter"] == lora.parts["gradients"] == lora.parts["optimizer"] / 2 == 4 * 16 * 199_296


def test_each_part_has_a_letter_of_its_own() -> None:
    assert LOOKS.keys() == PARTS.keys()
    assert len({look.letter for look in LOOKS.values()}) == len(PARTS)


def test_characters_are_eighths_of_a_gib() -> None:
    column = Column("some", {"unet": 3 * GIB // 2, "gradients": GIB // 2 + GIB // 8, "vae": GIB // 8}, card_of("4"))
    text = printed([column])
    drawn = Counter(c for line in text.splitlines() if line.startswith("│") for c in line)
    assert (drawn["V"], drawn["U"], drawn["G"], drawn["·"]) == (1, 12, 5, 14)
    assert "2.25 of 4 GiB\n1.75 free" in text and "does not fit" not in text


def test_what_does_not_fit_is_below_the_card() -> None:
    text = printed([Column("much", {"unet": 3 * GIB, "optimizer": 2 * GIB}, card_of("4"))])
    card, _, below = text.partition("does not fit:")
    assert card.count("O") == 8 and below.partition("GiB")[0].count("O") == 8
    assert "1.00 too much" in below


def test_a_card_may_end_within_a_square() -> None:
    text = printed([Column("half", {"unet": 2 * GIB}, card_of("1.5"))])
    card, _, below = text.partition("does not fit:")
    assert card.count("U") == 12 and below.partition("of")[0].count("U") == 4


@pytest.mark.parametrize("width", [20, 30, 40, 79, 80, 120, 200])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_any_width_will_do(width: int, ascii_only: bool) -> None:
    for made in ([*columns()], [*columns(card="H100")], [Column("no card", {"unet": 90 * GIB})]):
        text = printed(made, width, ascii_only=ascii_only)
        assert max(map(len, text.splitlines())) <= width
        assert "\x1b" not in text  # no terminal, no colour
        assert text.isascii() or not ascii_only
        for column in made:
            assert gib(column.total) in text


def test_columns_stand_beside_each_other_where_there_is_room() -> None:
    first = printed(columns(), 80).splitlines()
    assert first[2].count("┌") == 3
    assert printed(columns(), 60).splitlines()[2].count("┌") == 2


def test_a_terminal_gets_colours() -> None:
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, force_terminal=True, color_system="truecolor", width=80).print(*squares(columns()[:1]))
    assert "48;2;31;78;121" in stream.getvalue()  # the UNet's ground, #1f4e79


def test_a_picture_divides_squares_exactly() -> None:
    column = Column("all", {part: (3 + i) * GIB // 7 for i, part in enumerate(PARTS)}, card_of("12"))
    areas = Counter()
    for shape in scene([column]).shapes:
        if isinstance(shape, Box) and shape.height == SIDE and shape.fill:
            areas[shape.fill] += shape.width / SIDE * GIB
    wanted = Counter()
    for part, size in column.parts.items():
        wanted[LOOKS[part].colour] += size
    assert areas.keys() == wanted.keys()
    assert all(areas[colour] == pytest.approx(wanted[colour]) for colour in wanted)


def test_pictures_are_written(tmp_path: Path) -> None:
    draw(columns(), tmp_path / "squares.png")
    with Image.open(tmp_path / "squares.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 6
    draw(columns(card="2"), tmp_path / "squares.svg")
    root = ElementTree.fromstring((tmp_path / "squares.svg").read_text())
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "does not fit:" in words and "14.95" in words and "optimizer states" in words
