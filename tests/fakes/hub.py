"""A Hugging Face hub on localhost: what `huggingface_hub` asks for a model, with the failures that users meet."""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secretsecretsecret"

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 128,
    "hidden_size": 8,
    "num_hidden_layers": 1,
}


def safetensors(values: int = 4) -> bytes:
    """A whole safetensors file with one float32 tensor."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [values], "data_offsets": [0, 4 * values]}}).encode()
    return len(header).to_bytes(8, "little") + header + struct.pack(f"<{values}f", *range(values))


def model_files() -> dict[str, bytes]:
    """The files of a model too small to run, complete enough to be fetched and checked."""
    return {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors": safetensors(),
        "pytorch_model.bin": b"a pickle, which nobody may fetch",
        "README.md": b"# tiny",
    }


@dataclass
class FakeHub:
    """The hub's state; tests change it while it runs."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=model_files)
    repo: str = "org/tiny"
    private: bool = False
    """401 without TOKEN, as the hub answers for what it won't even confirm to exist."""
    gated: bool = False
    """The listing is public, the files are 403 whatever the token."""
    forbidden: bool = False
    """403 for everything."""
    cut: str | None = None
    """The file whose connection ends in its middle, every time."""
    ranges: bool = True
    """A part that is asked for is sent alone; False: the whole file is, as by servers that know no ranges."""
    codes: bool = True
    """Refusals say what is missing in a header, as the hub's do and some mirrors' don't."""
    requests: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes of content, by file."""

    def fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {path.rpartition("/")[2] for path in self.requests if path.startswith("GET ") and "/resolve/" in path}


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A hub on a free port."""
    hub = FakeHub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append(f"{self.command} {path}")
        hub, parts = self.state, path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        if hub.private and self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "RepoNotFound")
        if hub.forbidden:
            return self._refuse(403, None)
        if repo != hub.repo:
            return self._refuse(404, "RepoNotFound")
        revision = parts[5] if api and len(parts) > 5 else "main" if api else parts[3]
        if revision not in ("main", SHA):
            return self._refuse(404, "RevisionNotFound")
        if api:
            return self._json(self._tree() if "tree" in parts else self._info())
        if hub.gated:
            return self._refuse(403, "GatedRepo")
        return self._file(Path(path).name)

    def _info(self) -> dict[str, Any]:
        files = [{"rfilename": name, "size": len(content)} for name, content in self.state.files.items()]
        return {"id": self.state.repo, "modelId": self.state.repo, "sha": SHA, "siblings": files, "tags": []}

    def _tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
            for name, content in self.state.files.items()
        ]

    def _file(self, name: str) -> None:
        content = self.state.files.get(name)
        if content is None:
            return self._refuse(404, "EntryNotFound")
        etag, content = _etag(content), self._part(content)
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.state.sent[name] = self.state.sent.get(name, 0) + len(content)
            if name == self.state.cut:
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            else:
                self.wfile.write(content)
        return None

    def _part(self, content: bytes) -> bytes:
        """What the request asks for of `content`; the answer's status is sent."""
        asked = self.headers.get("range", "").removeprefix("bytes=")
        if not asked or not self.state.ranges:
            self.send_response(200)
            return content
        first, _, last = asked.partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        return part

    def _json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str | None) -> None:
        self.send_response(status)
        if code and self.state.codes:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
