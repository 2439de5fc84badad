"""Running the command line in a process of its own, as users do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def impasto(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`impasto …` in a fresh interpreter, without a terminal."""
    root = str(Path(__file__).parents[2])
    return subprocess.run([sys.executable, "-m", "impasto", *map(str, arguments)], capture_output=True, text=True,
                          cwd=cwd, encoding="utf-8", timeout=120,
                          env={**os.environ, "PYTHONPATH": root, "PYTHONIOENCODING": "utf-8", **environment})


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The line of a failure; checks that it is one, and no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1, result
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]
