"""Connections to web servers, over the system's proxy where it names one, and what goes with each request."""

from __future__ import annotations

import base64
import http.client
import urllib.request
from collections.abc import Mapping
from urllib.parse import SplitResult, unquote, urlsplit

#: seconds in which a server has to say something
PATIENCE = 60.0


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
    """The headers of a request, with the name and password that stand in the address."""
    proxy = _proxy(parts) if parts.scheme == "http" else None
    return {"User-Agent": "impasto", "Accept-Encoding": "identity", **own, **_basic(parts, "Authorization"),
            **(_basic(proxy, "Proxy-Authorization") if proxy is not None else {})}


def _basic(parts: SplitResult, header: str) -> dict[str, str]:
    """The name and password that stand in an address."""
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {header: f"Basic {base64.b64encode(pair.encode()).decode()}"}
