"""A1111's embeddings inside pictures: a PNG whose text `sd-ti-embedding` is base64 of JSON, tensors as nested lists.

modules/textual_inversion/image_embedding.py and textual_inversion.py of github.com/AUTOMATIC1111/stable-diffusion-webui
write and read it. The same program draws the numbers into the picture's edges too, for pictures that lost their texts;
that is not read here. Of a picture no pixel is decoded. PNG: 8 bytes, then chunks of length (4, big-endian), type (4),
content, checksum (4).
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impasto.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

PNG = b"\x89PNG\r\n\x1a\n"
KEYWORD = b"sd-ti-embedding\0"
#: of the text: 75 vectors of SDXL take 4 MB
LARGEST = 16 * 2**20


def holds_embedding(path: Path) -> bool:
    """Whether the file is a PNG with such a text in it."""
    return next(_texts(path), None) is not None


def embedding_in(path: Path) -> tuple[str, Tensor]:
    """The token's name and its vectors. Raises `UserError` for a text that is none of A1111's."""
    import torch

    kind, content = next(_texts(path))
    try:
        told = json.loads(base64.b64decode(_plain(kind, content, path), validate=True))
        ((_, found),) = told["string_to_param"].items()
        name = told.get("name")
        vectors = torch.tensor(found["TORCHTENSOR"], dtype=torch.float32)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, zlib.error):
        raise UserError("holds a text sd-ti-embedding that is no embedding of A1111's", where=path,
                        fix="take the picture as it was first shared, or the embedding's own file") from None
    return (name if isinstance(name, str) and name else path.stem), vectors


def _texts(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """(type, what follows the keyword) of the chunks that have it, as far as the file is whole."""
    with open(path, "rb") as file:
        if file.read(8) != PNG:
            return
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            start = file.tell()
            if kind in (b"tEXt", b"zTXt") and file.read(len(KEYWORD)) == KEYWORD:
                content = file.read(min(length - len(KEYWORD), LARGEST + 1)) if length > len(KEYWORD) else b""
                yield kind, content
            if kind == b"IEND":
                return
            file.seek(start + length + 4)


def _plain(kind: bytes, content: bytes, path: Path) -> bytes:
    """The text, unpacked where it is packed; no more than LARGEST of it."""
    if kind == b"zTXt":  # a byte for the method, then zlib's
        content = zlib.decompressobj().decompress(content[1:], LARGEST + 1)
    if len(content) > LARGEST:
        raise UserError(f"holds an embedding of more than {LARGEST // 2**20} MiB, which no text encoder takes",
                        where=path, fix="it is damaged, or made to fill the memory")
    return content


def refusal(path: Path) -> UserError:
    """The line for a picture that is given for an adapter and holds none."""
    return UserError("is a picture without an embedding in its texts", where=path,
                     fix="if one was drawn into its edges, let A1111 load it and save it as safetensors")


def other_texts(texts: dict[str, Any]) -> dict[str, Any]:
    """A picture's other texts."""
    return {name: text for name, text in texts.items() if name.encode() + b"\0" != KEYWORD}
