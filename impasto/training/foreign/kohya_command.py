"""A command line of kohya's, pasted or in a script: bash, cmd.exe or PowerShell. It is read, never run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from impasto.core.errors import UserError
from impasto.training.foreign.kohya import OTHER_SCRIPTS, SCRIPTS

#: what ends a command on its line
_ENDS = re.compile(r"[|&;]+|[12]?>{1,2}.*")
_SCRIPT = re.compile(r"[\w.]*\.py")
_WINDOWS = re.compile(r"[\^`]\s*$|(?:^|[\s\"'=])[A-Za-z]:\\|\.exe\b|^\s*set\s+\w+=|^\s*\$\w+\s*=", re.MULTILINE)
_COMMENT = re.compile(r"^\s*(?:#|::|rem\b)", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"""^\s*(?:export\s+|set\s+"?|\$(?:env:)?)?(\w+)\s?=\s?(["']?)(.*?)\2"?\s*$""")
_VARIABLE = re.compile(r"\$\{?(?:env:)?(\w+)\}?|%(\w+)%")


@dataclass
class Command:
    """A script's name, its arguments, and those of the launcher before it."""

    script: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)


def read_command(source: str, where: Path) -> Command:
    """The command that trains. Raises `UserError` where there is none, or one that trains what no method here does."""
    windows = bool(_WINDOWS.search(source))
    variables: dict[str, str] = {}
    for line in joined(source, windows):
        assigned = None if ".py" in line else _ASSIGNMENT.match(line)
        if assigned:
            variables[assigned[1]] = _filled(assigned[3], variables)
            continue
        words = _split(_filled(line, variables), windows, where)
        end = next((i for i, word in enumerate(words) if _ENDS.fullmatch(word)), len(words))
        script = next((i for i, word in enumerate(words[:end]) if _name(word) in {*SCRIPTS, *OTHER_SCRIPTS}), None)
        if script is None and not (words and words[0].startswith("--")):
            continue
        name = "" if script is None else _name(words[script])
        if name in OTHER_SCRIPTS:
            raise UserError(f"{name} trains {OTHER_SCRIPTS[name]}, for which there is no method here", where=where)
        own = arguments(words[0 if script is None else script + 1:end])
        launcher = arguments(words[:script or 0])
        return Command(name, own | {f"accelerate.{key}": value for key, value in launcher.items()})
    raise UserError("names no script of kohya's that trains", where=where, fix="the command has a name in it such as "
                    "train_network.py")


def joined(source: str, windows: bool) -> list[str]:
    """Lines, comments left out, with those that a backslash, caret or backtick continues put together.

    A backslash at the end of a path on Windows continues nothing.
    """
    lines, open_ = [""], False
    for line in source.splitlines():
        if _COMMENT.match(line) and not open_:
            continue
        text = line.rstrip()
        lines[-1 if open_ else len(lines):] = [f"{lines[-1]} {text}" if open_ else text]
        open_ = text.endswith(("\\", "^", "`")) and not (windows and re.search(r"\S\\$", text))
        if open_:
            lines[-1] = lines[-1][:-1]
    return lines


def _split(line: str, windows: bool, where: Path) -> list[str]:
    """The words of a command. On Windows a backslash is part of a path."""
    try:
        if not windows:
            return shlex.split(line)
        lexer = shlex.shlex(line.replace("^", ""), posix=True, punctuation_chars=False)
        lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
        return list(lexer)
    except ValueError:
        raise UserError(f"a quote is not closed in {line.strip()[:60]!r}", where=where) from None


def _name(word: str) -> str:
    """The script's name in a word: `./sd-scripts\\train_network.py` is train_network.py."""
    name = PureWindowsPath(word).name
    return name if _SCRIPT.fullmatch(name) else ""


def _filled(text: str, variables: dict[str, str]) -> str:
    """A line with those variables filled in that the file itself sets."""
    return _VARIABLE.sub(lambda match: variables.get(match[1] or match[2], match[0]), text)


def arguments(words: list[str]) -> dict[str, Any]:
    """--key=value, --key value, --switch and --key several values, as a table. Values stay texts."""
    found: dict[str, Any] = {}
    key = ""
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            key, sign, value = word.lstrip("-").partition("=")
            found[key] = value if sign else True
        elif key:
            before = found[key]
            found[key] = word if before is True else [*before, word] if isinstance(before, list) else [before, word]
    return {f"variables.{key}" if _open(value) else key: value for key, value in found.items()}


def _open(value: Any) -> bool:
    """Whether a value holds a variable that the file does not set."""
    return any(_VARIABLE.search(str(item)) for item in (value if isinstance(value, list) else [value]))
