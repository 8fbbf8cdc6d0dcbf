"""A stand-in for the Hub: repositories of folders, over HTTP on loopback."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(room: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve room/owner/name/<files>; give the address and the list of what was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def reply(self, code: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            asked.append(f"{self.command} {path}")
            parts = path.split("/")
            if parts[:2] == ["api", "models"]:
                folder = room / parts[2] / parts[3]
                if not folder.is_dir():
                    return self.reply(404, b"", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
                files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
                if "tree" in parts:
                    tree = [
                        {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40} for f in files
                    ]
                    return self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
                info = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                return self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
            file = room / parts[0] / parts[1] / "/".join(parts[4:])
            if not file.is_file():
                return self.reply(404, b"", X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
            body = file.read_bytes()
            tag = hashlib.sha1(body).hexdigest()
            return self.reply(200, body, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
