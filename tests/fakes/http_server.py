"""A server that answers each request as it is told to, well or badly."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from megatron_rl.engine.address import ALIVE_ROUTE, EngineAddress

HANG_SECONDS = 3.0
Answer = tuple[int, dict[str, Any]] | str


class FakeServer:
    """Answers request number i with `answers[i]`, and later ones with the last entry.

    Args:
        answers: (status, JSON), or "hang": none within HANG_SECONDS, or "reset": the connection is
            closed without an answer.
    """

    def __init__(self, *answers: Answer) -> None:
        self.requests: list[dict[str, Any]] = []  # bodies; {} for a request without one
        self.paths: list[str] = []  # with the query
        self.tokens: list[str | None] = []  # the Authorization header
        self.is_frozen = False  # answers no health check; these are only counted
        self.num_checks = 0
        self.delay_seconds = 0.05  # before an answer, so that requests overlap
        self.num_in_flight = self.max_in_flight = 0
        self._answers = answers
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer._handle(self)

            do_POST = do_GET

            def log_message(self, *ignored: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.address = EngineAddress(
            url=f"http://127.0.0.1:{self._server.server_address[1]}", token="t"
        )

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path == ALIVE_ROUTE:
            self.num_checks += 1
            if self.is_frozen:
                time.sleep(HANG_SECONDS)
            else:
                handler.send_response(200)
                handler.send_header("content-length", "0")
                handler.end_headers()
            return
        body = handler.rfile.read(int(handler.headers.get("content-length", 0)))
        with self._lock:
            self.requests.append(json.loads(body or "{}"))
            self.paths.append(handler.path)
            self.tokens.append(handler.headers.get("authorization"))
            answer = self._answers[min(len(self.requests), len(self._answers)) - 1]
            self.num_in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.num_in_flight)
        if answer == "hang":
            time.sleep(HANG_SECONDS)
        elif answer != "reset":
            time.sleep(self.delay_seconds)
            content = json.dumps(answer[1]).encode()
            handler.send_response(answer[0])
            handler.send_header("content-length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)
        with self._lock:
            self.num_in_flight -= 1
