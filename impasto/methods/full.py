"""Full fine-tuning: a component's own weights are trained, in place and in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from impasto.core.errors import UserError
from impasto.methods.base import Method, MethodOptions, group_of

if TYPE_CHECKING:
    from torch import nn

    from impasto.families.base import Base

Part = Literal["unet", "text-encoder", "vae", "vae-decoder"]


class Full(Method):
    """Trains every weight of the parts that are named. What it leaves behind is a whole base."""

    class Options(MethodOptions):
        kind: Literal["full"] = "full"
        parts: list[Part] = Field(
            ["unet"], min_length=1, description="What is trained: unet, text-encoder (all of them, if there are "
            "several), vae, or vae-decoder alone, which keeps latents as other programs know them (as in Stability's "
            "ft-MSE decoder).")
        text_encoder_learning_rate: float | None = Field(
            None, gt=0, description="Rate of the text encoders; default: learning_rate.")

    options: Options
    in_place = True

    def chosen(self, base: Base) -> dict[str, nn.Module]:
        """The parts to train, by their path in the base."""
        found: dict[str, nn.Module] = {}
        for part in self.options.parts:
            match part:
                case "unet":
                    found[base.denoiser_name] = base.denoiser
                case "text-encoder":
                    found |= {name: base.components[name] for name in base.text_encoder_names}
                case "vae":
                    found["vae"] = base.components["vae"]
                case "vae-decoder":
                    found |= {f"vae.{name}": module for name, module in base.components["vae"].named_children()
                              if name in ("decoder", "post_quant_conv")}
        if "vae" in found:  # its decoder is then trained already
            found = {path: module for path, module in found.items() if not path.startswith("vae.")}
        return found

    def prepare(self, base: Base, seed: int) -> list[dict[str, Any]]:
        """Let the parts train; one parameter group for each."""
        rate = self.options.text_encoder_learning_rate
        if rate is not None and "text-encoder" not in self.options.parts:
            raise UserError("no text encoder is trained", where="method full: text_encoder_learning_rate",
                            fix='add "text-encoder" to parts, or leave the rate out')
        self.parts = self.chosen(base)
        groups = []
        for path, module in self.parts.items():
            for parameter in module.parameters():  # diffusers warns of `Module.to`
                parameter.data = parameter.data.float()
            module.requires_grad_(True).train()
            own = rate if path in base.text_encoder_names and rate is not None else self.options.learning_rate
            groups.append(group_of(module, path, f"full {path}", own))
        return groups

    def modules(self) -> dict[str, nn.Module]:
        """The parts, by their path in the base."""
        return dict(self.parts)

    def trains(self, base: Base) -> frozenset[str]:
        return frozenset(path.partition(".")[0] for path in self.chosen(base))

    def adapter(self) -> None:
        return None
