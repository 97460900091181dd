"""A Hub of one's own for the tests: what `push_to_hub` sends over HTTP is kept, and handed out again by `resolve`."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Attributes of the server: `repositories`, name -> file -> bytes; `requests`, what was asked for."""

    def log_message(self, *args):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        self.server.requests.append(f"POST {self.path}")
        sent = self.rfile.read(int(self.headers["Content-Length"] or 0))
        address, path = f"http://{self.headers['Host']}", self.path.partition("?")[0]
        if path == "/api/repos/create":
            wanted = json.loads(sent)
            name = f"{wanted['organization']}/{wanted['name']}"
            self.server.repositories.setdefault(name, {})
            return self.answer({"url": f"{address}/{name}"})
        if "/preupload/" in path:
            # As for small files: they come with the commit.
            names = [file["path"] for file in json.loads(sent)["files"]]
            return self.answer(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            for entry in map(json.loads, sent.splitlines()):
                if entry["key"] == "file":
                    file = entry["value"]
                    self.server.repositories[found[1]][file["path"]] = base64.b64decode(file["content"])
            return self.answer({"commitUrl": f"{address}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        return self.answer({"error": "unknown"}, 404)

    def do_GET(self):
        self.server.requests.append(f"{self.command} {self.path}")
        if found := re.fullmatch(r"/(?!api/)(?:datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
            content = self.server.repositories.get(found[1], {}).get(found[2])
            if content is None:
                return self.answer(b"", 404, X_Error_Code="EntryNotFound")
            return self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+", path):
            files = self.server.repositories.get(found[1], {})
            return self.answer([
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ])  # fmt: skip
        if found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            files = [{"rfilename": name} for name in self.server.repositories.get(found[1], {})]
            return self.answer({"id": found[1], "sha": COMMIT, "siblings": files, "private": False, "tags": []})
        return self.answer({"error": "unknown"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@contextmanager
def running_hub():
    """A server on a free port of this machine: `server.repositories`, and its address for HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.requests = {}, []
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
