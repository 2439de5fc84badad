"""A stand-in for the Hugging Face hub: the few addresses that a push asks, on 127.0.0.1."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Hub:
    """What it holds and was asked. `refuse`: part of an address -> the status it answers with (0: it never answers)."""

    address: str = ""
    repos: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> {"private", "files": {path: bytes}}
    commits: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    large: str = "-"  # files that end so go as large ones (Git LFS)
    large_files: dict[str, bytes] = field(default_factory=dict)  # by their sha256
    refuse: dict[str, int] = field(default_factory=dict)
    free: threading.Event = field(default_factory=threading.Event)  # lets go of requests that are never answered

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and JSON for one request."""
        parts = path.split("?")[0].strip("/").split("/")
        if path.startswith("/api/repos/create"):
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            url = {"url": f"{self.address}/{name}"}
            if name in self.repos:
                return 409, url | {"error": "You already created this model repo"}
            private = asked.get("private") or asked.get("visibility") == "private"
            self.repos[name] = {"private": bool(private), "files": {}}
            return 200, url
        if path.startswith("/api/validate-yaml"):
            return 200, {"errors": [], "warnings": []}
        if path.startswith("/large/"):
            assert hashlib.sha256(body).hexdigest() == parts[1]
            self.large_files[parts[1]] = body
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [
                {"oid": each["oid"], "size": each["size"], **({} if each["oid"] in self.large_files else {
                    "actions": {"upload": {"href": f"{self.address}/large/{each['oid']}"}}})}
                for each in json.loads(body)["objects"]]}
        name = "/".join(parts[2:4])
        if name not in self.repos:
            return 404, {"error": "Repository not found"}
        if parts[4:5] == ["preupload"]:
            return 200, {"files": [{"path": file["path"], "shouldIgnore": False, "oid": None,
                                    "uploadMode": "lfs" if file["path"].endswith(self.large) else "regular"}
                                   for file in json.loads(body)["files"]]}
        if parts[4:5] == ["commit"]:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    self.commits.append(entry["value"]["summary"])
                elif entry["key"] == "lfsFile":
                    self.repos[name]["files"][entry["value"]["path"]] = self.large_files[entry["value"]["oid"]]
                else:
                    assert entry["key"] == "file" and entry["value"]["encoding"] == "base64"
                    self.repos[name]["files"][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.address}/{name}/commit/0"}
        return 200, {"id": name, "private": self.repos[name]["private"], "sha": "0" * 40, "tags": [], "siblings": []}


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub for the length of the block."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.asked.append(f"{self.command} {self.path}")
            hub.tokens.add(self.headers.get("Authorization"))
            status = next((status for part, status in hub.refuse.items() if part in self.path), None)
            if status == 0:
                hub.free.wait(60)
                return
            code, answer = (status, {"error": "as the test has it"}) if status else hub.answer(
                self.command, self.path, body)
            text = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _serve

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.free.set()
        time.sleep(0.05)
        server.shutdown()
        thread.join()
        server.server_close()
