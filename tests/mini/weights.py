"""Whether the embedded base and the reader of pictures have their weights, which tests may ask for."""

from __future__ import annotations

import pytest

from impasto.mini import BASE, WEIGHTS

READER = BASE.parent / "reader.safetensors"

needs_base = pytest.mark.skipif(not all((BASE / name).is_file() for name in WEIGHTS),
                                reason="the embedded base has no weights here")
needs_reader = pytest.mark.skipif(not READER.is_file(), reason="the reader has no weights here")
