"""A hub in miniature: folders served as repositories, over HTTP as huggingface_hub asks for them."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "a" * 40


class Hub(http.server.ThreadingHTTPServer):
    """repositories: name -> folder, at the revisions main and v1. refused: name -> (status, X-Error-Code).
    asked: (method, path, bytes of the body) of every request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Path] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.asked: list[tuple[str, str, int]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def sent(self, name: str) -> int:
        """Bytes of a file that were sent."""
        return sum(size for method, path, size in self.asked if method == "GET" and path.endswith(f"/{name}"))


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        found = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)/(resolve|revision|tree)/([^/]+)(?:/(.*))?", path)
        if not found and (whole := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path)):
            name, what, revision, file = whole[1], "revision", "main", None
        elif found:
            name, what, revision, file = found.groups()
        else:
            return self._send(404)
        if name in self.server.refused:
            status, code = self.server.refused[name]
            return self._send(status, headers={"X-Error-Code": code} if code else {})
        if name not in self.server.repositories:
            return self._send(401)
        if revision not in ("main", "v1", COMMIT):
            return self._send(404, headers={"X-Error-Code": "RevisionNotFound"})
        folder = self.server.repositories[name]
        return self._api(folder, what) if what != "resolve" else self._file(folder / (file or ""))

    def _api(self, folder: Path, what: str) -> None:
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        if what == "tree":
            rows = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                for name, path in files.items()
            ]
            return self._send(200, json.dumps(rows).encode(), {"Content-Type": "application/json"})
        info = {"id": folder.name, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        return self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _file(self, path: Path) -> None:
        if not path.is_file():
            return self._send(404, headers={"X-Error-Code": "EntryNotFound"})
        body, headers, status = path.read_bytes(), {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": COMMIT}, 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(asked[1]), min(int(asked[2] or len(body) - 1), len(body) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(body)}"
            body, status = body[start : end + 1], 206
        return self._send(status, body, headers)

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.server.asked.append((self.command, self.path.partition("?")[0], len(body)))
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
