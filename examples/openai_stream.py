"""The OpenAI client: a streamed answer about a long document, with settings for one request.

sglang-multipole serve <model> --enable-multipole ... &
python examples/openai_stream.py --url http://127.0.0.1:30000 --token-budget 2048
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import activity
import document
import openai

QUESTION = "In two sentences, what does a with statement do?"
MAX_TOKENS = 64


def stream(url: str, text: str, settings: Any, max_tokens: int = MAX_TOKENS) -> Iterator[str]:
    """The pieces of the answer, as they come.

    Args:
        settings: of multipole attention for this request: None for the server's, False for exact
            attention, {"token_budget": tokens} for another budget.
    """
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    chunks = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": f"{text}\n\n{QUESTION}"}],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        extra_body={"custom_params": {"multipole": settings}},
    )
    for chunk in chunks:
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--document", type=Path, help="a text, in place of the Python reference")
    parser.add_argument("--token-budget", type=int, help="of this request")
    parser.add_argument("--exact", action="store_true", help="attend to everything exactly")
    arguments = parser.parse_args()
    settings: Any = None
    if arguments.exact:
        settings = False
    elif arguments.token_budget is not None:
        settings = {"token_budget": arguments.token_budget}
    before = activity.of_server(arguments.url)
    for piece in stream(arguments.url, document.read(arguments.document), settings):
        print(piece, end="", flush=True)
    print(f"\n  {activity.describe(activity.grown(before, activity.of_server(arguments.url)))}")


if __name__ == "__main__":
    main()
