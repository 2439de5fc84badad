"""diffusers' sampling schedulers under the names that people call them by, set up for a base's own noise process."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from impasto.core.errors import UserError, nearest
from impasto.diffusion.process import Process

#: diffusers' class and options of a name; "-" and "_" are one. Karras: the steps of Karras et al. 2022, eq. 5
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++2m_karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "dpm++2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++2m_sde_karras": ("DPMSolverMultistepScheduler",
                           {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}

#: the solvers of rectified flow
FLOW: dict[str, str] = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "dpm++2m_sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}

#: of the checkpoint's own scheduler config, what is about sampling and no other scheduler's business
_SAMPLING = ("timestep_spacing", "steps_offset", "set_alpha_to_one")

#: what holds for latents: they have no range to be clipped to. The rest is Stable Diffusion's since its first
#: release (steps counted from 1, the last one to the first alpha), where its config does not say otherwise.
_LATENT = {"clip_sample": False, "thresholding": False}
_USUAL = {"steps_offset": 1, "set_alpha_to_one": False}


def canonical(name: str) -> str:
    """A scheduler's name as `SCHEDULERS` has it, or the name of a diffusers class. Raises `UserError`."""
    plain = name.lower().replace("-", "_").replace(" ", "_")
    if plain in SCHEDULERS:
        return plain
    if name.endswith("Scheduler") and inspect.isclass(getattr(diffusers, name, None)):
        return name
    raise UserError(f"unknown scheduler {name!r}", fix=nearest(plain, SCHEDULERS))


def make_scheduler(name: str, process: Process, own: Mapping[str, Any]) -> Any:
    """A fresh scheduler (they hold state) of `process`; `own` is the checkpoint's scheduler config."""
    name = canonical(name)
    kind, options = SCHEDULERS.get(name, (name, {}))
    config = dict(process.scheduler_config())
    if process.prediction == "flow":
        if name not in FLOW and "Flow" not in kind:
            raise UserError(f"scheduler {name!r} does not sample a flow", fix="one of " + ", ".join(FLOW))
        kind = FLOW.get(name, kind)
        config |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": config["shift"]}
    else:
        config = _USUAL | {key: own[key] for key in _SAMPLING if key in own} | config
        if process.zero_terminal_snr:
            config["timestep_spacing"] = "trailing"  # sampling must begin at pure noise: Lin et al. 2024, section 3.3
    cls = getattr(diffusers, kind)
    known = inspect.signature(cls.__init__).parameters
    config = {key: value for key, value in (config | options | _LATENT).items() if key in known}
    try:
        return cls(**config)
    except ImportError:  # diffusers' stand-in for a class whose dependency is absent
        raise UserError(f"scheduler {name!r} needs the package scipy", fix="pip install scipy") from None
