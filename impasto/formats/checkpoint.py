"""Checkpoints on the disk: single files (LDM) and diffusers folders, under one set of names, read as a stream.

Opening one reads headers alone. What a single file does not say of its networks follows from its tensors'
shapes and, where shapes do not tell (heads, groups of the norms), from the family's published configuration; files
of ours with other settings record them in their metadata, `impasto.config` (JSON by component).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.formats.configs import CONFIGS, FamilyConfig, Part
from impasto.formats.detect import Detected, detect_names, family_of_folder, variant_of
from impasto.formats.ldm import Entry
from impasto.formats.probe import read_json
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

#: `modelspec.prediction_type` -> diffusers' word
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction",
               "v-prediction": "v_prediction"}

#: more tensors than any network of these families has: a configuration that wants them is no real one
MOST_TENSORS = 20_000


@dataclass(frozen=True)
class Source:
    """Where a component's tensors are: `places` is diffusers' name -> key in the file and shape of the tensor."""

    file: TensorFile
    places: dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose tensors are still on the disk, named as in diffusers (a text encoder's with `text_model.`).

    `configs`: each component's configuration in diffusers' or transformers' terms. `scheduler`: the noise process,
    as a diffusers scheduler's configuration. `surplus`: keys that no component takes. `tokenizer`: the folder's own.
    `family` is "" for a VAE alone, which does not tell; `variant`: "inpainting", "instruct-pix2pix" or "".
    """

    path: Path
    family: str
    layout: str
    configs: dict[str, dict[str, Any]]
    scheduler: dict[str, Any]
    sources: dict[str, Source]
    surplus: list[str] = field(default_factory=list)
    tokenizer: Path | None = None
    variant: str = ""
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(self.sources)

    def names(self, component: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each tensor, by name. No tensor is read."""
        source = self.sources[component]
        return {name: (shape, source.file.dtype(key)) for name, (key, shape) in source.places.items()}

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, one at a time, mapped from the file in the file's type; not in the order of `names`."""
        source = self.sources[component]
        names = {key: name for name, (key, _) in source.places.items()}
        for key, tensor in source.file.read(key for key in source.file.shapes if key in names):
            yield names[key], tensor.reshape(source.places[names[key]][1])

    def files(self, component: str) -> list[Path]:
        """The files that hold the component, sorted."""
        source = self.sources[component]
        return source.file.files(key for key, _ in source.places.values())


def open_checkpoint(path: Path | str, *, weights: bool = True) -> Checkpoint:
    """Open a single file (.safetensors, .ckpt) or a diffusers folder; also a VAE alone, in either layout.

    Without `weights` the configurations are all that is wanted, and a folder need hold no more.

    Raises `UserError` in one line: no such file, damaged, not a checkpoint, of a family that is not read,
    tensors missing or of a wrong shape. Surplus tensors are listed, not refused.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, weights) if (path / "model_index.json").exists() else _open_component(path)
    file = open_tensors(path)
    found = detect_names(file.shapes, file.metadata)
    if found.kind == "vae":
        return _open_vae(path, file, found)
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
    rest = dict.fromkeys(file.shapes)
    bare = any(key.startswith("input_blocks.") for key in rest)  # a UNet alone, without prefix
    configs: dict[str, dict[str, Any]] = {}
    sources: dict[str, Source] = {}
    for name, part in table.parts.items():
        prefix = "" if bare and name == "unet" else part.prefix
        spelled = _spelled((key for key in rest if key.startswith(prefix)), prefix, part.ldm_spelling)
        if not spelled:
            continue
        configs[name] = _derived(path, name, part, spelled, file)
        sources[name] = _place(path, name, part, configs[name], spelled, file, ldm=True)
        for key, _ in sources[name].places.values():
            del rest[key]
    return Checkpoint(
        path=path, family=table.name, layout="ldm", configs=configs, scheduler=_scheduler(path, file, table),
        sources=sources, surplus=[key for key in rest if not key.endswith("position_ids")], variant=found.variant,
        metadata=file.metadata)


def _open_vae(path: Path, file: TensorFile, found: Detected) -> Checkpoint:
    """A VAE alone. One in diffusers' names and without a config.json beside it is taken for the published one."""
    table: FamilyConfig = CONFIGS.get("sd1")  # all families read here have this network
    part = table.parts["vae"]
    ldm = found.layout == "ldm"
    prefix = part.prefix if ldm and any(key.startswith(part.prefix) for key in file.shapes) else ""
    spelled = _spelled((key for key in file.shapes if key.startswith(prefix)), prefix,
                       part.ldm_spelling if ldm else part.spelling)
    beside = path.parent / "config.json"
    if ldm:
        config = _derived(path, "vae", part, spelled, file)
    else:
        config = read_json(beside) if beside.exists() else dict(part.config)
    source = _place(path, "vae", part, config, spelled, file, ldm=ldm)
    return Checkpoint(path=path, family="", layout=found.layout, configs={"vae": config}, scheduler={},
                      sources={"vae": source}, surplus=_unused(source), metadata=file.metadata)


def _derived(path: Path, name: str, part: Part, spelled: Mapping[str, str], file: TensorFile) -> dict[str, Any]:
    """A component's configuration: the published one, what shapes tell, what the file records."""
    with _naming(path):
        config = {**part.config, **part.derive({word: file.shapes[key] for word, key in spelled.items()})}
    config.update(_recorded(path, name, part, file.metadata))
    groups = config.get("norm_num_groups", 1)
    if any(width % groups for width in config.get("block_out_channels", ())):
        raise UserError(f"has a {name} whose channels {config['block_out_channels']} are no multiples of {groups}, "
                        "the groups of its norms", where=path,
                        fix="such a file records its settings in the metadata impasto.config; or use a folder")
    return config


def _recorded(path: Path, name: str, part: Part, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file of ours records of the settings that shapes do not tell."""
    try:
        told = json.loads(metadata.get("impasto.config", "{}")).get(name, {})
        kinds = {key: type(part.config[key]) for key in part.untold}
        good = all(type(value) is kinds[key] and (kinds[key] is str or value > 0) for key, value in told.items())
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise UserError(f"has metadata impasto.config that cannot be read for its {name}", where=path,
                        fix="known settings: " + ", ".join(part.untold))
    return told


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
        configs[name], sources[name] = _read_component(path / name, name, part, weights)
        surplus += [f"{name}.{key}" for key in _unused(sources[name])]
    scheduler = path / "scheduler" / "scheduler_config.json"
    tokenizer = path / "tokenizer"
    return Checkpoint(
        path=path, family=table.name, layout="diffusers", configs=configs,
        scheduler=read_json(scheduler) if scheduler.exists() else dict(table.scheduler), sources=sources,
        surplus=surplus, tokenizer=tokenizer if tokenizer.is_dir() else None,
        variant=variant_of(configs.get("unet", {}).get("in_channels")))


def _open_component(path: Path) -> Checkpoint:
    """One component's folder: a VAE. `UserError` for anything else."""
    part = CONFIGS.get("sd1").parts["vae"]
    config = path / "config.json"
    if not config.exists() or read_json(config).get("_class_name") not in part.classes:
        raise UserError("is a folder without model_index.json, not a checkpoint", where=path,
                        fix="give a diffusers folder, or a single file")
    configs, source = _read_component(path, "vae", part)
    return Checkpoint(path=path, family="", layout="diffusers", configs={"vae": configs}, scheduler={},
                      sources={"vae": source}, surplus=_unused(source))


def _read_component(folder: Path, name: str, part: Part, wanted: bool = True) -> tuple[dict[str, Any], Source]:
    config = read_json(folder / "config.json")
    if not wanted:
        return config, Source(NoTensors(), {})
    weights = next((folder / file for file in WEIGHTS if (folder / file).exists()), None)
    if weights is None:
        others = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".msgpack"))
        raise UserError("has no weights that can be read", where=folder,
                        fix=f"there is {', '.join(others)}; wanted is {WEIGHTS[0]} or model.safetensors" if others
                        else "download the folder again")
    file = open_tensors(weights)
    return config, _place(folder, name, part, config, _spelled(file.shapes, "", part.spelling), file, ldm=False)


