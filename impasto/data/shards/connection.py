"""Connections to web servers, over the system's proxy where it names one, and what goes with each request.

The hub's token goes to the hub alone.
"""

from __future__ import annotations

import base64
import http.client
import urllib.request
from collections.abc import Mapping
from urllib.parse import SplitResult, unquote, urlsplit

from huggingface_hub import constants, get_token

from impasto.core.errors import UserError

#: seconds in which a server has to say something
PATIENCE = 60.0

#: what to do where the hub does not show a file
LOGIN = "hf auth login, or set HF_TOKEN to a token that may read it"


def connect(parts: SplitResult) -> http.client.HTTPConnection:
    """A connection to a server, over the system's proxy where it names one."""
    host = parts.hostname or ""
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    proxy = _proxy(parts)
    if proxy is None:
        return kind(host, parts.port, timeout=PATIENCE)
    line = kind(proxy.hostname or "", proxy.port or 80, timeout=PATIENCE)
    if secure:
        line.set_tunnel(host, parts.port or 443, headers=_basic(proxy, "Proxy-Authorization"))
    return line


def _proxy(parts: SplitResult) -> SplitResult | None:
    told = urllib.request.getproxies().get(parts.scheme)
    if not told or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return urlsplit(told if "//" in told else f"//{told}")


def path_of(parts: SplitResult) -> str:
    """What a request asks for."""
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if parts.scheme == "http" and _proxy(parts) is not None:  # a proxy wants the whole address
        return f"http://{parts.netloc.rpartition('@')[2]}{path}"
    return path


def headers_of(parts: SplitResult, own: Mapping[str, str]) -> dict[str, str]:
    """The headers of a request, with the name and password that stand in the address, or the hub's token for the hub.

    They are of this one address: where it leads elsewhere, they are asked for anew, and no other server is shown them.
    """
    proxy = _proxy(parts) if parts.scheme == "http" else None
    return {"User-Agent": "impasto", "Accept-Encoding": "identity", **own,
            **(_basic(parts, "Authorization") or _bearer(parts)),
            **(_basic(proxy, "Proxy-Authorization") if proxy is not None else {})}


def _basic(parts: SplitResult, header: str) -> dict[str, str]:
    """The name and password that stand in an address."""
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {header: f"Basic {base64.b64encode(pair.encode()).decode()}"}


# --- the hub -----------------------------------------------------------------------------------------------
def is_hub(parts: SplitResult) -> bool:
    """Whether an address is on the Hugging Face hub (HF_ENDPOINT): its scheme, host and port."""
    return _origin(parts) == _origin(urlsplit(constants.ENDPOINT))


def _origin(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _bearer(parts: SplitResult) -> dict[str, str]:
    """The token of HF_TOKEN, or of a login, for an address on the hub."""
    if not is_hub(parts) or constants.HF_HUB_DISABLE_IMPLICIT_TOKEN or (token := get_token()) is None:
        return {}
    if not token.isascii():
        raise UserError("the hub's token has characters that no token has", where="HF_TOKEN", fix=LOGIN)
    return {"Authorization": f"Bearer {token}"}
