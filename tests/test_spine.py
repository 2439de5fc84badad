"""The whole path at real size: an SD 1.5-size single file, real photographs, the command line, kill -9, diffusers.

Random weights: what is shown is that the path holds, not that anything is learned. About 10 minutes and 13 GB.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.checkpoints import write_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")]

PHOTOS = ["astronaut.png", "chelsea.png", "rocket.jpg"]
CLASS_PHOTOS = ["coffee.png", "hubble_deep_field.jpg"]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an LDM file in fp16 and the photographs; gone after the module, as it is large."""
    skimage = pytest.importorskip("skimage")
    folder = tmp_path_factory.mktemp("real")
    write_checkpoint(folder / "v1-5.safetensors", family="sd1", size="real", layout="ldm", seed=0, dtype=torch.float16)
    shipped = Path(skimage.__file__).parent / "data"
    for name, files in (("photos", PHOTOS), ("class", CLASS_PHOTOS)):
        (folder / name).mkdir()
        for file in files:
            shutil.copy(shipped / file, folder / name)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def command(real: Path, out: str) -> list[str]:
    return [sys.executable, "-m", "impasto", "train", "dreambooth_lora", f"base.path={real / 'v1-5.safetensors'}",
            f"data.folder={real / 'photos'}", f"prior.folder={real / 'class'}", "data.resolution=256",
            "train.steps=3", "train.learning_rate=1e-3", "output.checkpoint_every=2", "output.name=cat",
            "output.dtype=fp32", f"output.dir={real / out}", "sample.every=3", "sample.steps=2", "train.device=cpu"]


def run(real: Path, out: str) -> None:
    subprocess.run(command(real, out), check=True, env=os.environ)


def log(folder: Path) -> list[dict]:
    path = folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def steps(folder: Path) -> list[int]:
    return [entry["step"] for entry in log(folder) if "loss" in entry]


def test_trains_survives_and_loads_in_diffusers(real: Path) -> None:
    run(real, "straight")
    assert steps(real / "straight") == [1, 2, 3]
    assert {p.name for p in (real / "straight/previews").iterdir()} == {"000000-0.png", "000003-0.png"}

    process = subprocess.Popen(command(real, "killed"))
    while not (real / "killed/checkpoints/000002").exists():  # killed in its third step
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (real / "killed/cat.safetensors").exists()
    run(real, "killed")
    assert steps(real / "killed") == [1, 2, 3]
    assert [e["step"] for e in log(real / "killed") if e.get("event") == "resumed"] == [2]
    ours, theirs = (load_file(real / out / "cat.safetensors") for out in ("straight", "killed"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)

    with_ours = draw_here(real)
    with_diffusers = draw_in_diffusers(real)
    assert np.abs(with_ours - with_diffusers).max() <= 1 / 255 + 1e-4  # pictures are 8 bits: one level of rounding
    assert np.abs(with_ours - draw_here(real, adapter=False)).max() > 8 / 255  # and the adapter is seen in them


def draw_here(real: Path, *, adapter: bool = True) -> np.ndarray:
    """A picture by `impasto generate`, in [0, 1]."""
    out = real / f"drawn-{adapter}"
    subprocess.run([sys.executable, "-m", "impasto", "generate", str(real / "v1-5.safetensors"), "a photo of sks dog",
                    "--steps", "4", "--scheduler", "ddim", "--size", "256x256", "--seed", "5", "--device", "cpu",
                    "-o", str(out), *(["--adapter", str(real / "straight/cat.safetensors")] if adapter else [])],
                   check=True)
    (picture,) = out.glob("*.png")
    return np.asarray(Image.open(picture), dtype=np.float64) / 255


def draw_in_diffusers(real: Path) -> np.ndarray:
    """The same picture by diffusers' own pipeline and loader."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = write_checkpoint(real / "folder", family="sd1", size="real", layout="diffusers", seed=0,
                              dtype=torch.float16)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(real / "straight", weight_name="cat.safetensors")
    picture = pipeline("a photo of sks dog", num_inference_steps=4, width=256, height=256, output_type="np",
                       generator=torch.Generator("cpu").manual_seed(5)).images[0]
    shutil.rmtree(folder)
    return picture
