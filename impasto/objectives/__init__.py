"""What a run minimises. A new objective is one file and one line here."""

from impasto.core.registry import Registry

OBJECTIVES = Registry("objective", {
    "denoise": "impasto.objectives.denoise:Denoise",
    "teach": "impasto.objectives.teach:Teach",
    "reconstruct": "impasto.objectives.reconstruct:Reconstruct",
    "classify": "impasto.objectives.classify:Classify",
})
