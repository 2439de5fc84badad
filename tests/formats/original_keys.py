"""Which tensors the original implementations have: lists of keys and shapes, made from their own code.

Each list in `original/` begins with lines that name the public repository, its files and the revision. A list
is the whole `state_dict` of the authors' own module, built from their own configuration; so a layout that is
held against it is held against neither diffusers nor a converter of ours.

`original/others/` has short lists of files that are none of ours, to tell them by.
"""

from __future__ import annotations

import functools
import gzip
import re
from pathlib import Path

Shape = tuple[int, ...]

FOLDER = Path(__file__).parent / "original"

#: family -> its lists; the first is that of the configuration which the family's table publishes
LISTS: dict[str, tuple[str, ...]] = {
    "sd1": ("sd1.5",), "sd2": ("sd2.1",), "sdxl": ("sdxl-base",), "sdxl-refiner": ("sdxl-refiner",),
    "sd3": ("sd3-medium", "sd3.5-medium", "sd3.5-large"),
}

#: keys that are not written (a pattern for the whole key), and why
UNWRITTEN = {
    r"betas|\w*alphas_cumprod\w*|posterior_\w+": "the noise schedule, which follows from its settings",
    r"denoiser\.sigmas|model\.model_sampling\.sigmas": "the noise schedule of the sampler",
    r"model_ema\..+": "of the running average in training; decay and num_updates are left in published files",
    r".+\.position_ids": "counts from 0 to 76; a buffer of transformers before 4.31",
    r"text_encoders\..+\.logit_scale": "the temperature of CLIP's contrastive loss, without part in an encoding",
    r"text_encoders\.clip_l\.transformer\.text_projection\.weight":
        "an identity that the program makes by itself; published files lack it",
}

#: tensors that published files hold a second time under another name -> their name in the lists
TWINS = {"text_encoders.t5xxl.transformer.shared.weight": "text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"}


def unwritten(key: str) -> bool:
    """Whether a key is one of those that are not written."""
    return any(re.fullmatch(pattern, key) for pattern in UNWRITTEN)


OTHERS = sorted(path.stem for path in (FOLDER / "others").glob("*.txt"))


@functools.cache
def text_of(name: str) -> str:
    """A list as it is, with the lines that say where it is from."""
    if name in OTHERS:
        return (FOLDER / "others" / f"{name}.txt").read_text(encoding="utf-8")
    return gzip.decompress((FOLDER / f"{name}.txt.gz").read_bytes()).decode()


def keys_of(name: str) -> dict[str, Shape]:
    """Key -> shape."""
    rows = [line.split() for line in text_of(name).splitlines() if not line.startswith("#")]
    return {key: tuple(map(int, shape)) for key, *shape in rows}
