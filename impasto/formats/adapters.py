"""Weight adapters on disk: which format a file is in, loading it, saving one and reading it back.

A format is a `Codec`: one file and one line in `CODECS`. Codecs know the names of keys and nothing else; what
they share is here: tensors to and from bytes, factors to and from deltas, the family that a file was made
for, and the checks around every save.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, ClassVar, NamedTuple

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.files import atomic_write
from impasto.core.registry import Registry
from impasto.deltas.adapter import Adapter
from impasto.deltas.delta import Delta
from impasto.deltas.lowrank import LowRank
from impasto.formats import names
from impasto.formats.detect import CONTEXT_WIDTHS, family_told
from impasto.formats.header import Header, dtype_name, header_bytes, read_header, torch_dtype
from impasto.formats.probe import is_pickle

#: a new format is one file and one line; a file is given to the first that claims it
CODECS = Registry("adapter format", {
    "kohya": "impasto.formats.kohya:Kohya",
    "diffusers": "impasto.formats.peft:Diffusers",
    "peft": "impasto.formats.peft:PeftFolder",
    "webui-embedding": "impasto.formats.embeddings:WebuiEmbedding",
    "diffusers-embedding": "impasto.formats.embeddings:DiffusersEmbedding",
    "hypernetwork": "impasto.formats.hypernetwork:HypernetworkFile",
})

#: what may be asked for at a save
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: metadata that tells of one file's bytes or of what an `Adapter` holds itself; written anew at each save
COMPUTED = ("impasto.family", "impasto.base", "impasto.component", "sshs_model_hash", "sshs_legacy_hash",
            "modelspec.hash_sha256", "lora_adapter_metadata", "format")

#: part of an `Adapter` -> what it is called
PARTS = {"deltas": "changes of layers", "embeddings": "new tokens", "hooks": "a hypernetwork"}

#: the beginnings of keys that tell that a file is no weight adapter
OTHERS = {
    "model.diffusion_model.": "a checkpoint", "first_stage_model.": "a checkpoint or VAE",
    "cond_stage_model.": "a checkpoint", "conditioner.": "a checkpoint", "control_model.": "a ControlNet",
}


class Factors(NamedTuple):
    """A low-rank change of one layer's weight: alpha / r · up · down, reshaped to the weight.

    up (out, r), or (out, r, 1, 1) for a convolution; down (r, in) or (r, in, k, k). fp32.
    """

    up: Tensor
    down: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


class Codec(abc.ABC):
    """One format. `claims` looks at names alone; `header` is None where `path` is a folder, or pickled."""

    name: ClassVar[str]
    #: which parts of an `Adapter` it has a place for: deltas, embeddings, hooks
    holds: ClassVar[frozenset[str]] = frozenset({"deltas"})

    @abc.abstractmethod
    def claims(self, path: Path, header: Header | None) -> bool:
        """Whether this format's own loader is the one to read `path`."""

    @abc.abstractmethod
    def load(self, path: Path, header: Header | None) -> Adapter:
        """Raises `UserError` for a key that the format does not know, naming it."""

    @abc.abstractmethod
    def save(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
        """Raises `UserError` for what the format cannot hold, before a byte is written."""


class FileCodec(Codec):
    """A format of one safetensors file."""

    @abc.abstractmethod
    def decode(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: Path
               ) -> dict[str, Factors]:
        """Factors by layer path, of all of a file's tensors."""

    @abc.abstractmethod
    def encode(self, adapter: Adapter, dtype: torch.dtype, metadata: dict[str, str], where: Path
               ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """A file's tensors, as they are to be stored, and its metadata."""

    def load(self, path: Path, header: Header | None) -> Adapter:
        assert header is not None
        return assemble(self.decode(read_tensors(path, header), header.metadata, path), header.metadata)

    def save(self, adapter: Adapter, path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
        tensors, metadata = self.encode(adapter, dtype, metadata, path)
        check_meaning(adapter, self.decode(upcast(tensors), metadata, path), dtype)
        with atomic_write(path) as file:
            write_tensors(file, tensors, metadata)
        read_back(path, tensors, metadata)


def load_adapter(path: Path | str, family: str | None = None) -> Adapter:
    """The adapter in a file or folder of any known format. Its factors are fp32, on the CPU.

    `family`: refuse an adapter that is known to be made for another one. Raises `UserError` in one line: not
    an adapter, truncated, a key that no format knows, a factor of a wrong shape, NaN.
    """
    path = Path(path)
    header = None if path.is_dir() or is_pickle(path) else read_header(path)
    codec = next((c for c in (CODECS.get(name)() for name in CODECS) if c.claims(path, header)), None)
    if codec is None:
        raise _unclaimed(path, header)
    adapter = codec.load(path, header)
    if family and adapter.family and adapter.family != family:
        raise UserError(f"is an adapter for {adapter.family}, and the base is {family}", where=path,
                        fix=f"choose a base of the {adapter.family} family, or another adapter")
    return adapter


def save_adapter(adapter: Adapter, path: Path | str, *, format: str = "kohya",
                 dtype: torch.dtype = torch.float16, metadata: Mapping[str, str] | None = None) -> None:
    """Write `adapter` in `format`, whole or not at all, then read it back and compare.

    `metadata` goes on top of the adapter's own; all values are strings. Nothing is added that differs from
    one save to the next (a date is the caller's to give: `modelspec.date`): equal adapters give equal files.
    Raises `UserError` before anything is written if `format` or `dtype` cannot hold the adapter.
    """
    path = Path(path)
    codec: Codec = CODECS.get(format)()
    if dtype not in DTYPES:
        raise UserError(f"adapters are not stored as {str(dtype).removeprefix('torch.')}", where=path,
                        fix="choose float16, bfloat16 or float32")
    if adapter.empty:
        raise UserError("the adapter changes nothing, there is nothing to save", where=path)
    for part, what in PARTS.items():
        if getattr(adapter, part) and part not in codec.holds:
            raise UserError(f"the adapter holds {what}, for which the format {format} has no place", where=path,
                            fix="save it as auto, which makes a file of each kind of thing")
    merged = {**adapter.metadata, **(metadata or {})}
    for key, value in merged.items():
        if not isinstance(value, str):
            raise UserError(f"metadata {key!r} is not a string", where=path)
    adapter = replace(adapter, deltas=canonical_layers(adapter, path))
    plain = {key: value for key, value in merged.items() if key not in COMPUTED}
    plain["impasto.base"] = json.dumps(adapter.base, sort_keys=True)
    if adapter.family:
        plain["impasto.family"] = adapter.family
    codec.save(adapter, path, dtype, plain)


def canonical_layers(adapter: Adapter, where: object) -> dict[str, tuple[Delta, ...]]:
    """The adapter's deltas under the paths that files spell (a text encoder's with `text_model.`)."""
    layers: dict[str, tuple[Delta, ...]] = {}
    for layer, terms in adapter.deltas.items():
        whole = ".".join(names.split(layer, where=where))
        if whole in layers:
            raise UserError(f"{whole} is there twice, with and without text_model.", where=where)
        layers[whole] = terms
    return layers


# --- between factors and deltas --------------------------------------------------------------------------


def assemble(layers: Mapping[str, Factors], metadata: Mapping[str, str]) -> Adapter:
    """An `Adapter` out of a file's factors and metadata."""
    deltas: dict[str, tuple[Delta, ...]] = {
        layer: (LowRank.from_factors(f.up, f.down, alpha=f.alpha),) for layer, f in layers.items()}
    try:
        base = json.loads(metadata.get("impasto.base", "{}"))
    except ValueError:
        base = {}
    if not (isinstance(base, dict) and all(isinstance(v, str) for v in base.values())):
        base = {}
    kept = {key: value for key, value in metadata.items() if key not in COMPUTED}
    return Adapter(deltas=deltas, metadata=kept, family=family_of(layers, metadata), base=base)


def factors_of(layer: str, terms: tuple[Delta, ...], format: str, where: object) -> Factors:
    """One pair of factors for the sum of a layer's deltas: the terms' own, side by side along the rank.

    The scale of rank-stabilised LoRA, alpha / √r (Kalajdzievski 2023, arXiv:2312.03732), becomes a plain
    alpha. `UserError` for a delta that has no such factors.
    """
    parts = []
    for term in terms:
        if not isinstance(term, LowRank):
            raise UserError(f"{layer} holds a {term.kind} delta, which a {format} file of LoRA cannot hold",
                            where=where)
        up, down = term.up.detach().float().cpu(), term.down.detach().float().cpu()
        if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
            raise UserError(f"{layer} holds NaN or infinity", where=where, fix="the training has diverged")
        parts.append((up, down, term.scale))
    scales = {scale for _, _, scale in parts}
    if len(scales) == 1:
        (scale,) = scales
        ups = [up for up, _, _ in parts]
    else:  # differing scales have no common alpha
        scale = 1.0
        ups = [up * s for up, _, s in parts]
    up = ups[0] if len(ups) == 1 else torch.cat(ups, 1)
    down = parts[0][1] if len(ups) == 1 else torch.cat([d for _, d, _ in parts], 0)
    if scale == 0:  # some programs take alpha = 0 for "no alpha", that is, for full strength
        up, scale = torch.zeros_like(up), 1.0
    return Factors(up, down, scale * down.shape[0])


def pair(layer: str, up: Tensor | None, down: Tensor | None, alpha: Tensor | None, where: object) -> Factors:
    """Checked factors out of a file's tensors. Without `alpha` the scale is 1 (alpha = rank)."""
    if up is None or down is None:
        raise UserError(f"{layer} lacks its {'up' if up is None else 'down'} factor", where=where)
    if down.ndim == 4 and up.ndim == 2:
        up = up[:, :, None, None]
    if up.ndim == 4 and down.ndim == 2:
        down = down[:, :, None, None]
    fits = up.ndim == down.ndim and up.ndim in (2, 3, 4, 5) and up.shape[1] == down.shape[0]
    if not fits or any(k != 1 for k in up.shape[2:]) or 0 in (*up.shape, *down.shape):
        raise UserError(f"{layer} has factors that do not fit together: {tuple(up.shape)} and "
                        f"{tuple(down.shape)}", where=where)
    if alpha is None:
        return Factors(up, down, float(down.shape[0]))
    if alpha.numel() != 1:
        raise UserError(f"{layer} has an alpha of shape {tuple(alpha.shape)}, not a single number",
                        where=where)
    return Factors(up, down, float(alpha))


def stored(layer: str, tensor: Tensor, dtype: torch.dtype, where: object) -> Tensor:
    """`tensor` in the file's type. `UserError` where a value is too large for it."""
    cast = tensor.to(dtype).contiguous()
    if not torch.isfinite(cast).all():
        short = dtype_name(dtype)
        raise UserError(f"{layer} holds values up to {tensor.abs().max():.3g}, too large for {short}",
                        where=where, fix="save as bfloat16 or float32")
    return cast


def family_of(layers: Mapping[str, Factors], metadata: Mapping[str, str]) -> str:
    """The family an adapter was made for, by its metadata, then by its shapes; "" if nothing tells."""
    if told := family_told(metadata):
        return told
    for layer, factors in layers.items():
        if layer.startswith("unet.") and layer.endswith(("attn2.to_k", "attn2.to_v")):
            return CONTEXT_WIDTHS.get(factors.down.shape[1], "")
    return ""


# --- between tensors and bytes ---------------------------------------------------------------------------


def read_tensors(path: Path, header: Header) -> dict[str, Tensor]:
    """All tensors of a file as fp32. `UserError` where one holds NaN or infinity."""
    tensors = {}
    with open(path, "rb") as file:
        for name, info in header.tensors.items():
            dtype = torch_dtype(info.dtype, where=path)
            file.seek(header.start + info.offsets[0])
            raw = bytearray(file.read(info.offsets[1] - info.offsets[0]))
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            tensors[name] = flat.reshape(info.shape).float()
            if not torch.isfinite(tensors[name]).all():
                raise UserError(f"tensor {name!r} holds NaN or infinity", where=path,
                                fix="the training that made it has diverged; there is nothing to mend in it")
    return tensors


def write_tensors(file: IO[bytes], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A whole safetensors file. Equal content gives equal bytes."""
    head, order = header_bytes(layout(tensors), metadata)
    file.write(head)
    for name in order:
        file.write(tensor_bytes(tensors[name]))


def layout(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What `header_bytes` wants to know of tensors."""
    return {name: (dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()}


def tensor_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def upcast(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items()}


# --- checks of a save ------------------------------------------------------------------------------------


def check_meaning(adapter: Adapter, layers: Mapping[str, Factors], dtype: torch.dtype) -> None:
    """What is about to be written means what `adapter` means, to the rounding of `dtype`.

    Each layer is tried on one vector x, and the difference held against what rounding each factor once can
    make of it, elementwise: scale · 2ε · |up|·|down|·|x|, and the smallest numbers of `dtype` beside that.
    """
    assert set(layers) == set(adapter.deltas), set(layers) ^ set(adapter.deltas)
    info = torch.finfo(dtype)
    for layer, terms in adapter.deltas.items():
        saved = layers[layer]
        x = torch.cos(torch.arange(saved.down[0].numel(), dtype=torch.float64))
        gap = saved.alpha / saved.rank * (saved.up.flatten(1).double() @ (saved.down.flatten(1).double() @ x))
        bound = torch.full_like(gap, 1e-30)
        for term in terms:
            assert isinstance(term, LowRank)
            # a codec may move the scale into the factors, and they nearer to the smallest numbers
            least = info.tiny * info.eps / min(1.0, abs(term.scale) or 1.0)
            up, down = (t.detach().cpu().flatten(1).double() for t in (term.up, term.down))
            gap -= term.scale * (up @ (down @ x))
            spread = down.abs() @ x.abs()
            rounding = 2.1 * info.eps * (up.abs() @ spread)
            bound += abs(term.scale) * (rounding + least * (spread.sum() + up.abs().sum(1) * x.abs().sum()))
        assert (gap.abs() <= bound).all(), f"{layer} would be saved wrong, by {gap.abs().max():.3g}"


def read_back(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Compare what is on the disk with what was meant to be there, byte for byte."""
    header = read_header(path)
    with open(path, "rb") as file:
        same = header.metadata == metadata and set(header.tensors) == set(tensors)
        for name, tensor in tensors.items() if same else ():
            info = header.tensors[name]
            file.seek(header.start + info.offsets[0])
            same = same and file.read(info.offsets[1] - info.offsets[0]) == tensor_bytes(tensor)
    if not same:
        raise UserError("reads back otherwise than it was written", where=path,
                        fix="the disk or its cache is failing; save to another one")


def _unclaimed(path: Path, header: Header | None) -> UserError:
    """The line for a file that no format knows."""
    if header is None and path.is_file():
        read_header(path)  # says what is wrong with it
    if header is None:
        return UserError("is a folder without an adapter in it", where=path,
                         fix="a peft folder holds adapter_config.json and adapter_model.safetensors")
    if not header.tensors:
        return UserError("holds no tensors", where=path)
    for key in header.tensors:
        for beginning, what in OTHERS.items():
            if key.startswith(beginning):
                return UserError(f"is {what}, not a weight adapter (key {key!r})", where=path)
    return UserError(f"no adapter format knows the key {next(iter(header.tensors))!r}", where=path)
