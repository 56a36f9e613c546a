"""A real HTTP server that misbehaves."""

from __future__ import annotations

import contextlib
import http.server
import threading
from pathlib import Path
from typing import Any


class Server:
    """A real HTTP server of a folder, which misbehaves as often as it is told."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[str]()
        self.faults: dict[str, list[str]] = {}  # by file: what is wrong with each of the next answers
        self.end = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                name = self.path[1:]
                server.asked.append(name)
                left = server.faults.get(name, [])
                with contextlib.suppress(ConnectionError):
                    server.answer(self, server.folder / name, left.pop(0) if left else "")

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, to: http.server.BaseHTTPRequestHandler, path: Path, fault: str) -> None:
        to.close_connection = True
        if fault == "silent":
            self.end.wait(60)
            return
        if fault.isdigit() or not path.exists():
            to.send_error(int(fault or 404))
            return
        content = path.read_bytes()
        to.send_response(200)
        to.send_header("Content-Length", str(len(content) if fault != "endless" else 10**15))
        to.end_headers()
        half = len(content) // 2
        if fault == "slow":
            for at in range(0, len(content), 1 + len(content) // 8):
                to.wfile.write(content[at : at + 1 + len(content) // 8])
                self.end.wait(0.1)  # slowness itself
            return
        to.wfile.write(content[:half])
        if fault == "stalls":
            self.end.wait(60)
        if fault in ("stalls", "breaks"):
            return
        to.wfile.write(content[half:])
        while fault == "endless" and not self.end.is_set():
            to.wfile.write(bytes(1 << 16))

    def close(self) -> None:
        self.end.set()
        self._server.shutdown()
        self._server.server_close()
