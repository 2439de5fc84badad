"""OneTrainer's files: a config or preset (JSON), and the lists of concepts and samples that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from impasto.core.errors import UserError
from impasto.training.foreign.document import Document, Source, can_be_seen, lines_of, read_document
from impasto.training.foreign.engine import Imported, Subset, flatten
from impasto.training.foreign.onetrainer import FAMILIES_OF, METHODS_OF, RENAMED, TRANSFORMERS
from impasto.training.foreign.onetrainer_rules import translate

#: of the samples, what all previews here have in common
_SHARED = ("negative_prompt", "seed", "diffusion_steps", "cfg_scale", "noise_scheduler", "width", "height")
_OWN = {"training_method", "model_type", "base_model_name"}


class OneTrainer(Source):
    title = "OneTrainer (a config or preset, its concepts and samples)"

    def claims(self, document: Document) -> bool:
        data = document.data
        if isinstance(data, dict):
            return len(_OWN & data.keys()) >= 2 or "__version" in data and bool(_OWN & data.keys())
        return bool(data) and isinstance(data, list) and (_concepts(data) or _samples(data))

    def translate(self, documents: Sequence[Document]) -> Imported:
        configs = [each for each in documents if isinstance(each.data, dict)]
        if len(configs) != 1:
            raise UserError("need one config of OneTrainer's with them, and only one",
                            where=" and ".join(str(each.path) for each in configs or documents))
        config, files = configs[0], [str(each.path) for each in documents]
        settings = current(config.data)
        _refuse(settings, config.path)
        for key, name, fits in (("concepts", "concept_file_name", _concepts),
                                ("samples", "sample_definition_file_name", _samples)):
            given = next((each for each in documents if isinstance(each.data, list) and fits(each.data)), None)
            if not settings.get(key):
                found = given or _beside(settings.get(name), config.path)
                settings.pop(key, None)
                if found is not None and isinstance(found.data, list) and fits(found.data):
                    settings[key] = found.data
                    files = list(dict.fromkeys([*files, str(found.path)]))
        concepts, samples = settings.pop("concepts", None), settings.pop("samples", None)
        own, further = _concepts_of(concepts)
        return translate(dict(flatten(settings)) | own | _preview(samples), files, further)


def _concepts(data: list[Any]) -> bool:
    return all(isinstance(each, dict) and "path" in each for each in data)


def _samples(data: list[Any]) -> bool:
    return all(isinstance(each, dict) and "prompt" in each for each in data)


def current(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config under today's names (`TrainConfig`'s migrations, as far as they rename)."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key == "optimizer" and isinstance(value, str):
            key, value = "optimizer.optimizer", value
        elif key == "min_snr_gamma" and value:
            found |= {"loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": value}
            continue
        elif key.startswith("optimizer_") and key != "optimizer_defaults":
            key = key.replace("_", ".", 1)
        found[RENAMED.get(key, key)] = value
    if found.get("model_type") in TRANSFORMERS:
        found["unet"] = found.pop("transformer", {})
    return found


def _refuse(settings: Mapping[str, Any], where: Path) -> None:
    """`UserError` for what no method or family here is for."""
    method, model = settings.get("training_method", "FINE_TUNE"), settings.get("model_type", "STABLE_DIFFUSION_15")
    if method not in METHODS_OF:
        raise UserError(f"its training_method is {method!r}, for which there is no method here", where=where)
    if model not in FAMILIES_OF:
        raise UserError(f"its model_type is {model!r}, which is no Stable Diffusion", where=where)


def _beside(name: Any, config: Path) -> Document | None:
    """A file that the config names, where it can be seen: from here, or beside it."""
    if not isinstance(name, str) or not name:
        return None
    for path in (Path(name), config.parent / re.split(r"[\\/]", name)[-1]):
        if can_be_seen(path) and path.resolve() != config.resolve():
            return read_document(path)
    return None


def _concepts_of(concepts: Any) -> tuple[dict[str, Any], list[Subset]]:
    """The first concept that trains, flat, and further ones; of those that do not, their folders and kinds."""
    if not isinstance(concepts, list) or not _concepts(concepts):
        return {} if not concepts else {"other_concepts": json.dumps(concepts)[:80]}, []
    active = [(i, each) for i, each in enumerate(concepts) if each.get("enabled", True)]
    trained = [(i, each) for i, each in active if each.get("type", "STANDARD") == "STANDARD"]
    others = [f"{each.get('path')} ({str(each['type']).lower()})" for i, each in active if (i, each) not in trained]
    first = _concept(trained[0][1]) if trained else {}
    further = [Subset(f"concepts.{i}", _concept(each), "concept.") for i, each in trained[1:]]
    return first | ({"other_concepts": others} if others else {}), further


def _concept(concept: Mapping[str, Any]) -> dict[str, Any]:
    """A concept, flat, its one caption out of the file that holds it."""
    found = dict(flatten(concept, "concept."))
    if str(found.get("concept.text.prompt_source", "sample")) == "concept":
        caption = _only_line(str(found.get("concept.text.prompt_path", "")))
        if caption:
            found |= {"concept.text.prompt_path": caption, "concept.text.prompt_source": "sample"}
        else:
            found.pop("concept.text.prompt_path", None)
    else:
        found.pop("concept.text.prompt_path", None)
    return found


def _only_line(name: str) -> str:
    """The caption in a file of captions with a single one, where it can be seen."""
    lines = lines_of(Path(name), 10_000)
    return lines[0] if len(lines) == 1 else ""


def _preview(samples: Any) -> dict[str, Any]:
    """Prompts, and what all samples have in common."""
    if not isinstance(samples, list) or not _samples(samples):
        return {}
    active = [each for each in samples if each.get("enabled", True) and each["prompt"]]
    shared = {f"sample.{key}": active[0][key] for key in _SHARED
              if active and all(each.get(key) == active[0].get(key) for each in active) and key in active[0]}
    return ({"samples": [str(each["prompt"]) for each in active]} if active else {}) | shared
