"""Text encoders in files of their own, as Stable Diffusion 3's are published: clip_l, clip_g and t5xxl."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from impasto.core.errors import UserError
from impasto.core.files import no_such_file
from impasto.formats.checkpoint import Checkpoint, component_weights, read_component
from impasto.formats.configs import CONFIGS, FamilyConfig, Part
from impasto.formats.placing import derived, place, spelled
from impasto.formats.tensor_files import TensorFile, open_tensors

#: a tensor that shows whose file it is
MARKS = {"clip": ("text_model.final_layer_norm.weight", "final_layer_norm.weight", "ln_final.weight"),
         "t5": ("encoder.block.0.layer.0.SelfAttention.q.weight",)}


def open_text_encoders(paths: Iterable[Path], family: str, beside: Path) -> dict[str, Checkpoint]:
    """By component: the text encoders of a family, each alone in a file (or a component's folder), in any order.

    CLIPs are told by their widths. A tokenizer that no program ships is looked for in a folder of its usual name
    beside the file, then in `beside`. Raises `UserError` in one line for what is none, or none of this family.
    """
    table: FamilyConfig = CONFIGS.get(family)
    opened = [(path, _tensors(path)) for path in paths]
    found: dict[str, Checkpoint] = {}
    clips: list[tuple[int, Path, TensorFile]] = []
    for path, file in opened:
        if any(mark in file.shapes for mark in MARKS["t5"]):
            _take(found, _named(table, "T5", path)[0], path, file, table, beside)
        elif any(mark in file.shapes for mark in MARKS["clip"]):
            width = next(shape[-1] for name, shape in file.shapes.items() if name.endswith("token_embedding.weight"))
            clips.append((width, path, file))
        else:
            raise UserError("is no text encoder", where=path, fix="give CLIPs and T5, each in its file")
    for (width, path, file), name in zip(sorted(clips, key=lambda one: one[0]), _matched(table, clips), strict=True):
        if not name:
            raise UserError(f"is a text encoder of {width} channels, which {family} has none of", where=path)
        _take(found, name, path, file, table, beside)
    return found


def _named(table: FamilyConfig, word: str, path: Path) -> list[str]:
    names = [name for name, part in table.parts.items() if word in part.classes[0]]
    if not names:
        raise UserError(f"is a {word} text encoder, which {table.name} has none of", where=path)
    return sorted(names, key=lambda name: table.parts[name].config.get("hidden_size", 0))


def _matched(table: FamilyConfig, clips: list[tuple[int, Path, TensorFile]]) -> list[str]:
    """The component of each CLIP, from the narrowest: by its published width; or, where all are given, by order."""
    if not clips:
        return []
    names = _named(table, "CLIP", clips[0][1])
    if len(names) == len(clips):
        return names
    widths = {table.parts[name].config["hidden_size"]: name for name in names}
    return [widths.get(width, "") for width, _, _ in sorted(clips, key=lambda one: one[0])]


def _take(found: dict[str, Checkpoint], name: str, path: Path, file: TensorFile, table: FamilyConfig, beside: Path
          ) -> None:
    if name in found:
        raise UserError(f"is a second {name} beside {found[name].path}", where=path, fix="give each once")
    part: Part = table.parts[name]
    config: dict[str, Any]
    if told := (path / "config.json").is_file():  # a folder's own, which says what shapes do not
        config, source = read_component(path, name, part)
    else:
        names = spelled(file.shapes, "", part.ldm_spelling)
        config = derived(path, name, part, names, file)
        source = place(path, name, part, config, names, file, ldm=True)
    tokenizers = {folder: where / folder for folder, words in table.tokenizers.items() if words.component == name
                  for where in (beside, path.parent) if (where / folder).is_dir()}
    found[name] = Checkpoint(path=path, family="", layout="diffusers" if told else "ldm", configs={name: config},
                             scheduler={}, sources={name: source}, tokenizers=tokenizers)


def _tensors(path: Path) -> TensorFile:
    """Those of the file itself, or of a component's folder."""
    if not path.exists():
        raise no_such_file(path)
    return component_weights(path) if path.is_dir() else open_tensors(path)
