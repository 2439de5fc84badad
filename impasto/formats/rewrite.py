"""A checkpoint written anew as a stream: each tensor is read, changed if it is to be, and written, once.

The header is computed first, from names and shapes; memory holds one tensor at a time, and what of the files the
system keeps mapped.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.core.files import atomic_folder, atomic_write, require_space
from impasto.core.progress import SILENT, Advance, Reporter
from impasto.formats.checkpoint import Checkpoint
from impasto.formats.header import dtype_name, header_bytes
from impasto.formats.source import Place, turned
from impasto.formats.tensor_files import Shards, TensorFile

#: of a tensor's component and name in diffusers' terms, and of itself, as the file has it: what takes its place, of as
#: many numbers, or None where it stays
Change = Callable[[str, str, Tensor], Tensor | None]


class Owner(NamedTuple):
    """A tensor in a file's one."""

    component: str
    name: str
    place: Place


@dataclass(frozen=True)
class Plan:
    """One file to be: for each of its keys the tensors in it (none: it is no component's), its shape and type there, in
    the order in which they are best read."""

    file: TensorFile
    keys: dict[str, tuple[tuple[Owner, ...], tuple[int, ...], torch.dtype]]

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in self.keys.values())

    def header(self, metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
        """The new file's header, and the order in which its tensors follow."""
        return header_bytes({key: (dtype_name(dtype), shape) for key, (_, shape, dtype) in self.keys.items()}, metadata)


def rewrite(checkpoint: Checkpoint, out: Path, change: Change, *, dtype: torch.dtype | None = None,
            metadata: Mapping[str, str] | None = None, replace: bool = False, report: Reporter = SILENT) -> list[str]:
    """Write the checkpoint to `out` in its own layout, all of it or nothing, with `change` made on the way.

    Tensors keep their types, or floating-point ones take `dtype`; what is changed is cast once. Keys that no component
    claims are carried along. `metadata` goes on top of a single file's own. Pickles become safetensors. `replace`: a
    folder that is there gives way. What of a folder is left out, other weights than the ones that are read, is given
    back by name. Raises `UserError`: no room, a value too large for its type.
    """
    if checkpoint.path.is_dir():
        plans = {name: planned(checkpoint, [name], dtype, own=True) for name in checkpoint.components}
        require_space(out, sum(plan.bytes for plan in plans.values()), "the folder")
        with report.phase("writing", sum(plan.bytes for plan in plans.values()), "bytes") as advance, \
                atomic_folder(out, replace=replace) as folder:
            left = copy_rest(checkpoint, folder)
            for name, plan in plans.items():
                stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
                home = folder / home_of(checkpoint, name)
                home.mkdir(exist_ok=True)
                with open(home / f"{stem}.safetensors", "wb") as file:
                    write_plan(file, plan, change, {"format": "pt"}, advance, out)
        return left
    plan = planned(checkpoint, checkpoint.components, dtype)
    require_space(out, plan.bytes, "the file")
    told = {key: value for key, value in {**checkpoint.metadata, **(metadata or {})}.items()
            if not key.startswith(("sshs_", "modelspec.hash"))}  # they are of other bytes
    with report.phase("writing", plan.bytes, "bytes") as advance, atomic_write(out) as file:
        write_plan(file, plan, change, told, advance, out)
    return []


def planned(checkpoint: Checkpoint, components: tuple[str, ...] | list[str], dtype: torch.dtype | None,
            own: bool = False) -> Plan:
    """What the file of these components holds: all of the file that they share, or with `own` their own alone."""
    owners = {key: tuple(Owner(component, name, source.places[name]) for name in names) for component in components
              for source in [checkpoint.sources[component]] for key, names in source.owners().items()}
    file = checkpoint.sources[components[0]].file
    keys = {key: (owners.get(key, ()), shape, kept(file.dtype(key), dtype)) for key, shape in file.shapes.items()
            if key in owners or not own}
    return Plan(file, keys)


def kept(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """A tensor's type in the new file."""
    return wanted if wanted is not None and own.is_floating_point else own


def write_plan(file: IO[bytes], plan: Plan, change: Change, metadata: Mapping[str, str], advance: Advance,
               where: Path) -> None:
    """Header, then each tensor."""
    head, order = plan.header(metadata)
    file.write(head)
    for key, tensor in ordered(plan.file, order):
        owners, shape, dtype = plan.keys[key]
        file.write(raw(finished(key, tensor, owners, change, dtype, where)))
        advance(math.prod(shape) * dtype.itemsize)


def finished(key: str, tensor: Tensor, owners: tuple[Owner, ...], change: Change, dtype: torch.dtype, where: Path
             ) -> Tensor:
    """A tensor as it is to be stored, all that it holds changed."""
    parts = [place.out_of(tensor) for _, _, place in owners]
    changed = [change(component, name, part) for (component, name, _), part in zip(owners, parts, strict=True)]
    if all(part is None for part in changed):
        return cast(key, tensor, tensor, dtype, where)
    wide = next(new.dtype for new in changed if new is not None)
    laid = []
    for owner, part, new in zip(owners, parts, changed, strict=True):
        assert new is None or new.numel() == part.numel(), (key, new.shape, part.shape)
        laid.append((part.to(wide) if new is None else new.reshape(part.shape), owner.place.how))
    return cast(key, together(laid), tensor, dtype, where)


def together(parts: Sequence[tuple[Tensor, str]]) -> Tensor:
    """The file's tensor that holds these, each with the way in which it lies there (`Entry`), in their order."""
    laid = [turned(part, how) for part, how in parts]
    return laid[0] if len(laid) == 1 else torch.cat(laid)


def cast(key: str, tensor: Tensor, origin: Tensor, dtype: torch.dtype, where: Path) -> Tensor:
    """The tensor in a type. `UserError` where a value is too large for it that was none in `origin`."""
    if tensor.dtype == dtype:
        return tensor
    stored = tensor.to(dtype)
    if not finite(stored) and finite(origin):
        what = "values too large for" if finite(tensor) else "no numbers, in"
        raise UserError(f"{key} would hold {what} {dtype_name(dtype)}", where=where,
                        fix="ask for float32 or bfloat16 (--dtype), or for less strength")
    return stored


def finite(tensor: Tensor) -> bool:
    """Whether all numbers are; of types of 8 bits too, which torch does not ask."""
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return bool(torch.isfinite(wide).all())


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy where it lies in one piece."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


#: endings of files that hold weights
HEAVY = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data", ".gguf")


def home_of(checkpoint: Checkpoint, component: str) -> str:
    """A component's folder inside the checkpoint's; "." where that is the component's own (a VAE alone)."""
    return component if (checkpoint.path / "model_index.json").is_file() else "."


def copy_rest(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy what lies in a diffusers folder beside the weights of its components; names of the weights that are left
    out, since nothing has read them: other variants, copies in one file at the top."""
    homes = {(checkpoint.path / home_of(checkpoint, name)).resolve() for name in checkpoint.components}
    top, used = checkpoint.path.resolve(), {file.resolve() for name in checkpoint.components
                                            for file in checkpoint.files(name)}
    left: list[str] = []

    def ignored(place: str, names: list[str]) -> list[str]:
        here = Path(place).resolve()
        if here != top and here not in homes:
            return []  # a safety checker's, say
        out = []
        for name in names:
            heavy = name.endswith(HEAVY) or ".index" in name and name.endswith(".json")
            if name.startswith(".") or heavy:
                out.append(name)
            if heavy and (here / name).resolve() not in used and not name.endswith(".json"):
                left.append((here / name).relative_to(top).as_posix())
        return out

    shutil.copytree(checkpoint.path, folder, ignore=ignored, dirs_exist_ok=True, ignore_dangling_symlinks=True)
    return sorted(left)


def in_order(checkpoint: Checkpoint, component: str, dtype: torch.dtype | None = None) -> list[str]:
    """A component's tensors in the order in which `rewrite` comes to them."""
    folder = checkpoint.path.is_dir()
    plan = planned(checkpoint, [component] if folder else checkpoint.components, dtype, own=folder)
    return [owner.name for key in plan.header({})[1] for owner in plan.keys[key][0] if owner.component == component]


def lockstep(checkpoint: Checkpoint, component: str, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a component in the order of `names`, each as it is asked for."""
    source = checkpoint.sources[component]
    read = ordered(source.file, [key for name in names if (key := source.places[name].key)])
    for name in names:
        place = source.places[name]
        yield name, place.out_of(next(read)[1]) if place.key else source.identity(name)


def ordered(file: TensorFile, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors in the order of `keys`: of shards too, whose own order is shard by shard."""
    if not isinstance(file, Shards):
        yield from file.read(keys)
        return
    for key in keys:
        yield from file.read([key])
