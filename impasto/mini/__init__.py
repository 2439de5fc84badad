"""The embedded base, and the world that it knows: drawn pictures whose truth is known."""

from pathlib import Path

from impasto.core.errors import UserError

#: the embedded base, a diffusers folder
BASE = Path(__file__).parent / "base"

#: the weights of the reader of pictures
READER = Path(__file__).parent / "reader.safetensors"

#: what of it is large, and missing first where a package was put together badly
WEIGHTS = ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
           "text_encoder/model.safetensors")


def check_weights() -> None:
    """Raise a `UserError` if this installation came without the embedded base's weights."""
    if missing := [name for name in WEIGHTS if not (BASE / name).is_file()]:
        raise UserError(f"this installation lacks the embedded base's weights ({missing[0]})", where=BASE,
                        fix="install Impasto again from its repository or its wheel, which have them; or train them: "
                        "python -m scripts.pretrain_mini")
