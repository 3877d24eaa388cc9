"""`sglang-multipole check`: ask a live server whether multipole attention is active and sharing.

Two requests with one long prefix of random tokens are sent. The first must be attended sparsely, as
its own answer and the server's totals say; the second must find the first one's clusters ready.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from sglang_multipole.config import MultipoleConfig

HELP = "ask a live server whether multipole attention is active and shares clusters"
NUM_NEW_TOKENS = 8
# token ids that every vocabulary has and no tokenizer treats specially
FIRST_TOKEN, LAST_TOKEN = 1000, 9000


class CheckError(Exception):
    """The server is not as it should be; the message says how."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-url", default="http://127.0.0.1:30000", help="of the server")
    parser.add_argument("--api-key", help="if the server asks for one")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one request")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; 0 if multipole attention is active and shares, else 1."""
    try:
        for line in _check(_Server(arguments.base_url, arguments.api_key, arguments.timeout)):
            sys.stdout.write(f"ok    {line}\n")
            sys.stdout.flush()
    except CheckError as error:
        sys.stdout.write(f"FAIL  {error}\n")
        return 1
    return 0


class _Server:
    def __init__(self, base_url: str, api_key: str | None, timeout: float):
        self._base_url, self._timeout = base_url.rstrip("/"), timeout
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self._base_url + path, data, self._headers)
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")[:300]
            raise CheckError(f"{path} must answer 200, got {error.code}: {text}") from error
        except (OSError, ValueError) as error:
            raise CheckError(f"{self._base_url}{path} must answer with JSON: {error}") from error


def _check(server: _Server) -> Iterator[str]:
    """What is as it should be, in order; CheckError at the first that is not."""
    info = server.ask("/server_info")
    before = _reports(info)
    values = before[0]["config"]
    config = MultipoleConfig.from_dict(values)
    yield f"configured: token budget {config.token_budget}, exact below {config.min_context_text}"

    length = prompt_length(config)
    limit = info.get("max_req_input_len") or info.get("context_length")
    if limit is not None and length + NUM_NEW_TOKENS > limit:
        raise CheckError(
            f"a request must be {length} tokens long to be sparse, and this server takes {limit}; "
            "lower min_context or segment_size, or serve a longer context"
        )
    chosen = random.SystemRandom()
    tokens = [chosen.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(length)]
    first = _activity(server, tokens)
    if not first["sparse_steps"]:
        raise CheckError(f"a request of {length} tokens must be sparse, got {first}")
    grown = _sparse_steps(_reports(server.ask("/server_info"))) - _sparse_steps(before)
    if grown < first["sparse_steps"]:
        raise CheckError(
            f"the server's sparse steps must have grown by {first['sparse_steps']}, got {grown}"
        )
    steps = first["sparse_steps"] + first["dense_steps"]
    share = 100 * first["exact_tokens"] / first["context_tokens"]
    yield (
        f"active: {first['sparse_steps']} of {steps} steps sparse at {length} tokens, "
        f"{share:.1f} % of the context read exactly"
    )

    if info.get("disable_radix_cache"):
        yield "sharing: none, because the server runs with --disable-radix-cache"
        return
    if len(before) > 1:
        yield f"sharing: not asked, because {len(before)} data-parallel ranks take turns"
        return
    # a last token of its own: the prefix is found, the request is another
    second = _activity(server, [*tokens, FIRST_TOKEN])
    if not second["segments_shared"]:
        raise CheckError(f"a second request must find the prefix's clusters ready, got {second}")
    yield f"sharing: the second request found {second['segments_shared']} segments ready"


def prompt_length(config: MultipoleConfig) -> int:
    """Tokens of a prompt that is sparse and has a sealed segment, which alone can be shared."""
    recent = 2 * config.recluster_interval
    clustered = max(config.token_budget + 1, config.segment_size)
    return max(config.min_context_of(1), clustered + recent)


def _reports(info: dict[str, Any]) -> list[dict[str, Any]]:
    states = info.get("internal_states") or [{}]
    reports = [state.get("multipole") for state in states]
    if not all(reports):
        raise CheckError(
            "multipole attention is off in this server; start it with --enable-multipole"
        )
    return reports


def _sparse_steps(reports: list[dict[str, Any]]) -> int:
    return sum(report["totals"]["sparse_steps"] for report in reports)


def _activity(server: _Server, tokens: list[int]) -> dict[str, int]:
    sampling = {"temperature": 0, "max_new_tokens": NUM_NEW_TOKENS, "ignore_eos": True}
    answer = server.ask("/generate", {"input_ids": tokens, "sampling_params": sampling})
    activity = answer["meta_info"].get("multipole")
    if not activity:
        raise CheckError("the answer must tell what was attended, got no meta_info.multipole")
    return activity
