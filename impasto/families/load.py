"""A base from wherever it is: a single file, a diffusers folder, or the hub's cache; its family tells itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from impasto.core.errors import UserError
from impasto.core.files import no_such_file
from impasto.core.progress import SILENT, Reporter
from impasto.families import FAMILIES
from impasto.families.base import Base
from impasto.families.merged import merge_into
from impasto.families.quantised import check_device
from impasto.formats.checkpoint import Checkpoint, open_checkpoint
from impasto.formats.configs import CONFIGS
from impasto.formats.text_files import open_text_encoders
from impasto.mini import BASE, check_weights

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

#: what of a repository is fetched: a diffusers folder in its main variant
_WANTED = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]
_UNWANTED = ["*.fp16.safetensors", "*.non_ema.safetensors", "safety_checker/*", "feature_extractor/*"]


def load_base(path: str | Path, *, family: str | None = None, vae: str | Path | None = None,
              device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, download: bool = False,
              report: Reporter = SILENT, clip_skip: int = 0, init_seed: int | None = None,
              adapters: Sequence[str] = (), prediction: str | None = None,
              text_encoders: Sequence[str | Path] = (), options: Mapping[str, Any] | None = None,
              quantize: str = "none", quantize_text: str = "none") -> Base:
    """The base at `path`: a checkpoint file, a diffusers folder, a hub id ("owner/name") in the local cache,
    or "mini", the embedded one.

    `family`: an error unless the checkpoint is of it. `vae`: another VAE's file or folder. `dtype`: of the
    weights (the VAE's are fp32 always). `download`: fetch a hub id that is not in the cache. Tensors that no
    component takes are noted and kept in `surplus`. With an `init_seed` the path gives the networks' shapes alone
    and the weights are random, as their libraries begin with them. `adapters`, each a file or "FILE:strength", are
    merged into the weights in memory. `prediction`: what the network predicts, "epsilon" or "v_prediction",
    whatever the checkpoint says, or where it does not say. `text_encoders`: files of such alone, in any order, for a
    base without them or in place of its own. `options`: settings of the family's own (`Base.own_options`). `quantize`:
    how the denoiser's weights are held, "none" as they are, or in few bits (`codes.CODES`), `quantize_text` those of
    the text encoders: nothing can then be merged into them. Raises `UserError`.
    """
    if family is not None:
        FAMILIES.get(family)  # a name that is not known is an error, with the nearest one
    if str(path) == "mini" and init_seed is None:
        check_weights()
    main = open_checkpoint(locate(path, download=download), weights=init_seed is None).predicting(prediction)
    if not main.family:
        raise UserError("is a VAE alone, not a base", where=path, fix="give it as vae beside a base")
    if family is not None and main.family != family:
        raise UserError(f"is a checkpoint of {main.family}, not {family}", where=path,
                        fix=f"family = {main.family!r}, or leave it out")
    if main.family not in FAMILIES:
        raise UserError(f"is a checkpoint of {main.family}, which is not supported", where=path,
                        fix="supported: " + ", ".join(FAMILIES))
    sources = dict.fromkeys(main.components, main)
    if vae is not None:
        sources["vae"] = open_vae(locate(vae, download=download), main.family)
    if text_encoders:
        files = [locate(file, download=download) for file in text_encoders]
        sources |= open_text_encoders(files, main.family, main.path if main.path.is_dir() else main.path.parent)
    kind: type[Base] = FAMILIES.get(main.family)
    held = {kind.denoiser_name: quantize, **dict.fromkeys(kind.text_encoder_names, quantize_text)}
    held = {name: code for name, code in held.items() if code != "none"}
    for code in held.values():
        check_device(code, device)
    base = kind.from_checkpoints(sources, device=device, dtype=dtype, clip_skip=clip_skip, report=report,
                                 init_seed=init_seed, options=options or {}, quantised=held)
    if base.surplus:
        shown = ", ".join(base.surplus[:3]) + (", …" if len(base.surplus) > 3 else "")
        plural = "s" if len(base.surplus) > 1 else ""
        report.note(f"{len(base.surplus)} surplus tensor{plural} in {Path(path).name}, kept but not used: {shown}")
    merge_into(base, adapters, report)
    return base


def open_vae(path: Path, family: str) -> Checkpoint:
    """Another VAE for a family's base. Raises `UserError` for what is none, or one of another family."""
    checkpoint = open_checkpoint(path, family=family)
    if "vae" not in checkpoint.components:
        raise UserError("holds no VAE", where=path)
    scales = {name: CONFIGS.get(name).parts["vae"].config["scaling_factor"] for name in FAMILIES}
    own = checkpoint.configs["vae"].get("scaling_factor")
    if own != scales[family] and own in scales.values():
        others = " and ".join(name for name, scale in scales.items() if scale == own)
        raise UserError(f"is a VAE of {others}, whose latents are others than those of {family}", where=path,
                        fix=f"take a VAE of {family}")
    return checkpoint


def is_hub_id(name: str) -> bool:
    """Whether `owner/name` names something on the hub: it can, and no such path is here."""
    return bool(_HUB_ID.fullmatch(name)) and Path(name).suffix not in (".safetensors", ".ckpt", ".pt") and \
        not Path(name).exists()


def locate(path: str | Path, *, download: bool = False) -> Path:
    """The file or folder that `path` names: "mini" is the embedded base ("./mini" a folder of that name), and a hub
    id its snapshot in the local cache. Raises `UserError`."""
    name = str(path)
    if name == "mini":
        return BASE
    if Path(path).exists():
        return Path(path)
    if not is_hub_id(name):
        raise no_such_file(path, "file or folder")
    try:
        return Path(huggingface_hub.snapshot_download(
            name, local_files_only=not download, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except LocalEntryNotFoundError:
        if download:
            raise UserError("the hub cannot be reached, and it is not in its local cache", where=name,
                            fix="check the connection") from None
        raise UserError("is no file or folder here, nor in the hub's local cache", where=name,
                        fix="let it be fetched (base.download=true, or --download)") from None
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"cannot be fetched from the hub ({str(error).splitlines()[0]})", where=name,
                        fix="check the name, your access and the connection") from error
