"""SD 3 through the toolbox: layers that a single file holds in one matrix are changed, and their change found again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from impasto.core.errors import UserError
from impasto.core.weighted import Weighted
from impasto.deltas.adapter import Adapter
from impasto.deltas.lowrank import LowRank
from impasto.deltas.ranks import Wanted
from impasto.families.load import load_base
from impasto.formats.adapters import load_adapter, save_adapter
from impasto.toolbox.extract import extract_to
from impasto.toolbox.merge import merge_adapters
from tests.checkpoints import SD35, write_checkpoint


@pytest.fixture(scope="module", params=["ldm", "diffusers"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = "mini.safetensors" if request.param == "ldm" else "mini"
    return write_checkpoint(tmp_path_factory.mktemp("sd3") / name, "sd3", layout=request.param, changes=SD35)


def lora(layers: dict[str, tuple[int, ...]], file: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    deltas = {layer: (LowRank.from_factors(torch.randn(shape[0], 2, generator=draw),
                                           torch.randn(2, shape[1], generator=draw)),)
              for layer, shape in layers.items()}
    save_adapter(Adapter(deltas, family="sd3"), file, dtype=torch.float32)
    return file


def test_a_lora_that_was_merged_comes_out_again(checkpoint: Path, tmp_path: Path) -> None:
    base = load_base(checkpoint)
    layers = {path: tuple(base.layer(path).weight.shape) for path in  # pyright: ignore
              (*base.targets(r"transformer_blocks.*(attn2?|ff|norm1(_context)?)\."), *base.targets("text-encoder"))}
    file = lora(layers, tmp_path / "a.safetensors")
    out = tmp_path / checkpoint.name
    assert merge_adapters(checkpoint, [Weighted(str(file))], out).changed == len(layers)
    made = extract_to(checkpoint, out, tmp_path / "out.safetensors", Wanted(rank=2), dtype=torch.float32)
    found, plain = load_adapter(tmp_path / "out.safetensors"), load_adapter(file)
    assert set(found.layers) == set(layers) and made.error < 1e-3 and not made.remarks
    for layer in layers:
        torch.testing.assert_close(found.dense(layer), plain.dense(layer), rtol=1e-3, atol=1e-4)


def test_an_identity_that_no_file_holds_cannot_be_changed(checkpoint: Path, tmp_path: Path) -> None:
    file = lora({"text_encoder.text_projection": (32, 32)}, tmp_path / "a.safetensors")
    if checkpoint.is_dir():
        assert merge_adapters(checkpoint, [Weighted(str(file))], tmp_path / "out").changed == 1
    else:
        with pytest.raises(UserError, match="text_encoder.text_projection, for which a single file has no place"):
            merge_adapters(checkpoint, [Weighted(str(file))], tmp_path / "out.safetensors")
