"""Small looks at files before they are opened. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from impasto.core.errors import UserError
from impasto.core.files import no_such_file


def first_bytes(path: Path) -> bytes:
    """The first 16 bytes. Raises `UserError` if the file is not there or cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(16)
    except FileNotFoundError:
        raise no_such_file(path, "file or folder") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})", where=path) from error


_PICTURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")


def is_picture(path: Path) -> bool:
    """Whether a file begins as pictures do."""
    start = first_bytes(path)
    return start.startswith(_PICTURES) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def is_pickle(path: Path) -> bool:
    """Whether a file is to be read by the pickle rule: by its first bytes, whatever its name; except that
    nothing that calls itself .safetensors ever is."""
    start = first_bytes(path)
    if path.suffix.lower() == ".safetensors":
        return False
    # 0x80 begins a pickle, and may be the lowest byte of a safetensors header's length, where `{` follows
    return start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[8:9] != b"{")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `UserError` if it is not there or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no such file", where=path, fix="download the folder again") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error})", where=path) from error
    except (ValueError, RecursionError):
        raise UserError("is not JSON", where=path, fix="download it again") from None
    if not isinstance(value, dict):
        raise UserError("is not a JSON object", where=path, fix="download it again")
    return value
