"""The ways of fine-tuning. A new method is one file and one line here."""

from impasto.core.registry import Registry

METHODS = Registry("method", {
    "full": "impasto.methods.full:Full",
    "hypernetwork": "impasto.methods.hypernetwork:Hypernetwork",
    "loha": "impasto.methods.loha:LoHa",
    "lokr": "impasto.methods.lokr:LoKr",
    "lora": "impasto.methods.lora:LoRA",
    "textual_inversion": "impasto.methods.textual_inversion:TextualInversion",
})
