"""What goes up when an artifact is shared: its files, pictures of what it does, and a card that tells of it."""

from __future__ import annotations

import io
import json
import re
import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from impasto.core.errors import UserError
from impasto.core.files import atomic_folder
from impasto.families.picture_info import open_picture, picture_texts
from impasto.formats.adapters import load_adapter
from impasto.formats.arrangement import arranged
from impasto.formats.detect import Detected, detect
from impasto.training.reproduce import Told, read_told

#: pictures that go up at most
PICTURES = 8

#: what a model is called by those who share it: kinds of `detect` that can be pushed
SHARED = ("adapter", "checkpoint", "embedding", "hypernetwork")

_PREVIEW = re.compile(r"(\d{6,})-(\d+)\.png")


@dataclass(frozen=True)
class Sample:
    """A sample picture: its place in the repository, and the prompt, which may be unknown."""

    place: str
    prompt: str


@dataclass(frozen=True)
class Parcel:
    """All that goes up but the card. `files`: place in the repository -> file here, or its bytes."""

    artifact: Path
    detected: Detected
    told: Told | None  # None: the artifact keeps to itself how it was made
    files: dict[str, Path | bytes]
    samples: tuple[Sample, ...]
    tokens: tuple[Path, ...] = ()  # of a bundle of tokens the files that have one each, as far as they lie beside it
    hypernetworks: tuple[Path, ...] = ()  # that were trained beside it

    def with_card(self, card: str) -> dict[str, Path | bytes]:
        """Everything, with the card as README.md."""
        return {"README.md": card.encode(), **self.files}

    @property
    def weights(self) -> str:
        """The file name of an adapter, or the folder's own."""
        return self.artifact.name


def pack(source: Path) -> Parcel:
    """The parcel of a run's directory, a file or a folder. Raises `UserError`."""
    artifact = run_artifact(source) if (source / "recipe.toml").is_file() else source
    detected = detect(artifact)
    if detected.kind == "unknown" and any(artifact.glob("*/adapter_config.json")):  # peft's, a folder a component
        detected = Detected("adapter", layout="peft")
    if detected.kind not in SHARED:
        raise UserError(f"is {detected.title}", where=artifact, fix="push an adapter, a diffusers folder or a run")
    try:
        told = read_told(artifact)
    except UserError:
        told = None
    files: dict[str, Path | bytes] = {}
    tokens, hypernetworks = _tokens(artifact, detected), _hypernetworks(artifact)
    if artifact.is_dir():
        for file in sorted(artifact.rglob("*")):
            place = file.relative_to(artifact)
            if file.is_file() and place.name != "README.md" and not any(p.startswith(".") for p in place.parts):
                files[place.as_posix()] = file
    else:
        files |= {file.name: file for file in (artifact, *tokens, *hypernetworks)}
    samples = []
    for number, file in enumerate(previews(artifact, told)):
        place = f"samples/{number}.png"
        prompt, files[place] = _picture(file, silent=told is None)
        samples.append(Sample(place, prompt))
    return Parcel(artifact, detected, told, files, tuple(samples), tokens, hypernetworks)


def _tokens(artifact: Path, detected: Detected) -> tuple[Path, ...]:
    """Of several tokens in one file the files that have one each, as far as they lie there."""
    if detected.kind != "embedding":
        return ()
    return tuple(part.path for part in arranged(load_adapter(artifact), artifact)[1:] if part.path.is_file())


def _hypernetworks(artifact: Path) -> tuple[Path, ...]:
    """The hypernetworks that `arranged` calls after an adapter's file, as far as they lie there."""
    if artifact.is_dir():
        return ()
    called = re.compile(rf"{re.escape(artifact.stem)}-hypernetwork(?:-\d+)?\.pt")
    found = (path for path in artifact.absolute().parent.iterdir() if called.fullmatch(path.name))
    return tuple(sorted(path for path in found if detect(path).kind == "hypernetwork"))


def run_artifact(folder: Path) -> Path:
    """What the run in a directory has left. Raises `UserError` while it is not finished, naming what there is."""
    try:
        output: dict[str, Any] = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8")).get("output", {})
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read ({error})", where=folder / "recipe.toml") from None
    name = output.get("name") or folder.absolute().name
    for path in (folder / f"{name}.safetensors", folder / f"{name}.pt", folder / name):
        if path.exists():
            return path
    earlier = sorted(folder.glob(f"{name}-[0-9]*"))
    raise UserError("holds a run that is not finished", where=folder,
                    fix=f"name the file to push: {earlier[-1]}" if earlier else "let impasto train finish it")


def previews(artifact: Path, told: Told | None) -> list[Path]:
    """The previews of an artifact in a run's directory: of its own step, or of the last one before."""
    numbered = re.search(r"-(\d{6,})$", artifact.name.removesuffix(".safetensors").removesuffix(".pt"))
    last = told.step if told else int(numbered[1]) if numbered else None
    found: dict[int, list[tuple[int, Path]]] = {}
    for path in (artifact.absolute().parent / "previews").glob("*.png"):
        if match := _PREVIEW.fullmatch(path.name):
            found.setdefault(int(match[1]), []).append((int(match[2]), path))
    steps = [step for step in found if step and (last is None or step <= last)]
    return [path for _, path in sorted(found[max(steps)])][:PICTURES] if steps else []


def _picture(path: Path, *, silent: bool) -> tuple[str, Path | bytes]:
    """A preview's prompt and its file; `silent`: no prompt, and a file without its texts."""
    picture = open_picture(path)
    if silent:
        bare = io.BytesIO()
        picture.info.clear()
        picture.save(bare, format="PNG")
        return "", bare.getvalue()
    try:
        prompt = json.loads(picture_texts(picture)["impasto"])["prompt"]
    except (KeyError, ValueError, TypeError):
        prompt = ""
    return str(prompt), path


def write_folder(files: dict[str, Path | bytes], folder: Path) -> None:
    """The parcel as a folder here, whole or not at all. Raises `UserError`."""
    if folder.exists():
        raise UserError("is there already", where=folder, fix="remove it, or choose another place with -o")
    with atomic_folder(folder) as part:
        for place, content in files.items():
            (part / place).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                (part / place).write_bytes(content)
            else:
                shutil.copyfile(content, part / place)


def size_of(content: Path | bytes) -> int:
    """Bytes of one part of a parcel."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size
