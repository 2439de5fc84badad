"""What a fine-tune leaves behind, free of any file format. A new kind of delta is one file and one line here."""

from impasto.core.registry import Registry

DELTAS = Registry("kind of delta", {
    "lora": "impasto.deltas.lowrank:LowRank",
})
