"""A stand-in for a container registry: manifests, and tokens for who has the password."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit


class RegistryServer:
    """`images` are like `team/reptile-train:1`; `challenge` is "", "Basic" or "Bearer"."""

    def __init__(self, *images: str, challenge: str = "", realm: str = "") -> None:
        self.images, self.challenge = images, challenge
        self.heard: list[tuple[str, str]] = []  # path, authorization
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.realm = realm or f"http://{self.host}/token"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def write_credentials(self, folder: Path, user: str, password: str) -> None:
        """Write what `docker login` keeps in `folder`."""
        pair = base64.b64encode(f"{user}:{password}".encode()).decode()
        text = json.dumps({"auths": {self.host: {"auth": pair}}})
        (folder / "config.json").write_text(text)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self
        basic = "Basic " + base64.b64encode(b"me:s3cr3t").decode()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                given = self.headers.get("Authorization", "")
                server.heard.append((self.path, given))
                query = parse_qs(urlsplit(self.path).query)
                if given not in ("", basic):
                    self._send(401)
                    return
                scope = query["scope"][0]
                token = f"{scope} for {'me' if given else 'anybody'}"
                self._send(200, json.dumps({"token": token}).encode())

            def do_HEAD(self) -> None:
                given = self.headers.get("Authorization", "")
                server.heard.append((self.path, given))
                path, _, reference = self.path.removeprefix("/v2/").partition("/manifests/")
                scope = f"repository:{path}:pull"
                needed = {"": given, "Basic": basic, "Bearer": f"Bearer {scope} for me"}
                if given != needed[server.challenge]:
                    fields = f'realm="{server.realm}",service="registry",scope="{scope}"'
                    self._send(401, WWW_Authenticate=f"{server.challenge} {fields}")
                elif "application/vnd.oci.image.index.v1+json" not in self.headers["Accept"]:
                    self._send(404)  # as for a manifest in a format that was not asked for
                else:
                    here = f"{path}{'@' if ':' in reference else ':'}{reference}" in server.images
                    self._send(200 if here else 404)

        return Handler
