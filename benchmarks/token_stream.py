"""One streamed request to a server, and when each of its tokens arrived."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Sequence
from typing import Any

from sglang_multipole.local_server import LocalServer


class TokenStream(threading.Thread):
    """A greedy request of a fixed number of tokens, sent when the thread starts.

    Args:
        prompt: a text, or token ids.
        sampling: parameters beside temperature 0, max_new_tokens and ignore_eos.

    Attributes:
        began, times: time.perf_counter() of the request and of each token, seconds.
        meta_info: SGLang's, of the last token.
        exact_tokens: attended exactly so far, at each token; empty if the server is dense.
        error: why there is no answer; empty if there is one.
    """

    def __init__(
        self,
        server: LocalServer,
        prompt: str | list[int],
        num_tokens: int,
        sampling: dict[str, Any] | None = None,
    ):
        super().__init__(daemon=True)
        self._port = server.port
        fixed = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
        self._body = {
            "text" if isinstance(prompt, str) else "input_ids": prompt,
            "sampling_params": fixed | (sampling or {}),
            "stream": True,
        }
        self.began = 0.0
        self.times: list[float] = []
        self.meta_info: dict[str, Any] = {}
        self.exact_tokens: list[int] = []
        self.error = ""

    @property
    def first_token_seconds(self) -> float:
        return self.times[0] - self.began

    def run(self) -> None:
        try:
            self._run()
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.error = repr(error)

    def _run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        self.began = time.perf_counter()
        connection.request(
            "POST", "/generate", json.dumps(self._body), {"Content-Type": "application/json"}
        )
        lines: list[bytes] = []
        for line in connection.getresponse():
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            self.times.append(time.perf_counter())
            lines.append(line)
        answers = [json.loads(line.removeprefix(b"data: ")) for line in lines]
        if not answers or "meta_info" not in answers[-1]:
            raise ValueError(answers[-1:])
        self.meta_info = answers[-1]["meta_info"]
        if "multipole" in self.meta_info:
            self.exact_tokens = [
                answer["meta_info"]["multipole"]["exact_tokens"] for answer in answers
            ]


def run_together(
    streams: list[TokenStream], later: Sequence[TokenStream] = (), after: int = 0
) -> None:
    """Send all, and wait until all are answered.

    Args:
        later: sent when each of the others has `after` tokens.

    Raises:
        RuntimeError: one failed.
    """
    for stream in streams:
        stream.start()
    while any(stream.is_alive() and len(stream.times) < after for stream in streams):
        time.sleep(0.001)
    for stream in later:
        stream.start()
    asked = [*streams, *later]
    for stream in asked:
        stream.join()
    failed = [stream.error for stream in asked if stream.error]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(asked)} requests failed: {failed[0]}")
