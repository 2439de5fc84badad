"""The ways of fine-tuning. A new method is one file and one line here."""

from impasto.core.registry import Registry

METHODS = Registry("method", {
    "lora": "impasto.methods.weights:LoRA",
})
