"""Two kinds of failure: what the user can mend, and what is a defect of ours.

A `UserError` is printed by the command line as one line: what went wrong, where, what to do. A broken
invariant is an `assert` or an ordinary exception, and shows its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can mend. Its text is one line: what, where, what to do.

    `what` says what is wrong; `where` names the file, key or layer; `fix` says what to do about it.
    """

    def __init__(self, what: str, *, where: object = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, str(where), fix
        line = f"{self.where}: {what}" if self.where else what
        super().__init__(f"{line}; {fix}" if fix else line)


class MissingExtra(UserError):
    """An optional dependency is not installed; the line names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"needs the package {package}", fix=f"pip install 'impasto[{extra}]'")


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint that ends an error about an unknown `word`: the nearest known one, or the whole list."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(names) if names else ""
