"""Asks an OpenAI-compatible server; whatever goes wrong becomes part of the answer."""

from __future__ import annotations

import dataclasses
import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

from sglang_multipole.evaluation.task import Prompt

RETRIED_STATUSES = (408, 429, 500, 502, 503, 504)
INFO_SECONDS = 60.0  # for what is not generated
MESSAGE_CHARACTERS = 300  # of a server's refusal


class RequestError(RuntimeError):
    """A request that was not answered; `retry` says whether another try can help."""

    def __init__(self, message: str, *, retry: bool):
        super().__init__(message)
        self.retry = retry


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are sampled; `extra` goes into the request's body as it is."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came back; `error` is None unless the request failed.

    Tokens are the server's own count (usage), None if it gives none.
    """

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    seconds: float = 0.0
    error: str | None = None


class Client:
    """One server. It may be used by many threads at once."""

    def __init__(
        self,
        base_url: str,
        *,
        api: str = "chat",
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 3600.0,
        retries: int = 2,
        wait_seconds: float = 1.0,
    ):
        """
        Args:
            base_url: with or without /v1.
            api: "chat" or "completions".
            model: its name in requests; None asks the server at the first request.
            timeout: seconds without an answer until a request counts as failed.
            retries: further tries after a connection error or a status of RETRIED_STATUSES. What
                timed out is not tried again: it would load the server a second time.
            wait_seconds: before the first further try; doubled with each.
        """
        self.root = base_url.rstrip("/").removesuffix("/v1")
        self.api = api
        self.retries = retries
        self._model = model
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout
        self._wait_seconds = wait_seconds

    @property
    def model(self) -> str:
        """The model's name.

        Raises:
            RequestError: the server does not tell it.
        """
        if self._model is None:
            models = self.get("/v1/models")
            try:
                self._model = models["data"][0]["id"]
            except (KeyError, IndexError, TypeError):
                raise RequestError(
                    f"eval: {self.root}/v1/models must name a model, got {models!r:.300}; "
                    "give --model",
                    retry=False,
                ) from None
        return self._model

    def get(self, path: str) -> Any:
        """The JSON answered to a GET.

        Raises:
            RequestError: see post.
        """
        return self._send(urllib.request.Request(self.root + path, headers=self._headers))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answered to `body`, after at most `retries` further tries.

        Raises:
            RequestError: the server refused, could not be reached or did not answer in time.
        """
        request = urllib.request.Request(self.root + path, json.dumps(body).encode(), self._headers)
        wait = self._wait_seconds
        for _ in range(self.retries):
            try:
                return self._send(request, self._timeout)
            except RequestError as error:
                if not error.retry:
                    raise
            time.sleep(wait)
            wait *= 2
        return self._send(request, self._timeout)

    def ask(self, prompt: Prompt, sampling: Sampling, seed: int | None) -> Answer:
        """Ask once; a failure is in the answer's `error`."""
        started = time.monotonic()
        try:
            body = {
                "model": self.model,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_tokens,
                **({} if seed is None else {"seed": seed}),
                **sampling.extra,
            }
            if self.api == "chat":
                body["messages"] = [{"role": "user", "content": prompt.text}]
                answered = self.post("/v1/chat/completions", body)
            else:
                body["prompt"] = prompt.text + prompt.answer_prefix
                answered = self.post("/v1/completions", body)
            answer = _read_answer(answered)
        except RequestError as error:
            answer = Answer(error=str(error))
        return dataclasses.replace(answer, seconds=time.monotonic() - started)

    def _send(self, request: urllib.request.Request, timeout: float = INFO_SECONDS) -> Any:
        where = request.full_url
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")[:MESSAGE_CHARACTERS]
            raise RequestError(
                f"{where} answered {error.code}: {reason}",
                retry=error.code in RETRIED_STATUSES,
            ) from error
        except ValueError as error:
            raise RequestError(f"{where} answered no JSON: {error}", retry=False) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise RequestError(
                    f"{where} did not answer within {timeout:g} s", retry=False
                ) from error
            raise RequestError(f"{where} could not be reached: {reason!r}", retry=True) from error


def _read_answer(answered: Any) -> Answer:
    try:
        choice = answered["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        usage = answered.get("usage") or {}
        return Answer(
            # None while a reasoning parser found no end of the thinking
            text or "",
            choice.get("finish_reason"),
            usage.get("prompt_tokens"),
            usage.get("completion_tokens"),
        )
    except (KeyError, IndexError, TypeError, AttributeError):
        return Answer(error=f"an answer must have choices with text, got {answered!r:.300}")
