"""A Hub of our own on 127.0.0.1: what huggingface_hub asks of one when it fetches a snapshot."""

from __future__ import annotations

import hashlib
import json
import os
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", "tokenizer.json")

_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


class HubServer:
    """`with HubServer({"org/name": {"config.json": b"{}"}}) as hub:` serves that at `hub.url`, as `main`.

    A repository in `gated` lists its files to anyone and gives them to `token` alone. `status`, if set, is
    the answer to everything. The next `cuts` downloads break off half way. `requests` holds "METHOD path"
    of every request, `bytes_served` the bytes of files that were sent.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.refs: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.token = "hf_of_a_test"
        self.status: int | None = None
        self.cuts = 0
        self.requests: list[str] = []
        self.bytes_served = 0
        self.lock = Lock()
        for repo, files in repos.items():
            self.push(repo, files)
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def push(self, repo: str, files: dict[str, bytes]) -> str:
        """The commit, made of these files, that `main` now names."""
        text = json.dumps([repo, {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}])
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = dict(files)
        self.tag(repo, "main", commit)
        return commit

    def tag(self, repo: str, name: str, commit: str) -> None:
        self.refs.setdefault(repo, {})[name] = commit

    def commit(self, repo: str, revision: str = "main") -> str:
        """The commit that a branch, a tag or a commit hash names; KeyError if there is none."""
        return revision if revision in self.commits[repo] else self.refs[repo][revision]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """For a subprocess that shall know this Hub alone and keep its cache under `home`."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))
        }
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "*", "no_proxy": "*"}
        return kept | {"PYTHONPATH": str(Path(__file__).parents[1])} | more

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """From now on nobody listens at `url`."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/api/agent-harnesses":  # the client asks who drives it; not counted
            return self._json({"standardEnvVars": [], "harnesses": {}})
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {unquote(path)}")
        if self.hub.status:
            return self._error(self.hub.status)
        match = _API.fullmatch(path) or _FILE.fullmatch(path)
        if not match or match["repo"] not in self.hub.commits:
            return self._error(404, "RepoNotFound", "Repository not found")
        asked = match.groupdict()
        repo = asked["repo"]
        try:
            commit = self.hub.commit(repo, unquote(asked["revision"] or "main"))
        except KeyError:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {asked['revision']}")
        files = self.hub.commits[repo][commit]
        if "name" not in asked:
            if asked["what"] == "tree":
                return self._json([_tree_entry(name, files[name]) for name in sorted(files)])
            siblings = [_sibling(name, files[name]) for name in sorted(files)]
            return self._json({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings})
        if repo in self.hub.gated and self.headers["Authorization"] != f"Bearer {self.hub.token}":
            return self._error(401, "GatedRepo", f"Access to model {repo} is restricted")
        name = unquote(asked["name"])
        if name not in files:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        return self._file(name, files[name], commit)

    do_HEAD = do_GET  # noqa: N815

    def _file(self, name: str, data: bytes, commit: str) -> None:
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_git_sha1(data)}"', "Accept-Ranges": "bytes"}
        if name.endswith(LFS_SUFFIXES):
            linked = hashlib.sha256(data).hexdigest()
            headers |= {
                "ETag": f'"{linked[:32]}"',
                "X-Linked-Etag": f'"{linked}"',
                "X-Linked-Size": str(len(data)),
            }
        status, start = 200, 0
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            status, start = 206, int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._reply(status, data[start:], headers, may_break=True)

    def _json(self, value: Any) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(
        self, status: int, code: str = "", message: str = "", more: dict[str, str] | None = None
    ) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        self._reply(status, json.dumps({"error": message}).encode(), headers | (more or {}))

    def _reply(self, status: int, body: bytes, headers: dict[str, str], may_break: bool = False) -> None:
        if not self.headers["Authorization"]:
            headers["X-HF-Warning"] = (
                "unauthenticated; You are sending unauthenticated requests to the HF Hub."
            )
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with self.hub.lock:
            if may_break and self.hub.cuts > 0:
                self.hub.cuts -= 1
                body, self.close_connection = body[: len(body) // 2], True
            self.hub.bytes_served += len(body) if may_break else 0
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing on stderr: tests look at it."""


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _tree_entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _git_sha1(data)}
    if name.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _git_sha1(data)}
    if name.endswith(LFS_SUFFIXES):
        sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return sibling
