"""kohya's files: `--config_file` and `--dataset_config` (TOML or JSON), and the command that names them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from impasto.core.errors import UserError
from impasto.training.foreign.document import Document, Source, can_be_seen, read_document
from impasto.training.foreign.engine import Imported, Subset
from impasto.training.foreign.kohya import OTHER_SCRIPTS, ROWS, SCRIPTS
from impasto.training.foreign.kohya_command import Command, read_command
from impasto.training.foreign.kohya_pictures import shared_by_sets
from impasto.training.foreign.kohya_rules import translate

#: keys that only kohya's scripts have, one of which no config is without
_OWN = {"pretrained_model_name_or_path", "train_data_dir", "dataset_config", "network_module", "network_dim",
        "train_batch_size", "max_train_steps", "max_train_epochs", "optimizer_type", "output_name", "mixed_precision"}
#: keys of a dataset config that are called otherwise on the command line
_CALLED = {"batch_size": "train_batch_size"}
_COMMAND = re.compile("|".join([r"--(?:pretrained_model_name_or_path|config_file|dataset_config|train_data_dir)\b",
                                *map(re.escape, (*SCRIPTS, *OTHER_SCRIPTS))]))


class Kohya(Source):
    title = "kohya's sd-scripts (a config, a dataset config or a command line)"

    def claims(self, document: Document) -> bool:
        if isinstance(document.data, dict):
            keys = flat(document.data).keys()
            return "datasets" in document.data or bool(_OWN & keys) and len(ROWS.keys() & keys) >= 2
        return document.data is None and bool(_COMMAND.search(document.text))

    def translate(self, documents: Sequence[Document]) -> Imported:
        command, configs, datasets = Command(), [], []
        for document in documents:
            if document.data is None:
                command = read_command(document.text, document.path)
            else:
                (datasets if "datasets" in document.data else configs).append(document)
        configs += _named(command.arguments.get("config_file"), documents, ".toml")
        settings = {key: value for config in configs for key, value in flat(config.data).items()} | command.arguments
        datasets += _named(settings.get("dataset_config"), documents)
        files = dict.fromkeys(str(document.path) for document in (*documents, *configs, *datasets))
        for key, found in (("config_file", configs), ("dataset_config", datasets)):
            if found:
                settings.pop(key, None)
        subsets = [subset for dataset in datasets for subset in subsets_of(dataset)]
        own = [subset for subset, of_class in subsets if not of_class]
        shared = shared_by_sets(settings)
        settings |= _first(own, [subset for subset, of_class in subsets if of_class])
        return translate(dict(_spread(settings)), command.script, files, own[1:], shared)


def _named(name: Any, documents: Sequence[Document], suffix: str = "") -> list[Document]:
    """The file that a setting names, where it can be seen: from here, or beside the file that names it."""
    if not isinstance(name, str) or any(document.path.name == Path(name).name for document in documents):
        return []
    name = name if name.endswith(suffix) else name + suffix
    for path in (Path(name), documents[0].path.parent / name, documents[0].path.parent / re.split(r"[\\/]", name)[-1]):
        if can_be_seen(path):
            found = read_document(path)
            if not isinstance(found.data, dict):
                raise UserError("is neither TOML nor JSON", where=path)
            return [found]
    return []


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A config's sections have names for people only: their keys are one table (`read_config_from_file`)."""
    return {key: value for name, section in tree.items()
            for key, value in (section.items() if isinstance(section, dict) else [(name, section)])}


def _spread(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments of an argument, `conv_dim=8`, as keys of their own."""
    for key, value in settings.items():
        if key not in ("network_args", "optimizer_args"):
            yield key, value
            continue
        for item in value if isinstance(value, list) else str(value).split():
            name, sign, own = str(item).partition("=")
            yield f"{key}.{name.strip()}", own.strip() if sign else True


def subsets_of(document: Document) -> list[tuple[Subset, bool]]:
    """The subsets of a dataset config, and whether each is of class pictures.

    A subset has what its dataset and [general] say, unless it says it otherwise. Raises `UserError`.
    """
    found: list[tuple[Subset, bool]] = []
    try:
        general = document.data.get("general", {})
        for i, dataset in enumerate(document.data["datasets"]):
            own = general | {key: value for key, value in dataset.items() if key != "subsets"}
            for j, subset in enumerate(dataset.get("subsets", [])):
                whole = {_CALLED.get(str(key), str(key)): value for key, value in (own | subset).items()}
                of_class = bool(whole.pop("is_reg", False))
                found.append((Subset(f"datasets.{i}.subsets.{j}", whole), of_class))
    except (AttributeError, TypeError):
        raise UserError("its datasets are not as kohya's scripts have them", where=document.path,
                        fix="[[datasets]] with [[datasets.subsets]] in each") from None
    return found


def _first(own: Sequence[Subset], of_class: Sequence[Subset]) -> dict[str, Any]:
    """The first subset of pictures and the first of class pictures, as flat keys; of other class pictures, what
    differs."""
    main = own[0].settings if own else {}
    regular = of_class[0].settings if of_class else {}
    found = dict(main) | {f"reg.{key}": value for key, value in regular.items()
                          if key in ("image_dir", "num_repeats", "class_tokens") or main.get(key) != value}
    for subset in of_class[1:]:
        found |= {subset.key(key): value for key, value in subset.settings.items() if regular.get(key) != value}
    return found