# --- both ------------------------------------------------------------------------------------------------


def _spelled(keys: Iterable[str], prefix: str, spelling: Callable[[str], str]) -> dict[str, str]:
    """Today's name -> key. Of two keys that come to the same name the first counts; the other is surplus."""
    found: dict[str, str] = {}
    for key in keys:
        found.setdefault(spelling(key.removeprefix(prefix)), key)
    return found


def _place(path: Path, name: str, part: Part, config: Mapping[str, Any], spelled: Mapping[str, str],
           file: TensorFile, *, ldm: bool) -> Source:
    """Find every tensor that the configuration wants. `UserError` for those missing, or of another shape."""
    places: dict[str, tuple[str, tuple[int, ...]]] = {}
    missing: list[str] = []
    wrong: list[str] = []
    for entry in _entries(path, part, config):
        wanted = entry.ldm if ldm else entry.name
        key = spelled.get(wanted)
        if key is None:
            missing.append(wanted)
        elif _squeezed(file.shapes[key]) != _squeezed(entry.shape):
            wrong.append(f"{key} is {file.shapes[key]}, where {entry.shape} belongs")
        else:
            places[entry.name] = (key, entry.shape)
    if missing:
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        total = len(missing) + len(wrong) + len(places)
        raise UserError(f"lacks {len(missing)} of {total} tensors of its {name}: {shown}", where=path,
                        fix="the file is incomplete: download it again")
    if wrong:
        raise UserError(f"has tensors of another shape than its {name} wants: {wrong[0]}", where=path,
                        fix="the file is damaged, or its configuration is another one's")
    return Source(file, places)


def _entries(path: Path, part: Part, config: Mapping[str, Any]) -> list[Entry]:
    entries = []
    with _naming(path):
        for entry in part.entries(config):
            entries.append(entry)
            if not all(isinstance(n, int) for n in entry.shape):
                raise TypeError(f"{entry.name} would be {entry.shape}")
            if len(entries) > MOST_TENSORS:
                raise UserError("describes a network of too many tensors")
    return entries


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors about a network name the file; a configuration that makes no sense is the user's to mend."""
    try:
        yield
    except UserError as error:
        raise UserError(error.what, where=path, fix=error.fix) from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"has a configuration that describes no network ({error})", where=path,
                        fix="download it again") from error


def _unused(source: Source) -> list[str]:
    """The file's keys that the component does not take."""
    taken = {key for key, _ in source.places.values()}
    return [key for key in source.file.shapes if key not in taken and not key.endswith("position_ids")]


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the 1×1 window of a convolution, which a linear layer lacks."""
    return shape[:2] if len(shape) > 2 and set(shape[2:]) == {1} else shape
