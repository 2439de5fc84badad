"""The families of Stable Diffusion. A new family is one file and one line here."""

from impasto.core.registry import Registry

FAMILIES = Registry("family", {
    "sd1": "impasto.families.sd1:SD1",
    "sd2": "impasto.families.sd2:SD2",
    "sdxl": "impasto.families.sdxl:SDXL",
    "sdxl-refiner": "impasto.families.sdxl:Refiner",
    "sd3": "impasto.families.sd3:SD3",
})
