"""A server in this process that answers as it is told, for tests of the client."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Body = dict[str, Any]
Reply = tuple[int, Any]  # status and JSON; a float for the JSON is seconds of silence


def completion(text: str, finish_reason: str = "stop", output_tokens: int = 3) -> Reply:
    """What an OpenAI server answers, for both of its ways to ask."""
    choice = {"message": {"content": text}, "text": text, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 11, "completion_tokens": output_tokens}
    return 200, {"choices": [choice], "usage": usage}


class FakeOpenAI:
    """Listens on a free loopback port inside a `with` block.

    Attributes:
        asked: path and body of every POST, in order of arrival.
        pages: the JSON of each path that can be got.
        most_at_once: requests that were open together, at most.
    """

    def __init__(self, reply: Callable[[str, Body], Reply]):
        self.asked: list[tuple[str, Body]] = []
        self.pages: dict[str, Any] = {"/v1/models": {"data": [{"id": "fake"}]}}
        self.most_at_once = 0
        self._open = 0
        self._lock = threading.Lock()
        self._reply = reply
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = outer.pages.get(self.path)
                self.send(200 if page is not None else 404, page() if callable(page) else page)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, content = outer.answer(self.path, body)
                if isinstance(content, float):
                    time.sleep(content)
                self.send(status, content)

            def send(self, status: int, content: Any) -> None:
                data = (
                    content.encode() if isinstance(content, str) else json.dumps(content).encode()
                )
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client waits no longer

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, path: str, body: Body) -> Reply:
        with self._lock:
            self.asked.append((path, body))
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
        try:
            return self._reply(path, body)
        finally:
            with self._lock:
                self._open -= 1

    def __enter__(self) -> FakeOpenAI:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
