"""What a fine-tune leaves behind, free of any file format. A new kind of delta is one file and one line here."""

from impasto.core.registry import Registry

DELTAS = Registry("kind of delta", {
    "dense": "impasto.deltas.dense:Dense",
    "dora": "impasto.deltas.dora:Dora",
    "loha": "impasto.deltas.hadamard:Hadamard",
    "lokr": "impasto.deltas.kronecker:Kronecker",
    "lora": "impasto.deltas.lowrank:LowRank",
})
