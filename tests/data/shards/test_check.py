"""The account of shards takes a few bytes a sample, however many there are."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

from PIL import Image

from impasto.data.shards.check import check_shards
from impasto.data.shards.table import open_table
from impasto.evaluation.dataset_parts import MOST, shards_part
from tests.data.fakes import noise_picture
from tests.data.photos import encoded
from tests.data.sharded import options, write_shard


def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    """Of half of them all are copies of each other, of the others none."""
    file = io.BytesIO()
    Image.radial_gradient("L").resize((8, 8)).save(file, "PNG")
    figures = []
    counts = (1000, 5000)
    for count in counts:
        members = {}
        for i in range(count):
            picture = file.getvalue() if i % 2 else encoded(noise_picture(i, (8, 8)))
            members |= {f"{i:08d}.png": picture, f"{i:08d}.txt": f"dog, grass, number {i % 200}".encode()}
        write_shard(tmp_path / str(count) / "a.tar", members)
        data = options(tmp_path / str(count), resolution=8)
        open_table(data)
        check_shards(data, 1)  # imports and first uses
        tracemalloc.start()
        checked = check_shards(data, 1)
        part = shards_part(checked)
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        figures.append((kept, peak))
        assert checked.fit and checked.copies.count(True) == count // 2 - 1 and len(part.chosen) == MOST
        assert checked.words.tags is not None and checked.words.tags.counts["dog"] == count
    (kept_few, peak_few), (kept_many, peak_many) = figures
    samples = counts[1] - counts[0]
    assert (kept_many - kept_few) / samples < 40  # bytes
    assert (peak_many - peak_few) / samples < 300
