"""`section.key=value` on the command line, set in a recipe's tree before it is checked."""

from __future__ import annotations

import tomllib
from typing import Any

from impasto.core.errors import UserError

#: sections that may be there several times, and what each of them is called
SEVERAL = {"method": "method", "data": "set of pictures"}


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in the tree. The value is TOML, or else plain text; without one, `section.key=`, the
    recipe's own is taken away, and what counts by default counts.

    `method.rank=8` sets the only method's, `method.1.rank=8` the second one's; `data.1.flip=true` that of the second
    set of pictures. Raises `UserError` for what is no such line, or does not say which of several it means.
    """
    key, sign, text = override.partition("=")
    path = key.strip().split(".")
    if not sign or len(path) < 2:
        raise UserError("is not section.key=value", where=override)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = path
    noun = SEVERAL.get(path[0], "item")
    node: Any = tree
    for depth, name in enumerate(sections):
        if isinstance(node, list):
            node = _item(node, name, override, noun)
            continue
        if depth == 1 and name == "0" and path[0] in SEVERAL and "0" not in node:
            continue  # the only one, which stands alone
        node = node.setdefault(name, {})
        if isinstance(node, list) and not path[depth + 1].isdigit():
            if len(node) != 1:
                raise UserError(f"there are {len(node)} {noun.replace('set', 'sets') if ' ' in noun else f'{noun}s'}",
                                where=override, fix=f"say which: {name}.0.{last}, {name}.1.{last}, …")
            node = node[0]
    if not isinstance(node, dict):
        raise UserError(f"{'.'.join(sections)} is not a section", where=override)
    if text:
        node[last] = value
    else:
        node.pop(last, None)


def _item(items: list[Any], index: str, override: str, noun: str) -> Any:
    if not index.isdigit() or int(index) >= len(items):
        raise UserError(f"there is no {noun} {index}", where=override, fix=f"they count from 0 to {len(items) - 1}")
    return items[int(index)]
