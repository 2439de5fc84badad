"""Checkpoints on the disk: single files (LDM) and diffusers folders, under one set of names, read as a stream.

Opening one reads headers alone. What a single file does not say of its networks follows from its tensors'
shapes and, where shapes do not tell (heads, groups of the norms), from the family's published configuration; files
of ours with other settings record them in their metadata, `impasto.config` (JSON by component).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from impasto.core.errors import UserError, nearest
from impasto.formats.configs import CONFIGS, FamilyConfig, Part
from impasto.formats.detect import Detected, detect_names, family_of_folder, variant_of
from impasto.formats.placing import derived, left_over, place, spelled
from impasto.formats.probe import read_json
from impasto.formats.source import Source
from impasto.formats.tensor_files import NoTensors, TensorFile, open_tensors

#: names of a component's weights in a diffusers folder, the first that is there: safetensors before pickles, the
#: main files before the half-precision variant
WEIGHTS = (
    *(f"{stem}{end}" for stem in ("diffusion_pytorch_model", "model") for end in (
        ".safetensors", ".safetensors.index.json", ".fp16.safetensors", ".safetensors.index.fp16.json",
        ".fp16.safetensors.index.json")),
    *(f"{stem}{end}" for stem in ("diffusion_pytorch_model", "pytorch_model") for end in (
        ".bin", ".bin.index.json", ".fp16.bin", ".bin.index.fp16.json")),
)

#: how keys end that scale other tensors (ComfyUI's comfy/ops.py and quant_ops.py)
SCALES = (".scale_weight", ".weight_scale", ".weight_scale_2", "scaled_fp8", ".comfy_quant")

#: `modelspec.prediction_type` -> diffusers' word
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction",
               "v-prediction": "v_prediction"}
#: and back: the words of Stability's specification of models (SAI modelspec 1.0.1), which has none for a flow
WORDS = {"epsilon": "epsilon", "v_prediction": "v"}

@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors are still on the disk, named as in diffusers (a text encoder's with `text_model.`).

    `configs`: each component's configuration in diffusers' or transformers' terms. `scheduler`: the noise process,
    as a diffusers scheduler's configuration; without `prediction_type` where nothing tells it. `surplus`: keys that no
    component takes; `unused`: those that belong there, and that nothing computes with. `tokenizers`: the folder's own.
    `family` is "" for a VAE alone, which does not tell; `variant`: "inpainting", "instruct-pix2pix" or "".
    """

    path: Path
    family: str
    layout: str
    configs: dict[str, dict[str, Any]]
    scheduler: dict[str, Any]
    sources: dict[str, Source]
    surplus: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    tokenizers: dict[str, Path] = field(default_factory=dict)
    variant: str = ""
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(self.sources)

    @property
    def native_size(self) -> int:
        """Side in pixels of the pictures that the denoiser was made for; 0 where that is not told."""
        denoiser = self.configs.get("unet") or self.configs.get("transformer") or {}
        halvings = len(self.configs.get("vae", {}).get("block_out_channels", ())) - 1
        size = denoiser.get("sample_size")
        return size * 2**halvings if isinstance(size, int) and halvings >= 0 else 0

    def predicting(self, kind: str | None) -> Checkpoint:
        """The checkpoint with the kind of prediction that somebody told, if any. Raises `UserError`."""
        if kind is None:
            return self
        if kind not in PREDICTIONS:
            raise UserError(f"there is no kind of prediction {kind!r}", fix=nearest(kind, PREDICTIONS))
        if "Flow" in str(self.scheduler.get("_class_name")):
            raise UserError("predicts a flow, as all of its family do", where=self.path,
                            fix="leave --prediction (base.prediction) out")
        told = {**self.scheduler, "prediction_type": PREDICTIONS[kind]}
        configs = self.configs if self.layout != "ldm" else _sized(self.configs, told, CONFIGS.get(self.family))
        return replace(self, scheduler=told, configs=configs)

    def averaged(self) -> Checkpoint:
        """The checkpoint with the running average of its denoiser's weights in place of the last ones.

        Training by LDM leaves them in a single file as `model_ema.…`, the rest of each name without its dots (`LitEma`,
        ldm/modules/ema.py of github.com/CompVis/latent-diffusion). Raises `UserError` if there are none.
        """
        if self.layout != "ldm":
            raise UserError("is a diffusers folder, and single files alone hold a running average", where=self.path,
                            fix="leave --ema out")
        name = "unet" if "unet" in self.sources else "transformer"
        source = self.sources[name]
        places = {tensor: place._replace(key="model_ema." + place.key.removeprefix("model.").replace(".", ""))
                  for tensor, place in source.places.items()}
        if lacking := [place.key for place in places.values() if place.key not in source.file.shapes]:
            raise UserError(f"holds no running average of its weights ({lacking[0]} is missing)", where=self.path,
                            fix="leave --ema out")
        taken = {place.key for place in places.values()}
        return replace(self, sources={**self.sources, name: Source(source.file, places)},
                       surplus=[key for key in self.surplus if key not in taken])

    def check_prediction(self) -> None:
        """Raise a `UserError` where nothing tells what the network predicts."""
        if self.scheduler and "prediction_type" not in self.scheduler and \
                "Flow" not in str(self.scheduler.get("_class_name")):
            raise UserError("does not tell whether its network predicts the noise or the velocity", where=self.path,
                            fix="say epsilon (SD 2 base, of 512 pixels) or v_prediction (of 768), as --prediction "
                            "or base.prediction")

    def names(self, component: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each tensor, by name. No tensor is read."""
        source = self.sources[component]
        return {name: (place.shape, source.dtype(name)) for name, place in source.places.items()}

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, one at a time, mapped from the file in the file's type; not in the order of `names`."""
        source = self.sources[component]
        owners = source.owners()
        for key, tensor in source.file.read(key for key in source.file.shapes if key in owners):
            for name in owners[key]:
                yield name, source.places[name].out_of(tensor)
        yield from ((name, source.identity(name)) for name, place in source.places.items() if not place.key)

    def tensor(self, component: str, name: str) -> Tensor:
        """One tensor, mapped from the file in the file's type."""
        source = self.sources[component]
        if not source.places[name].key:
            return source.identity(name)
        ((_, tensor),) = source.file.read([source.places[name].key])
        return source.places[name].out_of(tensor)

    def files(self, component: str) -> list[Path]:
        """The files that hold the component, sorted."""
        source = self.sources[component]
        return source.file.files(place.key for place in source.places.values() if place.key)


def open_checkpoint(path: Path | str, *, weights: bool = True, family: str = "") -> Checkpoint:
    """Open a single file (.safetensors, .ckpt) or a diffusers folder; also a VAE alone, in either layout.

    Without `weights` the configurations are all that is wanted, and a folder need hold no more. `family`: whose VAE it
    is, if it is one alone, which does not tell its scale.

    Raises `UserError` in one line: no such file, damaged, not a checkpoint, of a family that is not read,
    tensors missing or of a wrong shape. Surplus tensors are listed, not refused.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, weights) if (path / "model_index.json").exists() else _open_component(path)
    file = open_tensors(path)
    found = detect_names(file.shapes, file.metadata)
    if found.kind == "vae":
        return _open_vae(path, file, found, family)
    if found.kind not in ("checkpoint", "unet") or found.layout != "ldm":
        raise UserError(f"is {found.title}, not a checkpoint", where=path,
                        fix="a base is a single file with UNet, VAE and text encoder, or a diffusers folder")
    return _open_single(path, file, found, _table(path, found))


def _table(path: Path, found: Detected) -> FamilyConfig:
    """The table of a family. `UserError` for one that has none."""
    if found.family not in CONFIGS:
        what = f"is {found.title}, which is not supported" if found.family else \
            "is a checkpoint of a family that cannot be told"
        raise UserError(what, where=path, fix="supported: " + ", ".join(CONFIGS))
    return CONFIGS.get(found.family)


# --- single files ----------------------------------------------------------------------------------------


def _open_single(path: Path, file: TensorFile, found: Detected, table: FamilyConfig) -> Checkpoint:
    if scaled := next((key for key in file.shapes if key.endswith(SCALES)), None):
        raise UserError(f"holds weights in eight bits with scales beside them ({scaled}), which are not read",
                        where=path, fix="take the file in fp16, bf16, or in plain fp8")
    rest = dict.fromkeys(file.shapes)
    bare = any(key.startswith(("input_blocks.", "joint_blocks.")) for key in rest)  # a denoiser alone, without prefix
    configs: dict[str, dict[str, Any]] = {}
    sources: dict[str, Source] = {}
    unused: list[str] = []
    for name, part in table.parts.items():
        prefix = "" if bare and name in ("unet", "transformer") else part.prefix
        names = spelled((key for key in rest if key.startswith(prefix)), prefix, part.ldm_spelling)
        if not names:
            continue
        configs[name] = derived(path, name, part, names, file)
        sources[name] = place(path, name, part, configs[name], names, file, ldm=True)
        for key in sources[name].owners():
            del rest[key]
        unused += [key for extra in part.extras(configs[name]) if (key := prefix + extra.ldm) in rest]
    marks, scheduler = ("v_pred", "ztsnr"), _scheduler(path, file, table)
    return Checkpoint(
        path=path, family=table.name, layout="ldm", configs=_sized(configs, scheduler, table), scheduler=scheduler,
        sources=sources, variant=found.variant, metadata=file.metadata, unused=unused,
        tokenizers={name: path.parent / name for name, words in table.tokenizers.items()
                    if not words.clip and words.component in sources and (path.parent / name).is_dir()},
        surplus=[key for key in rest if not key.endswith("position_ids") and key not in (*unused, *marks)])


def _open_vae(path: Path, file: TensorFile, found: Detected, family: str) -> Checkpoint:
    """A VAE alone. One in diffusers' names and without a config.json beside it is taken for the published one."""
    table: FamilyConfig = CONFIGS.get(family or "sd1")
    part = table.parts["vae"]
    ldm = found.layout == "ldm"
    prefix = part.prefix if ldm and any(key.startswith(part.prefix) for key in file.shapes) else ""
    names = spelled((key for key in file.shapes if key.startswith(prefix)), prefix,
                       part.ldm_spelling if ldm else part.spelling)
    beside = path.parent / "config.json"
    if ldm:
        config = derived(path, "vae", part, names, file)
    else:
        config = read_json(beside) if beside.exists() else dict(part.config)
    source = place(path, "vae", part, config, names, file, ldm=ldm)
    return Checkpoint(path=path, family="", layout=found.layout, configs={"vae": config}, scheduler={},
                      sources={"vae": source}, surplus=left_over(source), metadata=file.metadata)


def _sized(configs: dict[str, dict[str, Any]], scheduler: Mapping[str, Any], table: FamilyConfig
           ) -> dict[str, dict[str, Any]]:
    """The configurations, with the size that networks of velocity have in this family."""
    usual = table.parts["unet"].config.get("sample_size") if "unet" in table.parts else None
    if table.velocity_size and scheduler.get("prediction_type") == "v_prediction" and "unet" in configs \
            and configs["unet"].get("sample_size") == usual:
        return {**configs, "unet": {**configs["unet"], "sample_size": table.velocity_size}}
    return configs


def _scheduler(path: Path, file: TensorFile, table: FamilyConfig) -> dict[str, Any]:
    """The family's noise process, and the marks of another one: empty tensors `v_pred` and `ztsnr`, metadata."""
    config = dict(table.scheduler)
    if told := file.metadata.get("modelspec.prediction_type"):
        if told not in PREDICTIONS:
            raise UserError(f"says that its prediction type is {told[:60]!r}, which is not known here", where=path,
                            fix="known: " + ", ".join(PREDICTIONS))
        config["prediction_type"] = PREDICTIONS[told]
    if "v_pred" in file.shapes:
        config["prediction_type"] = "v_prediction"
    if "ztsnr" in file.shapes:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


# --- diffusers folders -----------------------------------------------------------------------------------


def _open_folder(path: Path, weights: bool) -> Checkpoint:
    index = read_json(path / "model_index.json")
    configs = {name: read_json(path / name / "config.json") for name in ("unet", "text_encoder")
               if (path / name / "config.json").exists()}
    family = family_of_folder(index, configs.get("unet", {}), configs.get("text_encoder", {}))
    if not family:
        raise UserError(f"is a folder of {str(index.get('_class_name'))[:60]}, which is not supported", where=path,
                        fix="supported: " + ", ".join(CONFIGS))
    table = _table(path, Detected("checkpoint", family))
    configs, sources, surplus = {}, {}, []
    for name, part in table.parts.items():
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            continue
        if entry[1] not in part.classes:
            raise UserError(f"has a {entry[1]} as its {name}, where a {part.classes[0]} belongs", where=path)
        configs[name], sources[name] = read_component(path / name, name, part, weights)
        surplus += [f"{name}.{key}" for key in left_over(sources[name])]
    scheduler = path / "scheduler" / "scheduler_config.json"
    return Checkpoint(
        path=path, family=table.name, layout="diffusers", configs=configs,
        scheduler=_told(read_json(scheduler)) if scheduler.exists() else dict(table.scheduler), sources=sources,
        surplus=surplus, tokenizers={name: path / name for name in table.tokenizers if (path / name).is_dir()},
        variant=variant_of(configs.get("unet", {}).get("in_channels")))


def _told(scheduler: dict[str, Any]) -> dict[str, Any]:
    """A folder's scheduler; where a discrete one does not say what is predicted, it is the noise, as in diffusers."""
    return scheduler if "Flow" in str(scheduler.get("_class_name")) else {"prediction_type": "epsilon"} | scheduler


def _open_component(path: Path) -> Checkpoint:
    """One component's folder: a VAE. `UserError` for anything else."""
    part = CONFIGS.get("sd1").parts["vae"]
    config = path / "config.json"
    if not config.exists() or read_json(config).get("_class_name") not in part.classes:
        raise UserError("is a folder without model_index.json, not a checkpoint", where=path,
                        fix="give a diffusers folder, or a single file")
    configs, source = read_component(path, "vae", part)
    return Checkpoint(path=path, family="", layout="diffusers", configs={"vae": configs}, scheduler={},
                      sources={"vae": source}, surplus=left_over(source))


def read_component(folder: Path, name: str, part: Part, wanted: bool = True) -> tuple[dict[str, Any], Source]:
    """A component's configuration and its weights, in whatever files; without them unless `wanted`. `UserError`."""
    config = read_json(folder / "config.json")
    if not wanted:
        return config, Source(NoTensors(), {})
    file = component_weights(folder)
    return config, place(folder, name, part, config, spelled(file.shapes, "", part.spelling), file, ldm=False)


def component_weights(folder: Path) -> TensorFile:
    """The tensors in a component's folder, in shards or in one file. Raises `UserError`."""
    weights = next((folder / file for file in WEIGHTS if (folder / file).exists()), None)
    if weights is None:
        others = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".msgpack"))
        raise UserError("has no weights that can be read", where=folder,
                        fix=f"there is {', '.join(others)}; wanted is {WEIGHTS[0]} or model.safetensors" if others
                        else "download the folder again")
    return open_tensors(weights)
