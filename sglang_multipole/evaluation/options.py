"""The options of `sglang-multipole eval`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sglang_multipole.evaluation.tasks import registry

DEFAULT_SAMPLES = 20
DEFAULT_SEED = 42
DEFAULT_OPS = "1-8"
DEFAULT_REFERENCE_TOKENS = 64


def make_parser() -> argparse.ArgumentParser:
    """The parser, with what each option means."""
    parser = argparse.ArgumentParser(
        prog="sglang-multipole eval",
        description="Accuracy on long-context tasks, against any OpenAI-compatible server.",
        epilog="docs/evaluation.md has the rules of the tasks and the format of the files.",
    )
    add = parser.add_argument
    add("--base-url", required=True, help="of the server, with or without /v1")
    add(
        "--task",
        action="append",
        default=[],
        choices=registry.NAMES,
        help="may be given several times",
    )
    add("--length", type=_positive, nargs="+", help="tokens of prompt and answer; several are rows")
    add("--samples", type=_positive, default=DEFAULT_SAMPLES, help="prompts a task and length")
    add("--seed", type=int, default=DEFAULT_SEED)
    add("--ops", type=parse_ops, default=DEFAULT_OPS, help="of gsm_symbolic: 1-8, or 2,4,16")
    add("--path", help="JSONL of the task file")
    add("--format", choices=registry.FORMATS, help="of --path; seen from its fields if not given")

    server = parser.add_argument_group("the server")
    add = server.add_argument
    add("--api", choices=("chat", "completions"), default="chat")
    add("--model", help="its name in requests; the server's first if not given")
    add("--api-key", help="sent as a bearer token")
    add("--tokenizer", help="folder or name; if not given, an SGLang server is asked")
    add("--concurrency", type=_positive, default=8, help="requests at a time")
    add("--timeout", type=float, default=3600.0, help="seconds a request may take")
    add("--retries", type=_count, default=2, help="after connection errors and busy servers")

    answers = parser.add_argument_group("answers")
    add = answers.add_argument
    add("--repeats", type=_positive, default=1, help="answers a prompt, with other seeds")
    add("--temperature", type=float, default=0.0)
    add("--top-p", type=float, default=1.0)
    add("--max-tokens", type=_positive, help="of an answer; if not given, the task's own")
    add(
        "--extra-body",
        type=_json_object,
        default={},
        help='JSON for every request, such as {"chat_template_kwargs": {"enable_thinking": false}}',
    )

    output = parser.add_argument_group("results")
    add = output.add_argument
    add("--json", type=Path, help="write everything there, after every task")
    add("--baseline", type=Path, help="the --json of the dense twin, to compare with")
    add("--save-reference", type=Path, help="dense server: keep its greedy answers, as tokens")
    add("--reference", type=Path, help="measure KL and divergence from these answers")
    add("--reference-tokens", type=_positive, default=DEFAULT_REFERENCE_TOKENS)
    add("--require-multipole", action="store_true", help="an error unless steps were sparse")
    return parser


def parse_ops(text: str) -> list[int]:
    """ "1-3,8" is 1, 2, 3 and 8."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            numbers += range(int(first), int(last or first) + 1)
        except ValueError:
            numbers.append(0)
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"must be numbers from 1, as 1-8 or 2,4,16, got {text!r}")
    return numbers


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value
