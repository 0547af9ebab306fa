"""`trajlm inspect`: a page on this machine alone.

The standard library's HTTP server is enough for one reader and three questions: it brings no telemetry, no fonts from
elsewhere and no further dependency into a room with patients' records, as Gradio and its like would. It listens on the
loopback address only. On a machine that several people share, others can reach that address too: so every question must
carry the key that is printed with the page's address, and, against pages of other origins in the reader's own browser,
name this server as its host and origin. No file is ever served, so no path leads to one.
"""

from __future__ import annotations

import hmac
import itertools
import json
import secrets
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from trajlm.errors import TrajlmError
from trajlm.inspector.editing import Edits
from trajlm.inspector.session import Session
from trajlm.report.build import target_infos
from trajlm.report.run import open_run

LOOPBACK = "127.0.0.1"
LONGEST_QUESTION = 4_000_000
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class InspectServer(ThreadingHTTPServer):
    """Serves one session on the loopback address; ``port`` 0 takes a free one."""

    daemon_threads = True

    def __init__(self, session: Session, port: int = 0) -> None:
        self.session, self.key = session, secrets.token_urlsafe(24)
        try:
            super().__init__((LOOPBACK, port), Handler)
        except OSError as error:
            raise TrajlmError(f"port {port} cannot be had ({error.strerror}); name another with --port") from error
        hosts = [f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")]
        self.hosts, self.origins = frozenset(hosts), frozenset(f"http://{host}" for host in hosts)

    @property
    def url(self) -> str:
        """The page's address, key included."""
        return f"http://{LOOPBACK}:{self.server_port}/?key={self.key}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader who turned to another stay hung up on the last one: nothing to report."""


class Handler(BaseHTTPRequestHandler):
    """Three questions: the page, what happened in a stay, and the beliefs of an edited stay."""

    server: InspectServer
    server_version, sys_version = "trajlm", ""

    def do_GET(self) -> None:
        """``/`` is the page, ``/stay?id=`` what happened in a stay."""
        asked = urlsplit(self.path)
        query = parse_qs(asked.query)
        if not self._allowed(query.get("key", [""])[0] if asked.path == "/" else self.headers.get("X-Trajlm-Key", "")):
            return
        if asked.path == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.session.page(self.server.key))
        elif asked.path == "/stay":
            self._answer(lambda: self.server.session.outcomes(_stay_id(query.get("id", [""])[0])))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "no such page")

    def do_POST(self) -> None:
        """``/beliefs``: ``{"stay_id": ..., "edits": {...}}`` to a line of JSON per belief."""
        if not self._allowed(self.headers.get("X-Trajlm-Key", "")):
            return
        if self.path != "/beliefs" or self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.NOT_FOUND, "no such question")
            return
        try:
            question = self._question()
            lines = self.server.session.beliefs(_stay_id(question.get("stay_id")), Edits.of(question.get("edits", {})))
            first = next(lines)
        except TrajlmError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        self._start(HTTPStatus.OK, "application/x-ndjson")
        for line in itertools.chain([first], lines):
            self.wfile.write(json.dumps(line).encode() + b"\n")
            self.wfile.flush()

    def _question(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LONGEST_QUESTION:
            raise TrajlmError(f"expected a question of at most {LONGEST_QUESTION:,} bytes")
        try:
            question = json.loads(self.rfile.read(int(length)))
        except ValueError as error:
            raise TrajlmError("expected a question in JSON") from error
        if not isinstance(question, dict):
            raise TrajlmError("expected an object with stay_id and edits")
        return question

    def _allowed(self, key: str) -> bool:
        """The reader's own browser, on this machine, with the key; anything else gets a refusal."""
        origin = self.headers.get("Origin")
        here = self.headers.get("Host", "") in self.server.hosts and (origin is None or origin in self.server.origins)
        if not here:
            self._refuse(HTTPStatus.FORBIDDEN, "this page answers its own machine only")
            return False
        if not hmac.compare_digest(key.encode(), self.server.key.encode()):
            self._refuse(HTTPStatus.FORBIDDEN, "open the address that `trajlm inspect` printed, key included")
            return False
        return True

    def _answer(self, question: Any) -> None:
        try:
            self._send(HTTPStatus.OK, "application/json", json.dumps(question()))
        except TrajlmError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._send(status, "application/json", json.dumps({"error": why}))

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        self._start(status, kind, {"Content-Length": str(len(body))})
        self.wfile.write(body)

    def _start(self, status: HTTPStatus, kind: str, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in (HEADERS | (more or {})).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged: addresses carry the key and stay ids."""


def _stay_id(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise TrajlmError(f"expected a stay id, came {value!r}") from None


def inspect(run: Path, data: str | None, port: int, show_notes: bool) -> None:
    """Load a run and answer its page until interrupted."""
    opened, prepared = open_run(run, data)
    session = Session(opened.model, prepared, target_infos(opened.metrics), show_notes)
    with InspectServer(session, port) as server:
        print(f"open {server.url}\non this machine; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")
