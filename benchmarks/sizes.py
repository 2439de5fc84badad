"""How large a LoRA for Stable Diffusion 1.5 is, by rank and by what it is on, counted to the byte without training.

    python -m benchmarks.sizes [--ranks 8 16 32 64 128]

In kohya's format, with the metadata of a training. Then, which sets of layers have the sizes of a table that is shown
without saying what it is of, 11, 21, 41, 82 and 163 MiB for these ranks, rounded up: of all unions of up to four kinds
of layers, by their factors' bytes alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
from typing import Any

from benchmarks.common import MIB, print_table
from impasto.planning.sizes import artifact_bytes, shapes
from impasto.training.recipe import BaseOptions, make_recipe

SD1 = BaseOptions.model_validate({"family": "sd1"})
RANKS = (8, 16, 32, 64, 128)
PUBLISHED = {8: 11, 16: 21, 32: 41, 64: 82, 128: 163}

#: what the LoRA is on -> words for it. kohya's networks.lora takes all linear layers and 1×1 convolutions of the blocks
#: that hold attention; with conv_dim also those of the ResNets and samplers
SETS: dict[str, list[str]] = {
    "cross-attention": ["cross-attention"],
    "attention": ["attention"],
    "attention, feed-forward": ["attention", "feed-forward"],
    "attention, feed-forward, proj_in/out (kohya)": ["attention", "feed-forward", r"^unet.*\.proj_(in|out)$"],
    "attention, convolutions": ["attention", "convolutions"],
    "all, with convolutions (kohya with conv_dim)": ["all"],
}
TEXT = " + text encoder"

#: kinds of layers, each layer in one of them
KINDS = {
    "self-attention": r"^unet.*attn1\.to_", "cross-attention": r"^unet.*attn2\.to_", "ff.net.0": r"ff\.net\.0\.proj$",
    "ff.net.2": r"ff\.net\.2$", "proj_in/out": r"^unet.*\.proj_(in|out)$", "ResNets' conv1, conv2": r"conv[12]$",
    "conv_shortcut": r"conv_shortcut$", "samplers": r"samplers", "time_emb_proj": r"time_emb_proj$",
    "conv_in/out": r"^unet\.conv_(in|out)$", "time_embedding": r"time_embedding",
    "text encoder's attention": r"self_attn\.", "text encoder's mlp": r"mlp\.",
}


def per_rank() -> dict[str, int]:
    """For each kind of layers the numbers that a rank costs: inputs, times the kernel, and outputs."""
    from impasto.families.unet_targets import paths

    base, found = shapes(SD1), dict.fromkeys(KINDS, 0)
    for path in paths(base.components, ("unet", "text_encoder"), embeddings=False):
        (kind,) = [kind for kind, pattern in KINDS.items() if re.search(pattern, path)]
        shape = base.parameter(f"{path}.weight").shape
        found[kind] += shape[0] + math.prod(shape[1:])
    return found


def size(targets: list[str], rank: int, dtype: str) -> int:
    """Bytes of the file."""
    method: dict[str, Any] = {"kind": "lora", "rank": rank, "targets": targets}
    recipe = make_recipe({"base": {"path": "v1-5-pruned-emaonly.safetensors"}, "method": method,
                          "train": {"device": "cpu"}, "output": {"dtype": dtype, "name": "lora"}})
    return artifact_bytes(recipe, shapes(SD1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    told = parser.parse_args()
    sets = {name + tail: words + more for name, words in SETS.items()
            for tail, more in (("", []), (TEXT, ["text-encoder"]))}
    found = {dtype: {name: {rank: size(words, rank, dtype) for rank in told.ranks} for name, words in sets.items()}
             for dtype in ("fp16", "fp32")}
    for dtype, table in found.items():
        print(f"\n{dtype}, MiB\n")
        print_table(["on", *(f"rank {rank}" for rank in told.ranks)],
                    [[name, *(f"{value / MIB:.1f}" for value in row.values())] for name, row in table.items()])
    print("\nsets of the published table, " + ", ".join(map(str, PUBLISHED.values())) + " MiB:")
    costs = per_rank()
    for dtype, width in (("fp16", 2), ("fp32", 4)):
        for kinds in (kinds for count in range(1, 5) for kinds in itertools.combinations(costs, count)):
            numbers = sum(costs[kind] for kind in kinds)
            if all(math.ceil(numbers * width * rank / MIB) == wanted for rank, wanted in PUBLISHED.items()):
                print(f"  {dtype}, {numbers:,} a rank: {'; '.join(kinds)}")


if __name__ == "__main__":
    main()
