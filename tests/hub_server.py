"""A small Hugging Face Hub on this machine: the endpoints that `huggingface_hub` calls to publish and load a model.

Repositories are kept in memory, a commit is all or nothing, large files go through LFS. `cut` breaks connections, as a
network does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_right"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repo:
    """A repository: commits in order, each of them all its files; `private` asks for the token, `gated` for more."""

    private: bool = False
    gated: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files) of a branch, tag or commit; the empty tree before the first commit of main."""
        if revision == "main":
            return self.commits[-1] if self.commits else ("0" * 40, {})
        oid = self.refs.get(revision, revision)
        return next((commit for commit in self.commits if commit[0] == oid), None)


class Hub(ThreadingHTTPServer):
    """See the module's docstring.

    Attributes:
        repos: by id.
        lfs: large files that were uploaded, by SHA-256, committed or not.
        cut: (method, part of the path) -> how many such requests to break off in the middle.
        seen: method, path and Range header of every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.cut: dict[tuple[str, str], int] = {}
        self.seen: list[tuple[str, str, str | None]] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nothing to print."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    # --- answers ----------------------------------------------------------------------------------------------

    def answer(self) -> None:
        self.path_only = unquote(urlsplit(self.path).path)
        self.server.seen.append((self.command, self.path_only, self.headers.get("Range")))
        self.breaks = self.must_break()
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length // 2 if self.breaks and self.command in ("POST", "PUT") else length)
        if self.breaks and self.command in ("POST", "PUT"):
            self.close_connection = True
            self.connection.close()
            return
        parts = self.path_only.strip("/").split("/")
        if self.path_only == "/api/repos/create":
            self.create()
        elif self.path_only == "/api/validate-yaml":
            text = json.loads(self.body)["content"].split("---")[1]
            yaml.safe_load(text)
            self.send({"errors": [], "warnings": []})
        elif parts[0] == "lfs":
            self.store_lfs(parts[1])
        elif parts[:2] == ["api", "models"]:
            self.model("/".join(parts[2:4]), parts[4:])
        elif parts[2:] == ["info", "lfs", "objects", "batch"]:
            self.lfs_batch("/".join(parts[:2]).removesuffix(".git"))
        elif parts[2] == "resolve":
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.refuse(404, "EntryNotFound", f"no such endpoint: {self.command} {self.path}")

    def must_break(self) -> bool:
        for (method, part), times in self.server.cut.items():
            if method == self.command and part in self.path_only and times:
                self.server.cut[method, part] = times - 1
                return True
        return False

    def send(self, value: Any = None, status: int = 200, content: bytes | None = None, **headers: str) -> None:
        body = content if content is not None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.breaks:
            self.close_connection = True
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def may(self, repo: Repo | None) -> bool:
        """Whether the repository is there for the caller; the Hub does not tell a private one from none."""
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.headers.get("Authorization") and not known:
            self.refuse(401, "", "Invalid username or password.")
        elif repo is None or (repo.private and not known):
            self.refuse(404 if known else 401, "RepoNotFound", "Repository not found")
        elif repo.gated and not known:
            self.refuse(401, "GatedRepo", "Access to this model is restricted")
        else:
            return True
        return False

    def writes(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.refuse(401, "", "Invalid username or password.")
        return False

    # --- endpoints --------------------------------------------------------------------------------------------

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.writes():
            return
        if name in self.server.repos:
            self.send({"error": "exists", "url": f"{self.server.endpoint}/{name}"}, 409)
            return
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.repos[name] = Repo(private=private)
        self.send({"url": f"{self.server.endpoint}/{name}"})

    def model(self, name: str, rest: list[str]) -> None:
        repo = self.server.repos.get(name)
        if not self.may(repo):
            return
        assert repo is not None
        verb, revision = rest[0] if rest else "revision", rest[1] if len(rest) > 1 else "main"
        if verb in ("preupload", "commit"):
            if self.writes():
                (self.preupload if verb == "preupload" else self.commit)(name, repo)
            return
        found = repo.at(revision)
        if found is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        oid, files = found
        if verb == "revision":
            listed = [{"rfilename": path} for path in files]
            self.send(
                {"id": name, "modelId": name, "sha": oid, "private": repo.private, "tags": [], "siblings": listed}
            )
        else:
            self.send([entry(path, content) for path, content in files.items()])

    def preupload(self, _name: str, _repo: Repo) -> None:
        asked = json.loads(self.body)["files"]
        modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in asked}
        self.send({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def lfs_batch(self, name: str) -> None:
        if not (self.may(self.server.repos.get(name)) and self.writes()):
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            made = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.lfs:
                made["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{asked['oid']}"}}
            objects.append(made)
        self.send({"transfer": "basic", "objects": objects})

    def store_lfs(self, oid: str) -> None:
        if sha256(self.body) != oid:
            self.refuse(400, "", "wrong content")
            return
        self.server.lfs[oid] = self.body
        self.send({})

    def commit(self, name: str, repo: Repo) -> None:
        files = dict(repo.commits[-1][1]) if repo.commits else {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server.lfs:
                    self.refuse(400, "", f"{value['path']} was not uploaded")
                    return
                files[value["path"]] = self.server.lfs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(repr((name, len(repo.commits), sorted(files.items()))).encode()).hexdigest()
        repo.commits.append((oid, files))
        self.send({"commitUrl": f"{self.server.endpoint}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.server.repos.get(name)
        if not self.may(repo):
            return
        assert repo is not None
        found = repo.at(revision)
        if found is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        oid, files = found
        if path not in files:
            self.send({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            return
        content = files[path]
        headers = {"ETag": f'"{entry(path, content)["oid"]}"', "X_Repo_Commit": oid, "Accept_Ranges": "bytes"}
        if path.endswith(".safetensors"):
            headers |= {"X_Linked_Etag": f'"{sha256(content)}"', "X_Linked_Size": str(len(content))}
        start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(status=206 if start else 200, content=content[start:], **headers)


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as the tree of a repository lists it."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    made: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if path.endswith(".safetensors"):
        made["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return made
